"""Shifts the pitch of whole recordings before training, for machines where doing it in training is too slow."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import soundfile
from tqdm import tqdm

from singerembed.errors import OutputError, TrackError
from training.augment import PitchShifter, draw_ratio
from training.command import command
from training.config import SHORTEST_CROP_SECONDS, DataConfig, TrainConfig
from training.data import variant_path
from training.reading import read_crop
from training.recordings import Recording, build_index

# Praat takes about 1 % of a recording's length; a hang takes minutes.
_TIMEOUT_SECONDS = 20.0
_TIMEOUT_PER_SECOND = 1.0
_BLOCK_SAMPLES = 1 << 16  # libsndfile's encoders cannot take whole songs in one call


@command
@click.argument("data", type=click.Path(exists=True, file_okay=False))
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--count", default=4, type=click.IntRange(min=1), help="Variants of each recording.")
@click.option("--jobs", default=2, type=click.IntRange(min=1), help="Recordings at a time.")
@click.option("--seed", default=123, help="Of the ratios.")
def main(data: str, out: str, count: int, jobs: int, seed: int) -> None:
    """Write COUNT pitch-shifted variants of each recording in the folder DATA to the folder OUT.

    Existing variants are kept, so after a crash the same command continues. Train with --set data.pitch_variants=OUT.
    """
    section = DataConfig(
        source=str(Path(data).absolute()),
        pitch_variants=str(Path(out).absolute()),
        validation_fraction=0,
        crop_seconds=SHORTEST_CROP_SECONDS,  # include all recordings that a training may use
    )
    config = TrainConfig(method="", data=section)
    tasks = [(each, number) for each in build_index(config) for number in range(count)]
    shifters = threading.local()

    def make(task: tuple[Recording, int]) -> bool:
        if not hasattr(shifters, "own"):
            shifters.own = PitchShifter()
        return make_variant(*task, config, shifters.own, seed)

    with ThreadPoolExecutor(jobs) as threads:
        made = list(tqdm(threads.map(make, tasks), total=len(tasks), unit=" variants", disable=None))
    click.echo(f"wrote    {sum(made)} variants to {out}; {len(made) - sum(made)} could not be made")


def make_variant(recording: Recording, number: int, config: TrainConfig, shifter: PitchShifter, seed: int) -> bool:
    """Write one variant, unless it exists. Return whether it exists now. Its ratios are a function of seed and name.

    Raises OutputError.
    """
    target = variant_path(config.data, recording, number)
    if target.exists():
        return True
    name = str(target.relative_to(config.data.pitch_variants))
    rng = np.random.default_rng([seed, *name.encode()])
    sample_rate = config.front_end().sample_rate
    try:
        pcm = read_crop(recording.path, recording.start, round(recording.seconds * sample_rate), sample_rate)
    except TrackError:
        return False
    ratio, range_ratio = (
        draw_ratio(each, rng) for each in (config.augment.pitch_ratio, config.augment.pitch_range_ratio)
    )
    timeout = _TIMEOUT_SECONDS + _TIMEOUT_PER_SECOND * recording.seconds
    shifted = shifter.shift(pcm, sample_rate, ratio, range_ratio, int(rng.integers(2**31)), timeout_seconds=timeout)
    if shifted is pcm:
        return False
    encoded = io.BytesIO()  # in memory, because libsndfile reports a full disk only as "System error"
    # 24 bits preserve quiet recordings, and their level for the silence threshold.
    with soundfile.SoundFile(encoded, "w", sample_rate, 1, "PCM_24", format="FLAC") as file:
        for block in _blocks(shifted / max(1.0, float(np.abs(shifted).max()))):
            file.write(block)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}")
        temporary.write_bytes(encoded.getbuffer())
        temporary.replace(target)
    except OSError as exc:
        raise OutputError(f"{target} cannot be written: {exc.strerror}. The same command continues") from exc
    return True


def _blocks(pcm: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(pcm), _BLOCK_SAMPLES):
        yield pcm[start : start + _BLOCK_SAMPLES]


if __name__ == "__main__":
    main()
