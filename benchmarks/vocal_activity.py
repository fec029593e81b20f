"""What looking for voices first saves in `run --crops N --separate`: separations, and processor time.

python -m benchmarks.vocal_activity CATALOG SEPARATOR [--crops N] [--font FILE.sf2] [--folder DIR] [--case NAME]...

CATALOG is a CSV of isolated voices with the columns path and singer. Each singer's recordings, one after another, make
a track of 96 s over a made band (bands.py): 12 s of intro, 24 s of song, 24 s of solo, 24 s of song, 12 s of outro. The
rival is the same run with a detector that takes every crop for sung, so that crops are tried in their order.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import soundfile
from numpy.typing import NDArray

from benchmarks.command import errors_on_one_line
from benchmarks.measure import processor_seconds
from benchmarks.voices import digest, make_once, read_voices
from singerembed.engine.file import read_separator_file
from singerembed.engine.separator import Separator
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import run
from singerembed.model.spec import ModelSpec
from singerembed.model.vocal_activity import VocalDetector
from training.recipes import bands

SECTIONS = ((12, False), (24, True), (24, False), (24, True), (12, False))  # seconds, and whether somebody sings
CASES = {
    "half sung, 0 dB": 0.0,
    "half sung, +6 dB": 6.0,
    "half sung, -6 dB": -6.0,
    "all sung, 0 dB": 0.0,
    "no voice": 0.0,
}
FIRST_SEED = 7001
_CALLS = 9


def voices_of(catalog: str) -> list[NDArray[np.float32]]:
    """The recordings of each singer, one after another, mono at 44.1 kHz, repeated to 96 s."""
    found: dict[str, list[NDArray[np.float32]]] = {}
    for recording in read_voices(catalog):
        found.setdefault(recording.singer, []).append(recording.samples())
    seconds = sum(length for length, _ in SECTIONS)
    return [np.resize(np.concatenate(found[singer]), seconds * bands.RATE) for singer in sorted(found)]


def make(voices: list[NDArray[np.float32]], case: str, folder: Path) -> None:
    """Write the tracks of `case` and a catalogue of them to `folder`."""
    is_sung = np.concatenate([np.full(length * bands.RATE, sung) for length, sung in SECTIONS])
    for i, whole in enumerate(voices):
        voice = whole if case.startswith("all sung") else np.zeros_like(whole)
        if case.startswith("half sung"):
            voice[is_sung] = whole[: is_sung.sum()]
        band = bands.band(len(voice) / bands.RATE, seed=FIRST_SEED + i)
        mix = 0.9 * band / np.abs(band).max() if case == "no voice" else bands.mixed(voice, band, CASES[case])
        soundfile.write(folder / f"{i}.flac", mix, bands.RATE)
    names = "\n".join(f"{i}.flac" for i in range(len(voices)))
    (folder / "catalog.csv").write_text(f"path\n{names}\n", encoding="utf-8")


def separations(folder: Path, options: RunOptions, name: str) -> tuple[int, int, float]:
    """Run; return how many crops were separated, how many held a voice, and the seconds of processor time."""
    before = time.process_time()
    run(str(folder / "catalog.csv"), str(folder / f"{name}.parquet"), options=options)
    seconds = time.process_time() - before
    status = pq.read_table(folder / f"{name}.parquet", columns=["status"])["status"].to_pylist()
    return len(status) - status.count("silent"), status.count("ok"), seconds


@errors_on_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalog")
    parser.add_argument("separator")
    parser.add_argument("--crops", type=int, default=8)
    parser.add_argument("--font", default=bands.SOUND_FONT)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--case", action="append", choices=CASES)
    arguments = parser.parse_args()
    bands.SOUND_FONT = arguments.font
    voices = voices_of(arguments.catalog)
    made_of = {"catalog": digest(arguments.catalog), "font": arguments.font, "first_seed": FIRST_SEED}
    options = RunOptions(crops=arguments.crops, separate=arguments.separator, restart=True)

    separator, detector = (
        Separator(read_separator_file(arguments.separator)),
        VocalDetector(ModelSpec(name="", method="")),
    )
    crop = voices[0][: 4 * bands.RATE]
    segment = np.zeros((separator.spec.segment_samples(len(crop)), separator.spec.channels), np.float32)
    segment[: len(crop)] = crop[:, np.newaxis]
    look = 1000 * processor_seconds(lambda: detector.score(crop), _CALLS)
    separate = 1000 * processor_seconds(lambda: separator.vocals(segment), _CALLS)
    print(
        f"a look takes {look:.1f} ms of processor time, a separation {separate:.0f} ms: {look / separate:.1%}",
        flush=True,
    )

    with tempfile.TemporaryDirectory() as temporary:
        for case in arguments.case or CASES:
            folder = (arguments.folder or Path(temporary)) / case.replace(" ", "")
            make_once(folder, made_of | {"case": case}, partial(make, voices, case))
            tried, heard, seconds = separations(folder, options, "looked")
            with patch.object(VocalDetector, "score", lambda _self, _crop: 1.0):
                in_order, heard_in_order, seconds_in_order = separations(folder, options, "in_order")
            print(
                f"{case:<16} {len(voices)} tracks: {tried} separations for {heard} voices, {seconds:.0f} s of "
                f"processor time; in order {in_order} for {heard_in_order}, {seconds_in_order:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
