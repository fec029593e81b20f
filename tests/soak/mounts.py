"""What a file system is fit for: python tests/soak/mounts.py FOLDER...

In each FOLDER, on a network share say, it is tried to keep the recordings, the catalogue and the output of a run there,
the output as one file and partitioned; to kill a run and go on; and to start two runs at once. Prints a row of a table
for each; the folders are left as they were. Times are ratios to the same on the first FOLDER: name a local one first.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "audio"
REPEATS = 12


def start(catalog: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    """Start a run as a user does."""
    command = [sys.executable, "-m", "singerembed", "run", str(catalog), str(output), "-q", "--unit-minutes", "40"]
    return subprocess.Popen([*command, *more], stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a run. Raises AssertionError with its last line if it did not end well."""
    said = process.communicate()[1]
    assert process.returncode == 0, said.strip().splitlines()[-1]


def rows_of(output: Path) -> pa.Table:
    """The rows of `output` without what depends on the folder."""
    table = pq.read_table(output).replace_schema_metadata(None)
    return table.drop_columns(["path", "track_id"])


def write_catalog(path: Path, audio: Path) -> Path:
    """Write a catalogue of the recordings in `audio`, some times over."""
    files = sorted(str(file) for file in audio.iterdir())
    path.write_text("path\n" + "".join(f"{file}\n" for file in files * REPEATS), encoding="utf-8")
    return path


class Trial:
    """Tries what `folder` can hold; `local` is a scratch folder on this machine's disk."""

    def __init__(self, folder: Path, local: Path, expected: pa.Table) -> None:
        self._folder, self._local, self._expected = folder, local, expected
        self._catalog = local / "catalog.csv"

    def recordings(self) -> None:
        """Read the recordings from the folder."""
        audio = Path(shutil.copytree(EXAMPLES, self._folder / "audio"))
        self._run(write_catalog(self._local / "there.csv", audio), self._local / "there.parquet")

    def catalog(self) -> None:
        """Read the catalogue from the folder."""
        self._run(write_catalog(self._folder / "catalog.csv", EXAMPLES), self._local / "catalog.parquet")

    def output(self) -> None:
        """Write one file to the folder."""
        self._run(self._catalog, self._folder / "out.parquet")

    def partitioned(self) -> None:
        """Write a folder of files to the folder."""
        self._run(self._catalog, self._folder / "parts", "--partitioned")

    def resume(self) -> None:
        """Kill a run that writes to the folder, and go on."""
        process = start(self._catalog, self._folder / "resumed.parquet")
        parts = self._folder / "resumed.parquet.parts"
        until = time.monotonic() + 60
        while not list(parts.glob("unit-*.parquet")) and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        self._run(self._catalog, self._folder / "resumed.parquet")

    def one_at_a_time(self) -> None:
        """Start a second run on the output that a first one is writing."""
        first = start(self._catalog, self._folder / "twice.parquet")
        lock = self._folder / "twice.parquet.parts" / "lock"
        until = time.monotonic() + 60
        while not (lock.exists() and lock.stat().st_size) and time.monotonic() < until:
            time.sleep(0.02)
        said = start(self._catalog, self._folder / "twice.parquet").communicate()[1]
        assert "another run is writing" in said, said.strip() or "not refused"
        finish(first)

    def _run(self, catalog: Path, output: Path, *more: str) -> None:
        finish(start(catalog, output, *more))
        assert rows_of(output).equals(self._expected), "other rows"


def seconds_or_reason(trial: Callable[[], None]) -> float | str:
    """How long `trial` takes, or why it fails."""
    started = time.monotonic()
    try:
        trial()
    except (AssertionError, OSError) as exc:
        return str(exc)
    return time.monotonic() - started


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    names = ["recordings", "catalog", "output", "partitioned", "resume", "one_at_a_time"]
    print("| file system |", " | ".join(name.replace("_", " ") for name in names), "|")
    print("| --- " * (len(names) + 1) + "|")
    first: dict[str, float] = {}
    for argument in sys.argv[1:]:
        kind = subprocess.run(["findmnt", "-no", "FSTYPE", "-T", argument], capture_output=True, text=True, check=False)
        cells = [kind.stdout.strip() or argument]
        with tempfile.TemporaryDirectory() as local, tempfile.TemporaryDirectory(dir=argument) as there:
            plain = Path(local, "plain.parquet")
            finish(start(write_catalog(Path(local, "catalog.csv"), EXAMPLES), plain))
            trial = Trial(Path(there), Path(local), rows_of(plain))
            for name in names:
                result = seconds_or_reason(getattr(trial, name))
                if isinstance(result, float):
                    first.setdefault(name, result)
                    result = f"{result / first[name]:.2f}"
                cells.append(result)
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
