"""Times of `singerembed search` on an index: to open it, to look up a track, and to screen an output.

python -m benchmarks.search_times INDEX OUT.parquet

A track of the index is looked up when it has just been opened, and then others, one after another. Screened are
all tracks of OUT.parquet, an output of `singerembed run` with the engine of the index.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from singerembed.search.library import Library
from singerembed.search.query import open_index
from singerembed.search.screening import false_alarms, screen

TIMES = 50


def timed(what: str, call: Callable[[], Any]) -> Any:
    started, busy = time.perf_counter(), time.process_time()
    result = call()
    seconds, cpu = time.perf_counter() - started, time.process_time() - busy
    print(f"{what}: {1000 * seconds:,.1f} ms, {1000 * cpu:,.1f} ms of processor time", flush=True)
    return result


def _imports() -> None:
    import faiss  # noqa: F401

    pa.scalar("")  # imports pandas where it is installed


def look_up(path: str, tracks: Sequence[str]) -> None:
    """Print how long it takes to open the index at `path`, and to look up `tracks` in it."""
    timed("import FAISS, and what Arrow needs", _imports)
    index = timed("open the index", lambda: open_index(path))
    timed("the first --track", lambda: index.search_track(tracks[0]))
    times = []
    for track in tracks:
        started = time.perf_counter()
        index.search_track(track)
        times.append(1000 * (time.perf_counter() - started))
    median, high = np.quantile(times, [0.5, 0.95])
    print(f"further ones: {median:.1f} ms (95 %: {high:.1f} ms)", flush=True)


def screen_tracks(path: str, output: str) -> None:
    """Print how long it takes to screen the tracks of `output`."""
    index = open_index(path)
    timed("false alarms", lambda: false_alarms(index, 0.5))
    n = timed("read the output", lambda: sum(1 for _ in Library([output]).tracks()))
    timed(f"screen its {n:,} tracks", lambda: list(screen(index, output, 0.5)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    parser.add_argument("output")
    arguments = parser.parse_args()
    stored = open_index(arguments.index).stored
    rows = np.random.default_rng(0).choice(np.flatnonzero(stored.active), TIMES, replace=False)
    print(f"{len(stored.vectors['tracks']):,} tracks, {len(stored.vectors['crops']):,} crops")
    look_up(arguments.index, [stored.tracks["track_id"][row].as_py() for row in rows.tolist()])
    screen_tracks(arguments.index, arguments.output)


if __name__ == "__main__":
    main()
