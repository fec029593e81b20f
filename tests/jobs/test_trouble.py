"""A run where the machine is in trouble: storage, signals, standard streams, limits."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from click.testing import CliRunner

from benchmarks.fakes import InstantEngine
from singerembed import storage
from singerembed.cli.main import cli
from singerembed.engine.base import EmbeddedCrops
from singerembed.errors import OutputError
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import run
from singerembed.jobs.track import Patience

COMMAND = [sys.executable, "-m", "singerembed", "run"]


@pytest.fixture
def catalog(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", (0.1 * rng.standard_normal(9 * 44_100)).astype(np.float32), 44_100)
    (tmp_path / "c.csv").write_text("path\na.wav\n", encoding="utf-8")
    return str(tmp_path / "c.csv")


def statuses(output: Path | str) -> list[tuple[str, str | None]]:
    table = pq.read_table(output, columns=["status", "error_code"])
    return list(zip(table["status"].to_pylist(), table["error_code"].to_pylist(), strict=True))


# --- storage --------------------------------------------------------------------------------------------------------


def test_nothing_in_the_parts_folder_is_open_when_it_is_removed(
    catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSE and NFS keep a name for each open file, and a folder with a name in it cannot be removed."""
    open_files: list[str] = []
    remove = storage.remove_empty_folder

    def watched(path: str) -> None:
        links = [
            str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and link.exists()
        ]
        open_files.extend(link for link in links if link.startswith(path))
        remove(path)

    monkeypatch.setattr("singerembed.storage.remove_empty_folder", watched)
    run(catalog, str(tmp_path / "o.parquet"))
    assert open_files == []
    assert not (tmp_path / "o.parquet.parts").exists()


def test_storage_without_mmap_and_without_fsync_of_folders_will_do(
    catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_map, real_fsync = mmap.mmap, os.fsync

    def no_files(descriptor: int, *rest: Any, **options: Any) -> mmap.mmap:
        if descriptor >= 0:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return real_map(descriptor, *rest, **options)

    def no_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real_fsync(descriptor)

    monkeypatch.setattr("singerembed.jobs.crash_journal.mmap.mmap", no_files)
    monkeypatch.setattr("singerembed.storage.os.fsync", no_folders)
    assert run(catalog, str(tmp_path / "o.parquet")).counts.crops == 2
    assert [record.message.count("cannot be mapped") for record in caplog.records] == [1]


def test_storage_without_locks_is_named_with_the_way_out(
    catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OutputError, match="has no locks: write the output to another one"):
        run(catalog, str(tmp_path / "o.parquet"))


@pytest.mark.parametrize("kind", ["a file as a folder", "a name too long", "links in a circle"])
def test_paths_that_can_never_work_are_not_waited_for(
    catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    paths = {"a file as a folder": "a.wav/b.wav", "a name too long": "x" * 300, "links in a circle": "loop"}
    Path(catalog).write_text(f"path\n{paths[kind]}\n", encoding="utf-8")
    pauses: list[float] = []
    monkeypatch.setattr("singerembed.jobs.track.time.sleep", pauses.append)
    run(catalog, str(tmp_path / "o.parquet"), options=RunOptions(retries=2))
    assert statuses(tmp_path / "o.parquet") == [("error", "unreadable")]
    assert pauses == []


def test_trouble_that_passes_is_waited_for(catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """read() fails once in the middle of a recording, as on a share that restarts."""
    real_read, calls = soundfile.SoundFile.read, []

    def read(self: soundfile.SoundFile, *rest: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise soundfile.LibsndfileError(2)
        return real_read(self, *rest, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    monkeypatch.setattr("singerembed.jobs.track.time.sleep", lambda _seconds: None)
    run(catalog, str(tmp_path / "o.parquet"), options=RunOptions(retries=1))
    assert statuses(tmp_path / "o.parquet") == [("ok", None)] * 2
    calls.clear()
    run(catalog, str(tmp_path / "p.parquet"), options=RunOptions(retries=0))
    assert statuses(tmp_path / "p.parquet")[-1] == ("error", "unreadable")


def test_waiting_in_vain_is_bounded_over_the_run(
    catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Path(catalog).write_text("path\n" + "a.wav\n" * 8, encoding="utf-8")
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    def fail(*_rest: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("singerembed.jobs.track.time.sleep", sleep)
    monkeypatch.setattr("singerembed.jobs.track.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("singerembed.audio.recording.open_source", fail)
    monkeypatch.setattr("singerembed.jobs.units.Patience", lambda: Patience(4.0))
    run(catalog, str(tmp_path / "o.parquet"), options=RunOptions(retries=2, workers=1))
    assert statuses(tmp_path / "o.parquet") == [("error", "unreadable")] * 8
    assert clock[0] == 4.5  # three recordings of half a second and a second each
    assert "not waited for any more" in caplog.text


def test_one_row_that_needs_a_package_is_one_error_row(
    catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = (tmp_path / "a.wav").as_uri()
    Path(catalog).write_text(f"path\nhttps://example.org/a.wav\n{uri}\n", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    run(catalog, str(tmp_path / "o.parquet"))
    assert statuses(tmp_path / "o.parquet") == [("error", "unreadable"), ("ok", None), ("ok", None)]
    assert "pip install" in pq.read_table(tmp_path / "o.parquet")["error"][0].as_py()


def test_an_embedding_that_is_not_finite_is_never_ok(
    catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an FP16 engine that overflows on a loud crop."""

    class Overflowing(InstantEngine):
        def embed(self, crops: Any) -> EmbeddedCrops:
            embedded = super().embed(crops)
            embedded.embedding[-1, 7] = np.nan
            return embedded

    monkeypatch.setattr("singerembed.jobs.units.open_engine", Overflowing)
    run(catalog, str(tmp_path / "o.parquet"))
    assert statuses(tmp_path / "o.parquet") == [("error", "not_finite")]
    (text,) = pq.read_table(tmp_path / "o.parquet")["error"].to_pylist()
    assert text.startswith("the engine gave NaN or infinity for crop 1. ")


def test_dsd256_is_embedded(tmp_path: Path) -> None:
    """A DSF file by its specification (Sony, 1.01): 256 times 44.1 kHz, one bit a sample, silence and a slow square."""
    n_bytes = 4096 * 400
    pattern = np.where(np.arange(n_bytes) // 8000 % 2, 0x96, 0x69).astype(np.uint8)
    pattern[np.arange(n_bytes) // 4000 % 2 == 1] = 0x0F
    data = pattern.tobytes()
    fields = [1, 0, 1, 1, 44_100 * 256, 1]
    form = b"fmt " + (52).to_bytes(8, "little") + b"".join(value.to_bytes(4, "little") for value in fields)
    form += (n_bytes * 8).to_bytes(8, "little") + (4096).to_bytes(4, "little") + bytes(4)
    size = 28 + len(form) + 12 + len(data)
    head = b"DSD " + (28).to_bytes(8, "little") + size.to_bytes(8, "little") + bytes(8)
    (tmp_path / "a.dsf").write_bytes(head + form + b"data" + (12 + len(data)).to_bytes(8, "little") + data)
    (tmp_path / "c.csv").write_text("path\na.dsf\n", encoding="utf-8")
    run(str(tmp_path / "c.csv"), str(tmp_path / "o.parquet"))
    assert statuses(tmp_path / "o.parquet") == [("ok", None)]


def test_a_library_that_is_not_there_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("path\n" + "".join(f"{i}.wav\n" for i in range(150)), encoding="utf-8")
    said: list[str] = []
    run(str(tmp_path / "c.csv"), str(tmp_path / "o.parquet"), say=lambda _what, text: said.append(text))
    assert said == ["the first 100 recordings are all missing. Is the library mounted?"]


def test_a_library_that_goes_away_is_warned_of(catalog: str, tmp_path: Path) -> None:
    Path(catalog).write_text("path\na.wav\n" + "gone.wav\n" * 150, encoding="utf-8")
    said: list[str] = []
    run(catalog, str(tmp_path / "o.parquet"), options=RunOptions(retries=0), say=lambda _kind, text: said.append(text))
    assert said[-1] == "up to row 101, 100 recordings are all missing. Is the library mounted?"


@pytest.mark.parametrize(("limit", "failed"), [("3", "4 of"), ("20%", "of 100")])
def test_too_many_errors_end_the_run_and_mended_files_finish_it(
    catalog: str, tmp_path: Path, limit: str, failed: str
) -> None:
    lines = ["a.wav" if i % 3 else "late.wav" for i in range(150)]
    Path(catalog).write_text("path\n" + "\n".join(lines) + "\n", encoding="utf-8")
    output = str(tmp_path / "o.parquet")
    command = ["run", catalog, output, "--crops", "1", "--unit-minutes", "8"]
    result = CliRunner().invoke(cli, [*command, "--max-errors", limit])
    assert result.exit_code == 1
    assert failed in result.stderr
    assert "Finished units are safe" in result.stderr
    (tmp_path / "late.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    assert CliRunner().invoke(cli, command).exit_code == 3  # the units before have their error rows
    assert CliRunner().invoke(cli, [*command, "--retry-errors"]).exit_code == 0
    assert statuses(output) == [("ok", None)] * 150
    assert CliRunner().invoke(cli, [*command, "--max-errors", "100%"]).exit_code == 2


@pytest.mark.parametrize("limit", ["5%", "0%"])
def test_a_share_of_few_recordings_counts_at_the_end(catalog: str, tmp_path: Path, limit: str) -> None:
    Path(catalog).write_text("path\na.wav\n" + "late.wav\n" * 3 + "a.wav\n\n\n", encoding="utf-8")
    output = tmp_path / "o.parquet"
    command = ["run", catalog, str(output), "--retries", "0", "--crops", "1", "--max-errors", limit]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 1
    assert "3 of 5 recordings failed, the last one row 4" in result.stderr
    assert not output.exists()
    (tmp_path / "late.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    assert CliRunner().invoke(cli, command).exit_code == 0
    with Path(catalog).open("a", encoding="utf-8") as file:
        file.write("missing.wav\n")
    assert CliRunner().invoke(cli, [*command, "--update"]).exit_code == 3  # a night's few are no share


# --- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", ["<&-", "2>&-", ">&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(catalog: str, tmp_path: Path, closed: str) -> None:
    command = f"exec {sys.executable} -m singerembed run {catalog} {tmp_path}/o.parquet {closed}"
    assert subprocess.run(["bash", "-c", command], capture_output=True, check=False).returncode == 0
    assert statuses(tmp_path / "o.parquet") == [("ok", None)] * 2


def test_a_reader_of_notes_that_goes_away_costs_nothing(catalog: str, tmp_path: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m singerembed run {catalog} {tmp_path}/o.parquet 2>&1 | head -c 1"
    assert subprocess.run(["bash", "-c", command], capture_output=True, check=False).returncode == 0


def test_what_libraries_print_does_not_reach_stdout(catalog: str, tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from singerembed.jobs import track\n"
        "real = track.open_recording\n"
        "def noisy(*rest, **options):\n"
        "    os.write(1, b'a library prints')\n"
        "    return real(*rest, **options)\n"
        "track.open_recording = noisy\n"
        "from singerembed.cli.main import cli\n"
        "cli(['run', *sys.argv[1:], '--json'])\n"
    )
    for number, more in enumerate(([], ["-v"])):
        command = [sys.executable, "-c", code, catalog, str(tmp_path / f"{number}.parquet"), *more]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(result.stdout)["crops"] == 2


def test_a_log_that_cannot_be_written_is_named_and_given_up(catalog: str, tmp_path: Path) -> None:
    command = [*COMMAND, catalog, str(tmp_path / "o.parquet"), "--log-json", "/dev/full"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stderr.count("cannot write to the log /dev/full (No space left on device)") == 1


def test_names_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "caf\u00e9.wav", 0.1 * np.random.default_rng(0).standard_normal(44_100), 44_100)
    (tmp_path / "c\u00e9.csv").write_text("path\ncaf\u00e9.wav\n", encoding="utf-8")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [*COMMAND, str(tmp_path / "c\u00e9.csv"), str(tmp_path / "o.parquet")]
    result = subprocess.run(command, capture_output=True, check=False, env={**os.environ, **locale})
    assert result.returncode == 0, result.stderr
    assert statuses(tmp_path / "o.parquet") == [("ok", None)]


# --- storage that does not answer -----------------------------------------------------------------------------------

HANGING = """
import os, sys, time
from singerembed.jobs import track
real = track.open_recording
def hang(location, *rest, **options):
    if location.endswith("hang.wav"):
        os.read(os.pipe()[0], 1)  # a system call that does not return
    return real(location, *rest, **options)
track.open_recording = hang
from singerembed.cli.main import cli
cli(["run", *sys.argv[1:]])
"""


def test_a_recording_that_hangs_is_an_error_row_and_the_run_goes_on(catalog: str, tmp_path: Path) -> None:
    Path(catalog).write_text("path\na.wav\nhang.wav\nhang.wav\na.wav\n", encoding="utf-8")
    arguments = [catalog, str(tmp_path / "o.parquet"), "--track-timeout", "1", "--workers", "1", "--crops", "1"]
    result = subprocess.run(
        [sys.executable, "-c", HANGING, *arguments], capture_output=True, text=True, check=False, timeout=100
    )
    assert result.returncode == 3
    expected: list[tuple[str, str | None]] = [("ok", None), *[("error", "decode_timeout")] * 2, ("ok", None)]
    assert statuses(tmp_path / "o.parquet") == expected
    assert "does not answer" in pq.read_table(tmp_path / "o.parquet")["error"][1].as_py()
    assert result.stderr.count("row 2, hang.wav, does not return from its storage") == 1


def test_one_signal_ends_a_run_that_hangs(catalog: str, tmp_path: Path) -> None:
    Path(catalog).write_text("path\nhang.wav\n", encoding="utf-8")
    command = [sys.executable, "-c", HANGING, catalog, str(tmp_path / "o.parquet")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "o.parquet.parts" / "in-flight-0").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "The same command goes on from here" in stderr


# --- signals and limits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_the_whole_process_group_is_one_signal(tmp_path: Path, number: signal.Signals, code: int) -> None:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", (0.1 * rng.standard_normal(40 * 44_100)).astype(np.float32), 44_100)
    (tmp_path / "c.csv").write_text("path\n" + "a.wav\n" * 400, encoding="utf-8")
    output, log = tmp_path / "o.parquet", tmp_path / "log.jsonl"
    command = [*COMMAND, str(tmp_path / "c.csv"), str(output), "--unit-minutes", "8", "--log-json", str(log)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(Path(f"{output}.parts").glob("unit-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "The same command goes on from here" in stderr
    assert json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["event"] == "finished"
    assert not list(Path(f"{output}.parts").glob(".*.tmp"))


@pytest.mark.parametrize(
    ("error", "message"),
    [(MemoryError(), "no memory left"), (RuntimeError("can't start new thread"), "no more threads may be started")],
)
def test_limits_are_named_with_what_to_do(
    catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_rest: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr("singerembed.jobs.run.run", fail)
    result = CliRunner().invoke(cli, ["run", catalog, str(tmp_path / "o.parquet")])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Lower --workers" in result.stderr
    assert "mistake in singerembed" not in result.stderr
