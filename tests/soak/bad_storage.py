"""A run on storage that fails, and with a catalogue that others write to: python tests/soak/bad_storage.py

Storage: recordings lie on a file system that hangs, gives EIO and ESTALE, dies and is mounted again at random moments
(faulty_fs.py), and the run is killed between. It is started again until it ends: then every track must be accounted
for. Then it runs with --retry-errors on sound storage: the rows must equal those of an undisturbed run.

Errors: where the second part of each file gives EIO, its row says that the storage failed, not that the file is bad.

Catalogue: during runs the catalogue is appended to, cut, emptied, replaced and touched at random moments. A run must
end with exit 1, or with the rows of the catalogue as it was; in the end the rows must equal those of an undisturbed
run.

Needs what faulty_fs.py needs, and to be root or in the group fuse.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "audio"
EXAMPLE_MINUTES = 2.0  # in all
OPTIONS = ["--unit-minutes", "40", "--track-timeout", "3", "--retries", "1", "-q"]
FINISHED = {0, 3}


def command(catalog: Path, output: Path, *more: str) -> list[str]:
    """The run, as a user starts it."""
    return [sys.executable, "-m", "singerembed", "run", str(catalog), str(output), *OPTIONS, *more]


def rows_of(output: Path) -> pa.Table:
    """The rows of `output`, without what says how it came to be."""
    return pq.read_table(output).replace_schema_metadata(None)


class Mount:
    """The folder `backing`, mounted as a file system with faults at `path`."""

    def __init__(self, backing: Path, path: Path, faults: Path) -> None:
        self._backing, self.path, self._faults = backing, path, faults
        path.mkdir()
        self._mount()

    def _mount(self) -> None:
        script = str(Path(__file__).with_name("faulty_fs.py"))
        self._process = subprocess.Popen([sys.executable, script, self._backing, self.path, self._faults])
        until = time.monotonic() + 20
        while not os.path.ismount(self.path):
            if self._process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"cannot mount {self.path} (exit {self._process.poll()})")
            time.sleep(0.05)

    def set(self, *faults: str) -> None:
        """Let these faults, and no others, happen from now on."""
        self._faults.write_text(" ".join(faults), encoding="utf-8")

    def die(self, seconds: float) -> None:
        """Kill the file system's process; after `seconds`, mount it again."""
        self._process.kill()
        self._process.wait()
        time.sleep(seconds / 2)  # calls give ENOTCONN
        self.unmount()
        time.sleep(seconds / 2)  # the folder is empty
        self.set()
        self._mount()

    def unmount(self) -> None:
        """End it."""
        self.set()
        subprocess.run(["fusermount", "-uz", self.path], check=False, capture_output=True)
        self._process.kill()
        self._process.wait()


def disturb(process: subprocess.Popen[bytes], mount: Mount, rng: random.Random, happened: Counter[str]) -> None:
    """Let faults happen, one after another with sound storage between them, until `process` ends or is killed."""
    faults: dict[str, Callable[[], None]] = {
        "hang": lambda: mount.set("hang"),
        "eio": lambda: mount.set("eio"),
        "estale": lambda: mount.set("estale"),
        "mount died": lambda: mount.die(rng.uniform(0.1, 3)),
        "run killed": lambda: os.killpg(process.pid, signal.SIGKILL),
    }
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.5, 3))
            return
        name = rng.choice(list(faults))
        happened[name] += 1
        faults[name]()
        if name == "run killed":
            process.wait()
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            # A hang of more than eight seconds outlasts the track timeout and the grace after it.
            process.wait(rng.uniform(0.2, 12 if name == "hang" else 3))
        mount.set()


def try_storage(folder: Path, turns: int, n_faults: int, rng: random.Random) -> None:
    """The first half of what the module says."""
    backing = folder / "library"
    for turn in range(turns):
        shutil.copytree(EXAMPLES, backing / f"{turn:03}")
    mount = Mount(backing, folder / "mounted", folder / "faults")
    catalog, output, plain = folder / "catalog.csv", folder / "out.parquet", folder / "plain.parquet"
    paths = [str(path.relative_to(folder)) for path in sorted(mount.path.rglob("*")) if path.is_file()]
    catalog.write_text("path\n" + "\n".join(paths) + "\n", encoding="utf-8")
    happened, errors = Counter[str](), Counter[str]()
    starts = outputs = 0
    try:
        assert subprocess.run(command(catalog, plain), check=False).returncode in FINISHED
        expected = rows_of(plain)
        while happened.total() < n_faults:
            outputs += 1
            code = -1
            while code not in FINISHED:
                starts += 1
                process = subprocess.Popen(command(catalog, output), start_new_session=True)
                disturb(process, mount, rng, happened)
                code = process.returncode
                mount.set()
                assert code in {*FINISHED, 1, -signal.SIGKILL}, f"exit {code}"
            found = rows_of(output)
            assert dict.fromkeys(found["path"].to_pylist()) == dict.fromkeys(paths), "tracks are missing"
            errors.update(code for code in found["error_code"].to_pylist() if code)
            subprocess.run(command(catalog, output, "--retry-errors"), check=False)
            differ = [
                (one["path"], one["error_code"], other["error_code"])
                for one, other in zip(rows_of(output).to_pylist(), expected.to_pylist(), strict=False)
                if one != other
            ]
            assert rows_of(output).equals(expected), differ[:5]
            output.unlink()
    finally:
        mount.unmount()
    print(
        f"storage: {len(paths)} tracks, {expected.num_rows} rows; {outputs} outputs in {starts} starts, with "
        f"{dict(happened)}; errors before --retry-errors {dict(errors)}; after it, all equal to the undisturbed run",
        flush=True,
    )


def try_errors(folder: Path) -> None:
    """Read recordings whose second part gives EIO: each is decoded or unreadable, by every decoder."""
    mount = Mount(EXAMPLES, folder / "with_errors", folder / "its_faults")
    catalog, rows = folder / "with_errors.csv", 0
    paths = [str(path) for path in sorted(mount.path.iterdir())]
    catalog.write_text("path\n" + "\n".join(paths) + "\n", encoding="utf-8")
    try:
        for more in ([], ["--crops", "2"]):
            plain, output = folder / f"sound{len(more)}.parquet", folder / f"errors{len(more)}.parquet"
            mount.set()
            subprocess.run(command(catalog, plain, *more), check=False)
            mount.set("eio")
            subprocess.run(command(catalog, output, *more), check=False)
            expected = {(row["path"], row["crop"]): row for row in rows_of(plain).to_pylist()}
            for row in rows_of(output).to_pylist():
                rows += row["error_code"] == "unreadable"
                if row["error_code"] is not None:
                    assert row["error_code"] == "unreadable", row
                else:
                    assert row == expected[row["path"], row["crop"]], row
    finally:
        mount.unmount()
    assert rows
    print(f"EIO: {rows} recordings unreadable, and no row of another kind or with other numbers", flush=True)


def try_catalog(folder: Path, turns: int, rounds: int, rng: random.Random) -> None:
    """The second half of what the module says."""
    catalog, output, plain = folder / "written_to.csv", folder / "written_to.parquet", folder / "as_it_was.parquet"
    files = [str(path) for path in sorted(EXAMPLES.iterdir())] * turns
    text = "track_id,path\n" + "".join(f"{i},{path}\n" for i, path in enumerate(files))
    changes: dict[str, Callable[[], object]] = {
        "appended to": lambda: catalog.write_text(text + f"late,{files[0]}\n", encoding="utf-8"),
        "cut": lambda: os.truncate(catalog, rng.randrange(1, len(text))),
        "emptied": lambda: os.truncate(catalog, 0),
        "replaced": lambda: shutil.move(shutil.copy(EXAMPLES.parent / "catalog.csv", folder / "new.csv"), catalog),
        "touched": lambda: os.utime(catalog),
    }
    catalog.write_text(text, encoding="utf-8")
    started = time.monotonic()
    subprocess.run(command(catalog, plain), check=False)
    undisturbed = time.monotonic() - started
    expected = rows_of(plain)
    codes: Counter[str] = Counter()
    for turn in range(rounds):
        name = list(changes)[turn % len(changes)]
        process = subprocess.Popen(command(catalog, output), stderr=subprocess.PIPE)
        time.sleep(rng.uniform(0.5, undisturbed))
        changes[name]()
        said = process.communicate()[1].decode()
        codes[f"{name}: exit {process.returncode}"] += 1
        if process.returncode == 1:
            assert name != "touched", said
            assert "Error: " in said, said
            assert "Traceback" not in said, said
        else:
            assert process.returncode in FINISHED, said
            assert rows_of(output).equals(expected), name
            output.unlink()
        catalog.write_text(text, encoding="utf-8")
    assert subprocess.run(command(catalog, output), check=False).returncode in FINISHED
    assert rows_of(output).equals(expected)
    print(f"catalogue: {len(files)} tracks; {dict(codes)}; in the end, equal to the undisturbed run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="of recordings")
    parser.add_argument("--faults", type=int, default=60, help="of the storage, and kills")
    parser.add_argument("--rounds", type=int, default=10, help="changes of the catalogue")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--separate", metavar="FILE", help="run with this separator")
    arguments = parser.parse_args()
    OPTIONS.extend(["--separate", arguments.separate] if arguments.separate else [])
    rng = random.Random(arguments.seed)
    turns = max(1, round(arguments.minutes / EXAMPLE_MINUTES))
    with tempfile.TemporaryDirectory() as name:
        try_errors(Path(name))
        try_storage(Path(name), turns, arguments.faults, rng)
        try_catalog(Path(name), turns, arguments.rounds, rng)


if __name__ == "__main__":
    main()
