"""Nights of a library that changes: python tests/soak/update.py [--rows 1000000] [--kills 30] [--partitioned]

First a library of many small recordings, with an engine that answers at once, is embedded, changes a little, and is
brought up to date: the time, the bytes written and the memory of both. Then a library of real recordings changes night
after night, and the command is killed at random moments (SIGKILL to the whole process group) and given again. After
every night the rows must be, bit for bit, those of a run over the library as it is then.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import soundfile

from singerembed.engine.base import EmbeddedCrops
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import RunSummary, run
from singerembed.model.mel import Pcm

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import fakes

EXAMPLES = Path(__file__).parents[2] / "examples" / "audio"
SOURCES = 200
FILES_A_FOLDER = 1000
NEW, CHANGED, GONE, MOVED = 1000, 100, 50, 20


class TellingEngine(fakes.InstantEngine):
    """Answers at once, with embeddings that differ where the first samples do."""

    def embed(self, crops: Pcm) -> EmbeddedCrops:
        answer = super().embed(crops)
        answer.embedding[:] = crops[:, 1000:1001].astype(np.float32)[: len(answer.embedding)]
        return answer


def rows_of(output: str) -> dict[tuple[str, int], bytes]:
    """A hash of each row."""
    rows = {}
    for fragment in pq.ParquetDataset(output).fragments:
        for batch in fragment.to_batches(batch_size=4096):
            stored = batch.column("embedding")
            dim, vectors = stored.type.list_size, stored.values.to_numpy(zero_copy_only=False)
            for i, others in enumerate(batch.drop_columns(["embedding"]).to_pylist()):
                first = (stored.offset + i) * dim
                vector = vectors[first : first + dim].tobytes() if stored[i].is_valid else b""
                rows[others["path"], others["crop"]] = hashlib.blake2b(vector + repr(others).encode()).digest()
    return rows


def written_bytes() -> int:
    found = re.search(r"^write_bytes: (\d+)", Path("/proc/self/io").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1])


def peak_megabytes() -> float:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) / 1024


def timed(what: str, library: Path, output: str, options: RunOptions) -> RunSummary:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, started = written_bytes(), time.monotonic()
    summary = run(str(library), output, options=options)
    os.sync()
    seconds = time.monotonic() - started
    print(
        f"{what}: {seconds:.1f} s, {(written_bytes() - before) / 1e6:,.0f} MB written, "
        f"{peak_megabytes():.0f} MB of memory at most; {summary.update or summary.counts.tracks}",
        flush=True,
    )
    return summary


def a_large_library(folder: Path, rows: int, *, partitioned: bool) -> None:
    rng = np.random.default_rng(0)
    sources, library = folder / "sources", folder / "library"
    sources.mkdir()
    for i in range(SOURCES + 1):
        soundfile.write(sources / f"{i}.wav", (0.1 * rng.standard_normal(4_410)).astype(np.float32), 44_100)
    for i in range(rows):
        place = library / f"{i // FILES_A_FOLDER:05d}"
        if i % FILES_A_FOLDER == 0:
            place.mkdir(parents=True)
        os.link(sources / f"{i % SOURCES}.wav", place / f"{i % FILES_A_FOLDER:03d}.wav")
    fakes.install_engine(TellingEngine)
    output = str(folder / ("out" if partitioned else "out.parquet"))
    options = RunOptions(partitioned=partitioned, update=True, embedding_dtype="float16")
    timed(f"all of {rows:,}", library, output, options)
    timed("nothing new", library, output, options)
    chosen = random.Random(0).sample(range(rows), CHANGED + GONE + MOVED)
    for n, i in enumerate(chosen):
        path = library / f"{i // FILES_A_FOLDER:05d}" / f"{i % FILES_A_FOLDER:03d}.wav"
        if n < CHANGED:
            path.unlink()
            shutil.copyfile(sources / f"{SOURCES}.wav", path)
        elif n < CHANGED + GONE:
            path.unlink()
        else:
            path.rename(path.with_suffix(".moved.wav"))
    (library / "new").mkdir()
    for i in range(NEW):
        os.link(sources / f"{i % SOURCES}.wav", library / "new" / f"{i:04d}.wav")
    timed(f"{NEW} new, {CHANGED} changed, {GONE} gone, {MOVED} moved", library, output, options)
    full = str(folder / "full.parquet")
    timed("all of it again", library, full, RunOptions(embedding_dtype="float16"))
    assert rows_of(output) == rows_of(full)
    print("the rows are those of the full run", flush=True)


def change(library: Path, rng: random.Random) -> None:
    """One day in a library."""
    files = sorted(library.rglob("*.*"))
    for path in rng.sample(files, 4):
        path.unlink() if rng.random() < 0.5 else path.rename(path.with_stem(str(rng.randrange(10**6))))
    for _ in range(rng.randrange(12)):
        source = rng.choice(sorted(EXAMPLES.iterdir()))
        shutil.copyfile(source, library / rng.choice("abc") / f"{rng.randrange(10**6)}{source.suffix}")
    for path in rng.sample(sorted(library.rglob("*.*")), 2):
        shutil.copyfile(rng.choice(sorted(EXAMPLES.iterdir())), path)
    (library / "bad.flac").write_bytes(rng.randbytes(1000))


def killed_at_random(folder: Path, kills: int, *, partitioned: bool, seed: int) -> None:
    rng = random.Random(seed)
    library = folder / "music"
    for name in "abc":
        (library / name).mkdir(parents=True)
    for i in range(40):
        source = rng.choice(sorted(EXAMPLES.iterdir()))
        shutil.copyfile(source, library / rng.choice("abc") / f"{i}{source.suffix}")
    output = folder / ("nights" if partitioned else "nights.parquet")
    command = [sys.executable, "-m", "singerembed", "run", str(library), str(output), "--update", "--unit-minutes", "8"]
    command += ["--identity", "audio", "-q", *(["--partitioned"] if partitioned else [])]
    full = folder / "full.parquet"
    killed = nights = starts = 0
    seconds = 15.0
    while killed < kills:
        nights += 1
        while True:
            starts += 1
            process = subprocess.Popen(command, start_new_session=True)
            try:
                code = process.wait(rng.uniform(0.5, seconds) if killed < kills else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
                if rng.random() < 0.2:
                    change(library, rng)  # and the next night begins
                continue
            assert code in {0, 3}, code
            break
        subprocess.run([*command[:4], str(library), str(full), "--restart", "--identity", "audio", "-q"], check=False)
        ours, theirs = rows_of(str(output)), rows_of(str(full))
        differ = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
        assert not differ, f"night {nights} differs in {len(differ)} rows, as {differ[:5]}"
        change(library, rng)
    print(f"{nights} nights, {starts} starts, {killed} kills: after each night the rows of a full run", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--partitioned", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        if arguments.kills:
            killed_at_random(Path(name), arguments.kills, partitioned=arguments.partitioned, seed=arguments.seed)
        if arguments.rows:
            a_large_library(Path(name), arguments.rows, partitioned=arguments.partitioned)


if __name__ == "__main__":
    main()
