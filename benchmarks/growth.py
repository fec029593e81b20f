"""Measures one point of the growth curve and prints JSON: python -m benchmarks.growth TRACKS [--start-only]"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from benchmarks.fakes import InstantEngine, install_engine
from singerembed.errors import InterruptedRun
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import run


def main() -> None:
    """Run over a catalogue that repeats one short recording."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tracks", type=int)
    parser.add_argument("--start-only", action="store_true", help="Stop after the first crop.")
    arguments = parser.parse_args()
    install_engine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        soundfile.write(folder / "a.wav", np.full(4_410, 0.1, np.float32), 44_100)
        with (folder / "catalog.csv").open("w", encoding="utf-8") as file:
            file.write("track_id,path,artist\n")
            for i in range(arguments.tracks):
                file.write(f"{i},a.wav,somebody or other {i % 1000}\n")
        started = time.perf_counter()
        figures: dict[str, float] = {"tracks": arguments.tracks}
        try:
            run(
                str(folder / "catalog.csv"), str(folder / "out.parquet"), options=RunOptions(unit_minutes=4000),
                stop=lambda: 15 if arguments.start_only and InstantEngine.first_crop else 0,
            )  # fmt: skip
            figures["tracks_per_second"] = arguments.tracks / (time.perf_counter() - started)
        except InterruptedRun:
            figures["first_crop_seconds"] = InstantEngine.first_crop - started
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
        figures["peak_mb"] = int(peak[1]) / 1024 if peak else 0.0
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
