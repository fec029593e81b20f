"""An index under kills: python tests/soak/index_kills.py [--kills 300] [--seed 0]

A library of made-up singers changes night after night: tracks are new, changed, gone or there twice. Each night's
output is indexed by a process that is killed (SIGKILL) at random moments, again and again until one ends. After every
kill the index is what it was or what it will be, opened and asked; in the end it is what it would be without kills.
Above 200 vectors they are quantised, so that files of FAISS are written, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "search"))
from made_library import MadeTrack, made_tracks, write_output

from singerembed.errors import InputError
from singerembed.search import build, nearest
from singerembed.search.query import open_index

State = dict[str, str]  # the fingerprint of each track that counts


def add(output: str, path: str) -> None:
    """Index `output`, in a process of its own."""
    with mock.patch.object(build, "EXACT_ROWS", 200), mock.patch.object(nearest, "EXACT_ROWS", 200):
        build.build_index([output], path)


def state_of(path: Path) -> State | None:
    """What an index holds; None if it is not there. Anything in between raises."""
    try:
        index = open_index(str(path))
    except InputError:
        return None
    tracks = index.stored.tracks
    rows = np.flatnonzero(index.stored.active).tolist()
    names, fingerprints = tracks["track_id"].to_pylist(), tracks["fingerprint"].to_pylist()
    for row in (rows[0], rows[-1]):
        for by in ("track", "crop"):
            assert index.search_track(names[row], by=by).tracks
    assert int(index.stored.profiles.n_tracks.sum()) == len(rows)
    return {names[row]: fingerprints[row] for row in rows}


def change(library: list[MadeTrack], night: int, rng: random.Random) -> list[MadeTrack]:
    """The library a day later."""
    new = made_tracks(6, 4, 3, seed=night, first=100 * night)
    changed = {rng.randrange(len(library)) for _ in range(5)}
    later = [
        dataclasses.replace(track, crops=rng.choice(new).crops[:2]) if i in changed else track
        for i, track in enumerate(library)
    ]
    copies = [dataclasses.replace(rng.choice(later), track_id=f"copy {night} {i}") for i in range(3)]
    del later[rng.randrange(len(later))]
    return [*later, *new, *copies]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    kills = starts = nights = 0
    processes = get_context("forkserver")
    processes.set_forkserver_preload(["faiss", "sklearn.linear_model", "singerembed.search.build"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, twin = folder / "killed.index", folder / "undisturbed.index"
        library = made_tracks(6, 10, 3)
        while kills < arguments.kills:
            if nights % 10 == 9:  # a new index, of a library that is large by now
                for index in (path, twin):
                    index.rename(folder / f"{index.name}.{nights}")
            output = write_output(folder / "night.parquet", library)
            before = state_of(path)
            started = time.monotonic()
            undisturbed = processes.Process(target=add, args=(output, str(twin)))
            undisturbed.start()
            undisturbed.join()
            seconds, after = time.monotonic() - started, state_of(twin)
            while True:
                starts += 1
                process = processes.Process(target=add, args=(output, str(path)))
                process.start()
                process.join(rng.uniform(0, 1.2 * seconds) if kills < arguments.kills else None)
                if process.exitcode is not None:
                    assert process.exitcode == 0
                    break
                process.kill()
                process.join()
                kills += 1
                assert state_of(path) in (before, after), f"night {nights}, kill {kills}"
            assert state_of(path) == after, f"night {nights}"
            assert not list(folder.glob(".killed.index.*"))
            segments = {file.name[:6] for file in path.iterdir() if file.name[:6].isdecimal()}
            assert segments == {file.name[:6] for file in twin.iterdir() if file.name[:6].isdecimal()}
            library = change(library, nights + 1, rng)
            nights += 1
    print(f"{nights} nights, {starts} starts, {kills} kills: after each the index was what it was, or what it would be")


if __name__ == "__main__":
    main()
