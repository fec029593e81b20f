"""One process a device over the same units, with engines that run on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from singerembed.catalog.read import Track
from singerembed.engine.file import read_engine_file
from singerembed.engine.load import bundled_engine_path
from singerembed.errors import EngineError, InterruptedRun, UsageError
from singerembed.jobs import gpus
from singerembed.jobs.gpus import choose_devices
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import run
from singerembed.jobs.units import Listener
from singerembed.model.spec import ModelSpec
from singerembed.output.schema import Counts, TrackRows

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = RunOptions(unit_minutes=8, workers=1, devices=(0, 1))


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine seems to have two; engines run on the CPU all the same."""
    monkeypatch.setattr(gpus, "devices_for", lambda _engine: 2)


@pytest.fixture
def catalog(tmp_path: Path) -> str:
    names = sorted(p.name for p in (EXAMPLES / "audio").iterdir())
    path = tmp_path / "c.csv"
    lines = [f"{EXAMPLES}/audio/{name}" for name in [*names, "missing.wav", *names]]
    path.write_text("path\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


class Watch(Listener):
    def __init__(self) -> None:
        self.starts: list[str] = []
        self.counts = Counts()
        self.units: list[int] = []

    def started(self, _spec: ModelSpec, description: str, _total: int) -> None:
        self.starts.append(description)

    def embedded(self, _track: Track, rows: TrackRows) -> None:
        self.counts.add(rows)

    def published(self, unit: int, _counts: Counts) -> None:
        self.units.append(unit)


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("devices", [(0, 1), (0, 0)])
def test_two_processes_give_the_rows_of_one(catalog: str, tmp_path: Path, devices: tuple[int, int]) -> None:
    one, two = str(tmp_path / "one.parquet"), str(tmp_path / "two.parquet")
    alone = run(catalog, one, options=RunOptions(unit_minutes=8, devices=(0,)))
    watch = Watch()
    together = run(catalog, two, options=replace(OPTIONS, devices=devices), listeners=[watch])
    assert pq.read_table(two).equals(pq.read_table(one))
    assert together.counts == alone.counts == watch.counts == together.embedded
    assert len(watch.starts) == 2
    assert sorted(watch.units) == list(range(13))


@pytest.mark.usefixtures("two_devices")
def test_a_stop_reaches_both_and_the_run_goes_on_with_one(catalog: str, tmp_path: Path) -> None:
    output = str(tmp_path / "o.parquet")
    watch = Watch()
    with pytest.raises(InterruptedRun) as caught:
        run(catalog, output, options=OPTIONS, listeners=[watch], stop=lambda: signal.SIGTERM if watch.units else 0)
    assert caught.value.exit_code == 143
    summary = run(catalog, output, options=RunOptions(unit_minutes=8, devices=(0,)))
    assert summary.units_before > 0
    assert summary.counts.tracks == 25


@pytest.mark.usefixtures("two_devices")
def test_an_engine_that_fails_ends_the_run_with_its_reason(
    catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "later.engine"
    engine.write_bytes(Path(bundled_engine_path()).read_bytes())

    def spoil() -> int:
        engine.write_bytes(b"spoilt")
        return 0

    with pytest.raises(EngineError, match="not an engine file"):
        run(catalog, str(tmp_path / "o.parquet"), engine=str(engine), options=OPTIONS, stop=spoil)


def test_a_process_that_crashes_starts_again(catalog: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes, soundfile\n"
        "original = soundfile.SoundFile.__init__\n"
        "def crashing(self, file, *rest, **options):\n"
        "    if 'tenor_1.mp3' in str(file):\n"
        "        ctypes.string_at(0)\n"
        "    original(self, file, *rest, **options)\n"
        "soundfile.SoundFile.__init__ = crashing\n",
        encoding="utf-8",
    )
    code = (
        "import json\n"
        "from singerembed import RunOptions, run\n"
        "from singerembed.jobs import gpus\n"
        "if __name__ == '__main__':\n"
        "    gpus.devices_for = lambda engine: 2\n"
        f"    options = RunOptions(unit_minutes=8, workers=1, devices=(0, 1))\n"
        f"    summary = run({catalog!r}, {str(tmp_path / 'o.parquet')!r}, options=options)\n"
        "    print(json.dumps(summary.counts.errors))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"decoder_crashed": 2, "not_found": 1}


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = read_engine_file(bundled_engine_path())
    monkeypatch.setattr(gpus, "devices_for", lambda _engine: 2)
    assert choose_devices(engine, None) == (0, 1)
    assert choose_devices(engine, (1,)) == (1,)
    with pytest.raises(UsageError, match="--devices 2"):
        choose_devices(engine, (0, 2))
    monkeypatch.setattr(gpus, "devices_for", lambda _engine: 0)
    assert choose_devices(engine, None) == (0,)
