"""A run that is stopped, killed, refused, retried, or meets a broken machine."""

from __future__ import annotations

import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import embed_lines

from singerembed.audio.recording import open_recording
from singerembed.catalog.read import Track
from singerembed.engine.load import load_engine
from singerembed.errors import CatalogError, EngineError, InterruptedRun, OutputError, UsageError
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import RunSummary, run
from singerembed.jobs.track import embed_track
from singerembed.jobs.units import Listener
from singerembed.output.schema import TrackRows

# --- going on, and refusing to --------------------------------------------------------------------------------------


def test_a_finished_run_does_nothing_again(
    finished: tuple[Path, RunSummary], library: Path, reference_engine: str
) -> None:
    before = finished[0].stat().st_mtime_ns
    summary = run(str(library / "catalog.csv"), str(finished[0]), engine=reference_engine)
    assert summary.already_done
    assert summary.counts == finished[1].counts
    assert finished[0].stat().st_mtime_ns == before
    assert sorted(p.name for p in finished[0].parent.iterdir()) == ["out.parquet"]


def stop_after(n: int) -> Callable[[], int]:
    calls = itertools.count()
    return lambda: signal.SIGTERM if next(calls) >= n else 0


def test_a_stopped_run_goes_on(
    finished: tuple[Path, RunSummary], library: Path, reference_engine: str, tmp_path: Path
) -> None:
    output = tmp_path / "o.parquet"
    options = RunOptions(unit_minutes=8.0)
    (tmp_path / ".o.parquet.4194304-0123abcd.tmp").touch()  # of a merge that was killed
    stops = 0
    for n in (4, 10, 14):
        try:
            run(str(library / "catalog.csv"), str(output), engine=reference_engine, options=options, stop=stop_after(n))
        except InterruptedRun as exc:
            stops += 1
            assert exc.exit_code == 128 + signal.SIGTERM
            assert "goes on from here" in str(exc)
            assert not output.exists()
    summary = run(str(library / "catalog.csv"), str(output), engine=reference_engine, options=options)
    assert stops >= 2
    assert summary.units_before > 0
    assert pq.read_table(output).equals(pq.read_table(finished[0]))
    assert list(tmp_path.iterdir()) == [output]


def interrupted(library: Path, engine: str, output: Path) -> None:
    with pytest.raises(InterruptedRun):
        run(
            str(library / "catalog.csv"),
            str(output),
            engine=engine,
            options=RunOptions(unit_minutes=8.0),
            stop=stop_after(15),
        )


def test_other_options_engines_and_catalogues_are_refused(
    finished: tuple[Path, RunSummary], library: Path, reference_engine: str, tmp_path: Path
) -> None:
    catalog = str(library / "catalog.csv")
    output = tmp_path / "o.parquet"
    interrupted(library, reference_engine, output)
    same = RunOptions(unit_minutes=8.0)
    with pytest.raises(OutputError, match=r"options silence_dbfs \(was -60.0, now -50.0\).*--restart"):
        run(catalog, str(output), engine=reference_engine, options=replace(same, silence_dbfs=-50.0))
    with pytest.raises(OutputError, match=r"engine name.*engine sha256"):
        run(catalog, str(output), options=same)
    changed = tmp_path / "catalog.csv"
    changed.write_text((library / "catalog.csv").read_text(encoding="utf-8") + "more,more.wav,,,\n", encoding="utf-8")
    with pytest.raises(OutputError, match="catalog sha256"):
        run(str(changed), str(output), engine=reference_engine, options=same)
    with pytest.raises(OutputError, match="comes from another run: options crops"):
        run(catalog, str(finished[0]), engine=reference_engine, options=RunOptions(crops=2))
    restarted = run(catalog, str(output), engine=reference_engine, options=RunOptions(restart=True))
    assert restarted.units_before == 0
    assert pq.read_table(output).equals(pq.read_table(finished[0]))


def test_files_of_others_are_never_overwritten(library: Path, reference_engine: str, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"x": [1]}), foreign)
    text = tmp_path / "notes.parquet"
    text.write_text("my notes", encoding="utf-8")
    for output, message in ((foreign, "is not as singerembed run has written it"), (text, "is not a Parquet file")):
        content = output.read_bytes()
        for restart in (False, True):
            with pytest.raises(OutputError, match=message):
                run(
                    str(library / "catalog.csv"),
                    str(output),
                    engine=reference_engine,
                    options=RunOptions(restart=restart),
                )
        assert output.read_bytes() == content


def test_two_runs_on_one_output(library: Path, reference_engine: str, tmp_path: Path) -> None:
    output = str(tmp_path / "o.parquet")
    entered, leave = threading.Event(), threading.Event()

    def stop() -> int:
        entered.set()
        leave.wait(30)
        return signal.SIGINT

    def first() -> None:
        with pytest.raises(InterruptedRun):
            run(str(library / "catalog.csv"), output, engine=reference_engine, stop=stop)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(30)
    with pytest.raises(OutputError, match=f"another run is writing .* \\(process {os.getpid()}\\)"):
        run(str(library / "catalog.csv"), output, engine=reference_engine)
    leave.set()
    thread.join()


def test_kills_lose_nothing(
    finished: tuple[Path, RunSummary], library: Path, reference_engine: str, tmp_path: Path
) -> None:
    """SIGKILL at random moments, then the same command again. tests/soak does it a hundred times."""
    output = tmp_path / "o.parquet"
    command = [
        sys.executable, "-m", "singerembed", "run", str(library / "catalog.csv"), str(output),
        "--engine", reference_engine, "--unit-minutes", "8", "-q",
    ]  # fmt: skip
    rng = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(command, start_new_session=True)
        time.sleep(rng.uniform(0.5, 2.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, check=False).returncode == 3
    assert pq.read_table(output).equals(pq.read_table(finished[0]))


def test_a_full_disk_keeps_what_is_done(
    finished: tuple[Path, RunSummary], library: Path, reference_engine: str, tmp_path: Path
) -> None:
    """RLIMIT_FSIZE plays the full disk: first not even run.json fits, then no part, then not the whole."""
    output = tmp_path / "o.parquet"
    arguments = ["run", str(library / "catalog.csv"), str(output), "--engine", reference_engine, "--unit-minutes", "8"]

    def limited(size: int) -> subprocess.CompletedProcess[str]:
        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        command = [sys.executable, "-m", "singerembed", *arguments]
        return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)

    for size, message in ((5, "cannot write to"), (6_000, "while writing unit"), (70_000, "while writing")):
        result = limited(size)
        assert result.returncode == 1
        assert message in result.stderr
        assert "run the same command again" in result.stderr
        assert "Traceback" not in result.stderr
        assert not output.exists()
        assert not list(Path(f"{output}.parts").glob("*.tmp"))
    run(str(library / "catalog.csv"), str(output), engine=reference_engine, options=RunOptions(unit_minutes=8.0))
    assert pq.read_table(output).equals(pq.read_table(finished[0]))


def test_a_broken_engine_ends_the_run(
    library: Path, reference_engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: object, _crops: object) -> None:
        raise EngineError("the device fell off the bus")

    monkeypatch.setattr(type(load_engine(reference_engine)), "embed", fail)
    with pytest.raises(EngineError, match="fell off the bus"):
        run(str(library / "catalog.csv"), str(tmp_path / "o.parquet"), engine=reference_engine)
    assert not (tmp_path / "o.parquet").exists()


def test_a_surprise_costs_one_track(
    library: Path, reference_engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def surprising(location: str, *rest: Any, **options: Any) -> Any:
        if location.endswith("six.wav"):
            raise ZeroDivisionError("surprise")
        return open_recording(location, *rest, **options)

    monkeypatch.setattr("singerembed.jobs.track.open_recording", surprising)
    table = embed_lines(library, reference_engine, tmp_path / "o.parquet", ["a,@six.wav,,", "b,@float.wav,,"])
    assert table["status"].to_pylist() == ["error", "ok", "ok"]
    assert table["error_code"][0].as_py() == "internal"
    assert "surprise" in table["error"][0].as_py()


def test_a_missing_engine_or_catalogue_is_said(library: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="No such file"):
        run(str(library / "catalog.csv"), str(tmp_path / "o.parquet"), engine=str(tmp_path / "none.engine"))
    with pytest.raises(CatalogError, match="No such file"):
        run(str(tmp_path / "none.csv"), str(tmp_path / "o.parquet"))
    assert list(tmp_path.iterdir()) == []


# --- retrying -------------------------------------------------------------------------------------------------------


def test_retry_errors_puts_only_those_rows_in_place(library: Path, reference_engine: str, tmp_path: Path) -> None:
    """A recording that was missing, one that is still broken, a name twice in a row, units with and without errors."""
    late = tmp_path / "late.wav"
    shutil.copy(library / "float.wav", late)
    lines = [f"t{i},@float.wav,," for i in range(5)] + ["late,late.wav,,", "broken,@text.wav,,"]
    lines += ["t8,@8bit.wav,,", "twice,late.wav,,", "twice,late.wav,,", "t11,@zero.wav,,"]
    expected = embed_lines(library, reference_engine, tmp_path / "whole.parquet", lines, unit_minutes=8.0)
    late.rename(tmp_path / "elsewhere.wav")
    output, catalog = tmp_path / "o.parquet", tmp_path / "o.csv"
    before = embed_lines(library, reference_engine, output, lines, unit_minutes=8.0)
    assert before["error_code"].to_pylist().count("not_found") == 3
    (tmp_path / "elsewhere.wav").rename(late)

    embedded = []

    class Watch(Listener):
        def embedded(self, track: Any, _rows: Any) -> None:
            embedded.append(track.track_id)

    options = RunOptions(unit_minutes=8.0, retry_errors=True)
    summary = run(str(catalog), str(output), engine=reference_engine, options=options, listeners=[Watch()])
    assert set(embedded) == {"late", "broken", "twice"}
    assert pq.read_table(output).equals(expected)
    assert summary.counts.errors == {"decode_failed": 1}
    assert summary.counts.tracks == 11
    assert not Path(f"{output}.parts").exists()
    again = run(str(catalog), str(output), engine=reference_engine, options=RunOptions(unit_minutes=8.0))
    assert again.already_done
    assert again.counts == summary.counts


def test_retry_errors_needs_an_output(library: Path, reference_engine: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="finished output"):
        run(
            str(library / "catalog.csv"), str(tmp_path / "o.parquet"), engine=reference_engine,
            options=RunOptions(retry_errors=True),
        )  # fmt: skip


def test_retry_errors_goes_on_after_a_stop(
    finished: tuple[Path, RunSummary], library: Path, reference_engine: str, tmp_path: Path
) -> None:
    output = tmp_path / "o.parquet"
    catalog = str(library / "catalog.csv")
    run(catalog, str(output), engine=reference_engine, options=RunOptions(unit_minutes=8.0))
    options = RunOptions(unit_minutes=8.0, retry_errors=True)

    with pytest.raises(InterruptedRun):
        run(catalog, str(output), engine=reference_engine, options=options, stop=stop_after(1))
    # A run without the option has nothing to do, and leaves what the retry has done.
    assert run(catalog, str(output), engine=reference_engine, options=RunOptions(unit_minutes=8.0)).already_done
    summary = run(catalog, str(output), engine=reference_engine, options=options)
    assert summary.units_before > 0
    assert pq.read_table(output).equals(pq.read_table(finished[0]))


def test_passing_trouble_is_waited_out(
    library: Path, reference_engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("singerembed.jobs.track._FIRST_PAUSE_SECONDS", 0.01)
    original, failures = Path.stat, {"left": 2}

    def flaky(self: Path, **options: Any) -> os.stat_result:
        if self.name == "float.wav" and failures["left"]:
            failures["left"] -= 1
            raise OSError(116, "Stale file handle")
        return original(self, **options)

    monkeypatch.setattr(Path, "stat", flaky)
    assert (
        embed_lines(library, reference_engine, tmp_path / "a.parquet", ["x,@float.wav,,"])["status"].to_pylist()
        == ["ok"] * 2
    )
    failures["left"] = 3
    table = embed_lines(library, reference_engine, tmp_path / "b.parquet", ["x,@float.wav,,"])
    assert table["error_code"].to_pylist() == ["unreadable"]
    assert table["error"].to_pylist() == ["Stale file handle"]


# --- crashes --------------------------------------------------------------------------------------------------------


def test_a_crash_in_the_common_decoder_costs_its_own_row(
    finished: tuple[Path, RunSummary], library: Path, reference_engine: str, tmp_path: Path
) -> None:
    """libsndfile is made to crash on one recording, in whatever process decodes it; the command itself goes on."""
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes, soundfile\n"
        "original = soundfile.SoundFile.__init__\n"
        "def crashing(self, file, *rest, **options):\n"
        "    if '24bit.wav' in str(file):\n"
        "        ctypes.string_at(0)\n"
        "    original(self, file, *rest, **options)\n"
        "soundfile.SoundFile.__init__ = crashing\n",
        encoding="utf-8",
    )
    output = tmp_path / "o.parquet"
    command = [
        sys.executable, "-m", "singerembed", "run", str(library / "catalog.csv"), str(output),
        "--engine", reference_engine, "--unit-minutes", "20",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 3, result.stderr
    assert "SIGSEGV" in result.stderr
    rows = pq.read_table(output).to_pylist()
    expected = pq.read_table(finished[0]).to_pylist()
    assert [r for r in rows if r["track_id"] != "24bit.wav"] == [r for r in expected if r["track_id"] != "24bit.wav"]
    (row,) = [r for r in rows if r["track_id"] == "24bit.wav"]
    assert row["error_code"] == "decoder_crashed"


def test_the_output_folder_removed_in_mid_run(library: Path, reference_engine: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()

    def vanish() -> int:
        shutil.rmtree(folder, ignore_errors=True)
        return 0

    with pytest.raises(OutputError, match="No such file or directory while writing unit 1"):
        run(str(library / "catalog.csv"), str(folder / "o.parquet"), engine=reference_engine, stop=vanish)


def test_a_read_only_output_folder(library: Path, reference_engine: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write to"):
        run(str(library / "catalog.csv"), str(tmp_path / "file" / "o.parquet"), engine=reference_engine)


def test_a_recording_replaced_in_mid_read(
    library: Path, reference_engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renamed over, the decoder goes on with the file it has open; cut in place, the track says so. The run goes on."""
    engine = load_engine(reference_engine)
    noise = (0.1 * np.random.default_rng(1).standard_normal(44_100 * 60)).astype(np.float32)

    def embed_while(change: Callable[[Path], object]) -> TrackRows:
        path = tmp_path / "a.wav"
        soundfile.write(path, noise, 44_100)
        calls = itertools.count()

        def between_blocks() -> int:
            if next(calls) == 1:
                change(path)
            return 0

        return embed_track(Track(1, "a", str(path), str(path)), engine, RunOptions(), stop=between_blocks)

    whole = embed_while(lambda _path: None)
    other = Path(shutil.copy(library / "six.wav", tmp_path / "b.wav"))
    replaced = embed_while(other.replace)
    assert replaced.error is None
    assert np.array_equal(replaced.embedding, whole.embedding)
    cut = embed_while(lambda path: os.truncate(path, 3_000_000))
    assert cut.error is not None
    assert cut.error.code in {"truncated", "decode_failed"}
    assert 0 < len(cut.embedding) < len(whole.embedding)
    assert np.array_equal(cut.embedding, whole.embedding[: len(cut.embedding)])
