"""The command line as a person and a script see it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from click.testing import CliRunner, Result

import singerembed
from singerembed.cli.main import cli
from singerembed.engine.file import read_engine_file
from singerembed.engine.load import bundled_engine_path

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")

SCREEN_LINES = 24


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", 0.1 * rng.standard_normal(9 * 44_100), 44_100)
    path = tmp_path / "catalog.csv"
    path.write_text("path\na.wav\n", encoding="utf-8")
    return path


@pytest.fixture
def bad_catalog(catalog: Path) -> Path:
    catalog.write_text("path\na.wav\nmissing.wav\n", encoding="utf-8")
    return catalog


def test_run(catalog: Path, tmp_path: Path) -> None:
    result = invoke("run", str(catalog), str(tmp_path / "o.parquet"))
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "1 tracks, 2 crops (0 silent), 0 errors" in result.stderr
    assert singerembed.load_engine().spec.name in result.stderr
    again = invoke("run", str(catalog), str(tmp_path / "o.parquet"))
    assert again.exit_code == 0
    assert "finished before" in again.stderr


def test_scan_and_a_run_over_a_folder(
    catalog: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (tmp_path / "closed").mkdir()
    result = invoke("scan", str(tmp_path), str(elsewhere / "library.csv"), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["recordings"] == 1
    assert "1 recordings, 0 artists, 0.0 h (left out: 1 no audio)" in result.stderr
    result = invoke("run", str(tmp_path), str(elsewhere / "o.parquet"))
    assert result.exit_code == 0
    assert f"kept as {elsewhere / 'o.catalog.parquet'}\n" in result.stderr
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for arguments in (["scan", str(tmp_path), str(elsewhere / "library.csv")],
                      ["run", str(tmp_path), str(elsewhere / "p.parquet")]):  # fmt: skip
        result = invoke(*arguments)
        assert result.exit_code == 3
        assert f"{tmp_path / 'closed'}: Permission denied" in result.stderr
    assert invoke("scan", str(tmp_path / "missing"), str(elsewhere / "x.csv")).exit_code == 1
    assert invoke("scan", str(tmp_path), str(elsewhere / "x.txt")).exit_code == 2


def test_restart_says_what_it_throws_away(catalog: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "o.parquet")
    parts = Path(f"{output}.parts")
    parts.mkdir()
    (parts / "unit-000000.parquet").touch()
    first = invoke("run", str(catalog), output, "--restart")
    assert first.exit_code == 0
    assert f"1 finished units in {parts} are thrown away\n" in first.stderr
    second = invoke("run", str(catalog), output, "--restart")
    assert f"0 finished units in {parts} are thrown away; {output} is replaced" in second.stderr


def test_error_rows_exit_with_3_and_say_how_to_see_them(bad_catalog: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "o.parquet")
    result = invoke("run", str(bad_catalog), output, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["errors"] == {"not_found": 1}
    assert "not_found 1" in result.stderr
    assert f"from '{output}' where status = 'error'" in result.stderr
    assert invoke("run", str(bad_catalog), output, "-q").exit_code == 3


def test_quiet_says_nothing(catalog: Path, tmp_path: Path) -> None:
    result = invoke("run", str(catalog), str(tmp_path / "o.parquet"), "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--crops", "0"], ["--crops", "x"], ["--hop", "-1"], ["--pool", "max"], ["--workers", "0"],

        ["--silence-dbfs", "3"], ["--rename", "x"], ["--unit-minutes", "0"],
        ["--embedding-dtype", "int8"], ["--no-such-option"],
        ["--hop", "nan"], ["--hop", "1e300"], ["--track-timeout", "inf"], ["--unit-minutes", "nan"],
        ["--silence-dbfs", "nan"], ["--min-vocals", "nan", "--separate", "x"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_usage_errors_exit_with_2(catalog: Path, tmp_path: Path, arguments: list[str]) -> None:
    result = invoke("run", str(catalog), str(tmp_path / "o.parquet"), *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr


def test_a_folder_as_output_is_refused_before_it_is_made(catalog: Path, tmp_path: Path) -> None:
    result = invoke("run", str(catalog), f"{tmp_path}/new/")
    assert result.exit_code == 2
    assert "say --partitioned too" in result.stderr
    assert not (tmp_path / "new").exists()


def test_what_cannot_run_exits_with_1_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("id,file\n1,2\n", encoding="utf-8")
    for arguments, message in (
        (["run", str(tmp_path / "c.csv"), str(tmp_path / "o.parquet")], 'has no column "path"'),
        (["run", str(tmp_path / "none.csv"), str(tmp_path / "o.parquet")], "No such file"),
        (["build-engine", str(tmp_path / "none.pt"), "-o", str(tmp_path / "x")], "no such file"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert "Traceback" in invoke(*arguments, "-v").stderr


def test_build_engine_and_inspect(release_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    built = invoke("build-engine", str(release_folder), "--normalise", "9.2", "--json")
    assert built.exit_code == 0
    assert "cosine >= " in built.stderr
    assert "5,288,548 parameters" in built.stderr
    assert json.loads(built.stdout)["spec"]["normalise"] == 9.2
    assert read_engine_file("byol.engine").spec.normalise == 9.2
    assert invoke("build-engine", str(release_folder)).exit_code == 1  # it exists
    assert invoke("build-engine", str(release_folder), "--force", "-q").stderr == ""
    assert invoke("build-engine", str(release_folder), "--normalise", "zero").exit_code == 2
    for kind, path in (("engine", "byol.engine"), ("checkpoint", str(release_folder))):
        assert json.loads(invoke("inspect", path, "--json").stdout)["kind"] == kind
        assert "weights_sha256" in invoke("inspect", path, "--full").stdout
        assert "efficientnet_b0, 1000 dimensions" in invoke("inspect", path).stdout


def test_inspect_an_output(catalog: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "o.parquet")
    invoke("run", str(catalog), output)
    facts = json.loads(invoke("inspect", output, "--json").stdout)
    assert facts["kind"] == "output"
    assert facts["counts"]["crops"] == 2
    assert facts["spec"]["method"] == singerembed.load_engine().spec.method
    summary = invoke("inspect", output).stdout
    assert "1 tracks, 2 crops (0 silent)" in summary
    assert summary.count("\n") <= SCREEN_LINES < invoke("inspect", output, "--full").stdout.count("\n")
    for junk in (str(catalog), str(tmp_path / "none")):
        assert invoke("inspect", junk).exit_code == 2


def test_doctor() -> None:
    result = invoke("doctor", "--json")
    assert result.exit_code == 0
    subjects = {finding["subject"]: finding for finding in json.loads(result.stdout)}
    assert subjects["ONNX Runtime"]["ok"]
    assert "avx" in subjects["processor"]["text"] or "portable" in subjects["processor"]["text"]
    missing = [finding for finding in subjects.values() if not finding["ok"]]
    assert all("pip install" in finding["text"] or "CUDA" in finding["subject"] for finding in missing)
    assert invoke("doctor").stdout.count("\n") == len(subjects)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_and_is_in_the_readme(name: str) -> None:
    assert cli.commands[name].help
    assert f"singerembed {name}" in README
    assert invoke(name, "--help").exit_code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_soon_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", (0.1 * rng.standard_normal(40 * 44_100)).astype(np.float32), 44_100)
    (tmp_path / "c.csv").write_text("path\n" + "a.wav\n" * 400, encoding="utf-8")
    output = tmp_path / "o.parquet"
    command = [sys.executable, "-m", "singerembed", "run", str(tmp_path / "c.csv"), str(output), "--unit-minutes", "8"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    parts = Path(f"{output}.parts")
    deadline = time.monotonic() + 60
    while not list(parts.glob("unit-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "press again to stop now" in stderr
    assert "The same command goes on from here" in stderr
    assert not output.exists()
    assert list(parts.glob("unit-*"))
    (tmp_path / "c2.csv").write_text("path\n", encoding="utf-8")
    resumed = subprocess.run(
        [*command[:4], str(tmp_path / "c2.csv"), *command[5:]], capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 1
    assert "belongs to another run: catalog" in resumed.stderr


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "blocked.csv")  # reading the catalogue never ends, so only the second signal can end the run
    command = [sys.executable, "-m", "singerembed", "run", str(tmp_path / "blocked.csv"), str(tmp_path / "o.parquet")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)  # within a second it would be a copy of the first
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_other_commands_too_and_leaves_nothing_behind(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "music").mkdir()
    for i in range(20_000):
        (tmp_path / "music" / f"{i}.wav").touch()
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "singerembed", "scan", str(tmp_path / "music"), str(tmp_path / "out" / "c.csv")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert not list((tmp_path / "out").iterdir())


def test_memory_stays_flat_and_below_600_mb(tmp_path: Path) -> None:
    """Peak resident size of runs over 20 and over 200 tracks, on the default engine."""
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.flac", (0.1 * rng.standard_normal((20 * 44_100, 2))).astype(np.float32), 44_100)
    code = (
        "import re, sys, singerembed\n"
        "singerembed.run(sys.argv[1], sys.argv[2], options=singerembed.RunOptions(unit_minutes=40, workers=2))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    peaks = []
    for n in (20, 200):
        catalog = tmp_path / f"{n}.csv"
        catalog.write_text("path\n" + "a.flac\n" * n, encoding="utf-8")
        output = tmp_path / f"{n}.parquet"
        result = subprocess.run(
            [sys.executable, "-c", code, str(catalog), str(output)], capture_output=True, text=True, check=True
        )
        assert pq.read_metadata(output).num_rows == 5 * n
        peaks.append(int(result.stdout) / 1024)
    assert max(peaks) < 600, peaks
    assert peaks[1] < peaks[0] + 60, peaks


def test_a_surprise_is_one_line_too(catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def surprise(*_args: object, **_options: object) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr("singerembed.jobs.run.run", surprise)
    result = invoke("run", str(catalog), str(tmp_path / "o.parquet"))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "ZeroDivisionError: surprise" in result.stderr


def test_a_reader_that_goes_away_is_no_mistake() -> None:
    inspect = [sys.executable, "-m", "singerembed", "inspect", bundled_engine_path()]
    with subprocess.Popen(inspect, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(("ignored", "code"), [(False, -signal.SIGINT), (True, 0)])
def test_ctrl_c_while_modules_are_imported_leaves_no_traceback(ignored: bool, code: int) -> None:
    interrupting = (
        "import os, signal, sys\n"
        f"if {ignored}: signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'singerembed.cli.search': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from singerembed.__main__ import main\n"
        "sys.argv = ['singerembed', '--version']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", interrupting], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert not done.stderr
