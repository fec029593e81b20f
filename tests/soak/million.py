"""A million rows, one in a hundred with a defect: python tests/soak/million.py [--rows 1000000]

A hundredth of the rows is spread over every kind of defect, the rest names short recordings. The engine is replaced by
one that answers at once; everything else is the real thing. The counts must add up, and memory must not grow.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import soundfile

from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import run

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.fakes import install_engine

DEFECTS = ("not_found", "no_audio", "decode_failed", "unreadable", "bad_row", "invalid_samples", "truncated")


def make_recordings(folder: Path) -> None:
    noise = (0.1 * np.random.default_rng(0).standard_normal(4_410)).astype(np.float32)
    soundfile.write(folder / "good.wav", noise, 44_100)
    (folder / "no_audio.wav").touch()
    (folder / "decode_failed.wav").write_text("not audio\n" * 50, encoding="utf-8")
    (folder / "unreadable.wav").mkdir()
    soundfile.write(folder / "invalid_samples.wav", np.full(4_410, np.nan, np.float32), 44_100, subtype="FLOAT")
    soundfile.write(folder / "truncated.wav", noise, 44_100)
    content = (folder / "truncated.wav").read_bytes()
    (folder / "truncated.wav").write_bytes(content[:5_000])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    rng = random.Random(0)
    wanted: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_recordings(folder)
        with (folder / "catalog.csv").open("w", encoding="utf-8") as file:
            file.write("track_id,path,start\n")
            for i in range(arguments.rows):
                kind = rng.choice(DEFECTS) if rng.random() < 0.01 else "good"
                wanted[kind] += 1
                start = "soon" if kind == "bad_row" else ""
                file.write(f"{i},{'good' if kind == 'bad_row' else kind}.wav,{start}\n")
        install_engine()
        started = time.monotonic()
        output = folder / "out.parquet"
        options = RunOptions(unit_minutes=4000)
        summary = run(str(folder / "catalog.csv"), str(output), options=options)
        seconds = time.monotonic() - started
        del wanted["good"]
        assert summary.counts.tracks == arguments.rows
        assert dict(summary.counts.errors) == dict(wanted), (summary.counts.errors, wanted)
        rows: Any = duckdb.connect().execute(f"select count(distinct track_id), count(*) from '{output}'").fetchall()[0]
        assert rows[0] == arguments.rows
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
        assert peak is not None
        print(
            f"{arguments.rows:,} tracks, {rows[1]:,} rows, {wanted.total():,} defects all accounted for, "
            f"{seconds:.0f} s, {arguments.rows / seconds:.0f} tracks/s, {int(peak[1]) / 1024:.0f} MB at most"
        )


if __name__ == "__main__":
    main()
