"""What a band costs, and what separation gives back: equal error rates on made mixes, and where nobody sings.

python -m benchmarks.mixes CATALOG SEPARATOR [--engine FILE] [--song-column song] [--font FILE.sf2] [--folder DIR]

CATALOG is a CSV of isolated voices with the columns path and singer. Each recording is mixed with a band of its own
(bands.py) at +6, 0 and -6 dB; pairs of crops of one song are left out. Results of `--folder` are kept and used again.
"""

from __future__ import annotations

import argparse
import csv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import soundfile
from numpy.typing import NDArray

from benchmarks.command import errors_on_one_line
from benchmarks.trials import Trials
from benchmarks.voices import RATE, Voice, digest, make_once, read_voices
from singerembed.jobs.options import DEFAULT_MIN_VOCALS_DB, RunOptions
from singerembed.jobs.run import run
from training.recipes import bands

LEVELS = {"clean": None, "+6 dB": 6.0, "0 dB": 0.0, "-6 dB": -6.0}
EVERY_CROP_DB = -199.0
FIRST_SEED = 0


def make(recordings: list[Voice], folder: Path) -> None:
    """Write the mixes, the voices and the bands alone, and a catalogue of each."""
    names = {name: folder / name.replace(" ", "") for name in [*LEVELS, "band alone"]}
    for path in names.values():
        path.mkdir(parents=True)
    for i, recording in enumerate(recordings):
        voice = recording.samples()
        accompaniment = bands.band(len(voice) / RATE, seed=FIRST_SEED + i)
        for name, level in LEVELS.items():
            mix = voice if level is None else bands.mixed(voice, accompaniment, level)
            soundfile.write(names[name] / f"{i:04d}.flac", mix, RATE)
        alone = 0.9 * accompaniment / np.abs(accompaniment).max()
        soundfile.write(names["band alone"] / f"{i:04d}.flac", alone, RATE)
    for path in names.values():
        with (path / "catalog.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "singer", "song"])
            writer.writerows([f"{i:04d}.flac", each.singer, each.song] for i, each in enumerate(recordings))


def embed(folder: Path, engine: str | None, separator: str | None) -> dict[str, Any]:
    output = folder / ("separated.parquet" if separator else "plain.parquet")
    options = RunOptions(separate=separator, min_vocals_db=EVERY_CROP_DB)
    run(str(folder / "catalog.csv"), str(output), engine=engine, options=options)
    table = pq.read_table(output)
    return {name: table[name].to_pylist() for name in table.column_names}


def error_rate(rows: dict[str, Any], wanted: set[tuple[object, object]], limit: float) -> tuple[float, int]:
    """The equal error rate in percent, and the number, of the crops `wanted` whose voice is not below `limit` dB.

    The mean of the embeddings is subtracted before cosines are taken.
    """
    kept = [
        i
        for i, key in enumerate(zip(rows["path"], rows["crop"], strict=True))
        if key in wanted and rows["status"][i] == "ok" and rows.get("vocal_ratio", [0.0] * (i + 1))[i] >= limit
    ]
    embedding: NDArray[np.float64] = np.array([rows["embedding"][i] for i in kept], np.float64)
    embedding -= embedding.mean(axis=0)
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    trials = Trials(*([rows[name][i] for i in kept] for name in ("singer", "song")))
    return trials.rate(unit @ unit.T), len(kept)


@errors_on_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalog")
    parser.add_argument("separator")
    parser.add_argument("--engine")
    parser.add_argument("--song-column", default="song")
    parser.add_argument("--font", default=bands.SOUND_FONT)
    parser.add_argument("--folder", default="mixes", type=Path)
    arguments = parser.parse_args()
    bands.SOUND_FONT = arguments.font
    recordings = read_voices(arguments.catalog, arguments.song_column)
    made_of = {
        "catalog": digest(arguments.catalog),
        "song_column": arguments.song_column,
        "font": arguments.font,
        "first_seed": FIRST_SEED,
    }
    make_once(arguments.folder, made_of, partial(make, recordings))

    ratios: dict[str, NDArray[np.float64]] = {}
    wanted: set[tuple[object, object]] = set()
    for name in [*LEVELS, "band alone"]:
        folder = arguments.folder / name.replace(" ", "")
        separated = embed(folder, arguments.engine, arguments.separator)
        ratios[name] = np.array([r for r in separated["vocal_ratio"] if r is not None], np.float64)
        if name == "band alone":
            continue
        plain = embed(folder, arguments.engine, None)
        if name == "clean":  # crops in which somebody sings, of every condition
            keys = zip(plain["path"], plain["crop"], plain["status"], strict=True)
            wanted = {(path, crop) for path, crop, status in keys if status == "ok"}
        before, n = error_rate(plain, wanted, EVERY_CROP_DB)
        after, m = error_rate(separated, wanted, EVERY_CROP_DB)
        heard, k = error_rate(separated, wanted, DEFAULT_MIN_VOCALS_DB)
        line = f"{name:<12} EER {before:5.1f} % of {n} crops   separated {after:5.1f} % of {m}"
        print(f"{line}   those at {DEFAULT_MIN_VOCALS_DB:g} dB or above {heard:5.1f} % of {k}", flush=True)
    print()
    for name, values in ratios.items():
        quartiles = np.percentile(values, [5, 25, 50, 75, 95]).round(1)
        print(f"{name:<12} voice over mixture, dB, percentiles 5 25 50 75 95: {quartiles}")
    for limit in (-8, -10, -12, -15, -20):
        heard = "  ".join(f"{name} {100 * (values >= limit).mean():5.1f} %" for name, values in ratios.items())
        print(f"--min-vocals {limit:>4}: taken for sung   {heard}")
    for name in list(LEVELS)[1:]:
        sung = ratios[name]
        area = (sung[:, np.newaxis] > ratios["band alone"]).mean()
        print(f"{name:<12} against bands alone: area under the ROC curve {area:.3f}")


if __name__ == "__main__":
    main()
