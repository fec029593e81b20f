"""Voices as a separator gives them back from under a band, to train an encoder for `run --separate`.

    python -m training.recipes.separated corpus/train bands spleeter.engine corpus/separated --share 0.25

mixes a share of the clips below `corpus/train` with bands (bands.py), separates them, and writes the voices under the
clips' names, so that the table of targets of the clips holds for them (`--separated` of free_voices_training.py).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import soundfile
from numpy.typing import NDArray
from tqdm import tqdm

from singerembed.engine.file import read_separator_file
from singerembed.engine.separator import Separator
from singerembed.errors import UsageError
from training.command import command
from training.recipes.bands import mixed
from training.recipes.speakers import SAMPLE_RATE

Samples = NDArray[np.float32]
_VOICE_OVER_BAND_DB = (-6.0, 12.0)
_QUIET = 1e-7  # mean square, full scale 1, below which nothing is mixed or kept


@command
@click.argument("corpus", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("backing", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("separator", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--share", default=0.25, help="Of the clips.")
@click.option("--seed", default=1, help="Of everything that is drawn.")
def main(corpus: Path, backing: Path, separator: Path, folder: Path, share: float, seed: int) -> None:
    """Mix clips of CORPUS with bands of the folder BACKING, separate them, and write the voices to FOLDER."""
    clips = [path.relative_to(corpus) for path in sorted(corpus.rglob("*.flac"))]
    bands = sorted(backing.glob("*.flac"))
    if not clips or not bands:
        raise UsageError(f"no FLAC file is below {corpus}, or none in {backing}")
    voices = Separator(read_separator_file(str(separator)))
    chosen = np.random.default_rng(seed).permutation(len(clips))[: round(share * len(clips))].tolist()

    def write(number: int) -> None:
        target = folder / clips[number]
        if target.exists():  # of an earlier run
            return
        rng = np.random.default_rng((seed, number))
        voice = _read(corpus / clips[number])
        band = _read(bands[rng.integers(len(bands))])
        if min(np.square(voice).mean(), np.square(band).mean()) < _QUIET:
            return
        separated = through_separator(voice, band, voices, rng)
        if np.square(separated).mean() < _QUIET:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".part")
        soundfile.write(temporary, 0.9 * separated / np.abs(separated).max(), SAMPLE_RATE, format="FLAC")
        temporary.replace(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in tqdm(pool.map(write, chosen), total=len(chosen), unit=" clips", disable=None):
            pass


def through_separator(voice: Samples, band: Samples, separator: Separator, rng: np.random.Generator) -> Samples:
    """Return `voice`, float32 [samples], as `separator` gives it back from under a random stretch of `band`.

    Raises ValueError if the separator's segments are shorter.
    """
    length = separator.spec.segment_samples(len(voice))
    first = (length - len(voice)) // 2
    start = int(rng.integers(max(1, len(band) - length)))
    played = np.resize(band[start:], length)  # repeated where it is too short
    around = np.pad(voice, (first, length - len(voice) - first))
    stereo = np.repeat(played[:, np.newaxis], separator.spec.channels, axis=1)
    vocals = separator.vocals(mixed(around, stereo, rng.uniform(*_VOICE_OVER_BAND_DB)))
    return np.asarray(vocals.mean(axis=1)[first : first + len(voice)])


def _read(path: Path) -> Samples:
    try:
        pcm, _ = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as exc:
        raise UsageError(f"{path} cannot be read: {exc}. Remove it, or build the corpus again") from exc
    return np.asarray(pcm[:, 0])


if __name__ == "__main__":
    main()
