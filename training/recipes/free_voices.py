"""Builds the corpus of the bundled checkpoint, `free-voices`: many synthetic singers from a few free voices.

    apt install $(python -m training.recipes.free_voices --packages)
    python -m training.recipes.free_voices corpus --jobs 2

writes `corpus/train/SPEAKER-TRACT/CLIP.flac`, and for other speakers `corpus/validation/` (nothing here reads it),
`corpus/test/spoken/` and `corpus/test/sung/` (to report), all of them folders that `training.train` and
`singerembed evaluate` read. Everything is a function of the seed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from singerembed.errors import UsageError
from training.command import command
from training.recipes.channel import through_channel
from training.recipes.singing import Speech, Tract, analyse, draw_notes, draw_phrases, draw_tract, render
from training.recipes.speakers import PACKAGES, SAMPLE_RATE, SPEAKERS, Samples, Speaker, read_lines, read_speech
from training.synthetic import draw_singer, sing

CLIP_SECONDS = 4.5  # a bit longer than a crop of the encoder
# Speakers of several languages, both sexes and all kinds of source, chosen before any training.
VALIDATION = ("klettres-de", "klettres-it", "klettres-uk", "ktuberling-ca", "asterisk-carlo", "festival-czech_ph")
TEST = (
    "klettres-en_GB", "klettres-hu", "klettres-he", "ktuberling-fr", "ktuberling-sl", "asterisk-june",
    "festival-czech_dita", "flite-awb",
)  # fmt: skip
_HELD_OUT_TRACTS = 4  # including the speaker's own
_HELD_OUT_CLIPS = 6
_SUNG = 0.65  # share of sung training clips; the rest is running speech
_SPOKEN_SECONDS = 240.0  # of a speaker's recordings, to cut the clips as recorded from
_SPOKEN_OCTAVES = 0.3  # their speed is up to 2 to this, or its reciprocal


@command
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--packages", is_flag=True, help="Print the Debian packages that are needed, and end.")
@click.option("--root", default="/", type=click.Path(path_type=Path), help="File system the packages lie in.")
@click.option("--tracts", default=16, help="Identities made out of each training speaker.")
@click.option("--clips", default=5, help="Of each identity.")
@click.option("--speeds", default=8, help="Of each speaker's own recordings, beside; each is an identity.")
@click.option("--synthetic", default=160, help="Synthetic singers (training.synthetic) to train on beside them.")
@click.option("--seed", default=0, help="Of everything.")
@click.option("--jobs", default=1, help="Processes.")
def main(
    folder: Path | None,
    packages: bool,
    root: Path,
    tracts: int,
    clips: int,
    speeds: int,
    synthetic: int,
    seed: int,
    jobs: int,
) -> None:
    """Build the corpus of free voices in FOLDER."""
    if packages:
        click.echo(" ".join(PACKAGES))
        return
    if folder is None:
        raise UsageError("name the FOLDER to build the corpus in, or ask for --packages")
    make = partial(_make_speaker, folder=folder, root=root, tracts=tracts, clips=clips, seed=seed)
    record = partial(_make_spoken, folder=folder, root=root, speeds=speeds, clips=clips, seed=seed)
    synthesise = partial(_make_synthetic, folder=folder, clips=clips, seed=seed)
    with multiprocessing.get_context("spawn").Pool(jobs) if jobs > 1 else nullcontext() as pool:
        each: Any = pool.imap_unordered if pool else map
        single = [speaker for speaker in SPEAKERS if not speaker.many]  # one person's recordings can be made to sing
        for _ in tqdm(each(make, single), total=len(single), unit=" speakers", disable=None):
            pass
        training = [speaker for speaker in SPEAKERS if speaker.name not in {*TEST, *VALIDATION}]
        for _ in tqdm(each(record, training), total=len(training), unit=" speakers", disable=None):
            pass
        for _ in tqdm(each(synthesise, range(synthetic)), total=synthetic, unit=" singers", disable=None):
            pass
    singers = len(list((folder / "train").iterdir()))
    click.echo(f"wrote    {folder}: {singers} singers to train on")


def _make_speaker(speaker: Speaker, *, folder: Path, root: Path, tracts: int, clips: int, seed: int) -> None:
    number = SPEAKERS.index(speaker)
    speech = cache(lambda: analyse(*read_speech(speaker, root, np.random.default_rng((seed, number)))))
    if speaker.name in TEST:
        _make_identities(speaker, speech, folder / "test" / "spoken", 1, _HELD_OUT_CLIPS, 0.0, (seed, number, 1))
        _make_identities(
            speaker, speech, folder / "test" / "sung", _HELD_OUT_TRACTS, _HELD_OUT_CLIPS, 1.0, (seed, number, 2)
        )
    elif speaker.name in VALIDATION:
        _make_identities(
            speaker, speech, folder / "validation", _HELD_OUT_TRACTS, _HELD_OUT_CLIPS, 1.0, (seed, number, 3)
        )
    else:
        _make_identities(speaker, speech, folder / "train", tracts, clips, _SUNG, (seed, number, 4))


def _make_identities(
    speaker: Speaker,
    speech: Callable[[], Speech],
    folder: Path,
    tracts: int,
    clips: int,
    sung: float,
    seed: tuple[int, ...],
) -> None:
    """Write the clips of `tracts` identities; the first has the speaker's own tract."""
    for number in range(tracts):
        home = folder / f"{speaker.name}-{number:02d}"
        if len(list(home.glob("*.flac"))) >= clips:
            continue  # made by an earlier run
        tract = draw_tract(speech(), np.random.default_rng((*seed, number)), octaves=0.42 if number else 0.0)
        _write_clips(home, clips, partial(_voice, speech(), tract, sung), (*seed, number))


def _make_spoken(speaker: Speaker, *, folder: Path, root: Path, speeds: int, clips: int, seed: int) -> None:
    """Write clips of a training speaker's own recordings; each identity has another speed, the first its own."""
    number = SPEAKERS.index(speaker)
    clips *= speaker.plenty
    homes = [folder / "train" / f"{speaker.name}-spoken-{speed:02d}" for speed in range(speeds)]
    if all(len(list(home.glob("*.flac"))) >= clips for home in homes):
        return  # made by an earlier run
    rng = np.random.default_rng((seed, number, 6))
    if speaker.many:
        lines = read_lines(speaker, root, rng, speeds * clips)
    else:
        lines = [read_speech(speaker, root, rng, _SPOKEN_SECONDS * speaker.plenty)[0]]
    for index, home in enumerate(homes):
        rng = np.random.default_rng((seed, number, 7, index))
        speed = float(2 ** rng.uniform(-_SPOKEN_OCTAVES, _SPOKEN_OCTAVES)) if index else 1.0
        _write_clips(home, clips, partial(_excerpt, lines, speed), (seed, number, 8, index))


def _excerpt(lines: Sequence[Samples], speed: float, rng: np.random.Generator) -> Samples:
    """Return a random stretch of one of `lines` played at `speed`, float64 of CLIP_SECONDS, with its peak at 1.

    A shorter line is repeated.
    """
    pcm = lines[int(rng.integers(len(lines))) if len(lines) > 1 else 0]
    length = round(CLIP_SECONDS * SAMPLE_RATE * speed)
    start = int(rng.integers(max(1, len(pcm) - length)))
    clip = soxr.resample(pcm[start : start + length], SAMPLE_RATE * speed, SAMPLE_RATE)
    clip = np.resize(clip, round(CLIP_SECONDS * SAMPLE_RATE))
    return np.asarray(clip / max(float(np.abs(clip).max()), 1e-9))


def _make_synthetic(number: int, *, folder: Path, clips: int, seed: int) -> None:
    singer = draw_singer(np.random.default_rng((seed, number)))
    home = folder / "train" / f"synthetic-{number:03d}"
    _write_clips(home, clips, partial(sing, singer, CLIP_SECONDS), (seed, number, 5))


def _write_clips(
    home: Path, clips: int, voice: Callable[[np.random.Generator], Samples], seed: tuple[int, ...]
) -> None:
    """Write the missing clips, each through its own channel."""
    home.mkdir(parents=True, exist_ok=True)
    for clip in range(clips):
        path = home / f"{clip}.flac"
        if not path.exists():
            rng = np.random.default_rng((*seed, clip))
            pcm = through_channel(voice(rng), rng)
            temporary = path.with_suffix(".part")
            soundfile.write(temporary, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
            temporary.replace(path)


def _voice(speech: Speech, tract: Tract, sung: float, rng: np.random.Generator) -> Samples:
    draw = draw_notes if rng.random() < sung else draw_phrases
    score = draw(speech, tract, CLIP_SECONDS, rng)
    return render(speech, tract, score, effort_db=float(rng.normal(0, 1.5)))


if __name__ == "__main__":
    main()
