"""Pairs of crops for training, and the loaders of a run.

All randomness of an item is a function of (seed, epoch, position in the epoch), whichever worker, device or run draws
it: a resumed run sees the same data as an uninterrupted one, and two devices with batches of n the same as one device
with batches of 2 n.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import lightning
import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from singerembed.errors import SingerEmbedError, TrackError, UsageError
from singerembed.output.finished import is_partitioned
from training.augment import Augmenter, Samples
from training.config import DataConfig, TrainConfig
from training.groups import groups
from training.metrics import METRICS, CropLabels, verification_metrics
from training.reading import draw_crop, warn_once
from training.recordings import TRAIN, VALIDATION, Recording
from training.targets import Floats, read_targets, relative_path
from training.validation import CropDataset, ValidationSampler

# A recording that cannot be read, or is silent, is replaced by another, up to this many times; then the run ends.
RECORDINGS_PER_PAIR = 50

_log = logging.getLogger(__name__)


class PairBatch(TypedDict):
    """A collated training batch."""

    clips: Tensor  # float32 [batch, 2, samples]: the two views of each pair
    groups: Tensor  # int64 [batch]: the recording, or the singer with `pairs: singer`
    targets: NotRequired[Tensor]  # float32 [batch, 2, dim]: the teacher's embeddings of the views, of length 1


class CropBatch(TypedDict):
    """A collated validation batch."""

    clips: Tensor  # float32 [batch, samples]
    indices: Tensor  # int64 [batch]: index of the validation crop, -1 if it cannot be used


class PairKey(NamedTuple):
    """Key of a training item, which is a function of key and seed."""

    epoch: int
    position: int
    group: int


# --- training -------------------------------------------------------------------------------------------------------


class PairDataset(Dataset[dict[str, Any]]):
    """Pairs of augmented crops of one recording or one singer."""

    def __init__(self, recordings: Sequence[Recording], config: TrainConfig) -> None:
        """`recordings`: the training split. Raises UsageError if pairs of singers are impossible."""
        self._recordings = recordings
        self._config = config
        self._sample_rate = config.front_end().sample_rate
        self.groups = groups(recordings, by_singer=config.data.pairs == "singer")
        self._variants = _find_variants(recordings, config.data) if config.data.pitch_variants else {}
        self._targets = read_targets(config.teacher.targets) if config.teacher.targets else None
        self._augment = Augmenter(
            config.augment,
            self._sample_rate,
            shift_pitch=not config.data.pitch_variants,
            crop_seconds=config.data.crop_seconds,
        )

    def __getitem__(self, key: PairKey) -> dict[str, Any]:
        """Return `clips`, float32 [2, samples], their `groups` label and, with a teacher, `targets`, float32 [2, dim].

        A group that cannot be read is replaced by a random one. Raises SingerEmbedError after RECORDINGS_PER_PAIR of
        them.
        """
        rng = np.random.default_rng((self._config.seed, key.epoch, key.position))
        group = key.group
        for _ in range(RECORDINGS_PER_PAIR):
            try:
                return {**self._pair(group, rng), "groups": group}
            except TrackError as exc:
                problem = exc
                group = int(rng.integers(len(self.groups)))
        raise SingerEmbedError(
            f"{RECORDINGS_PER_PAIR} recordings drawn one after the other cannot be used (the last: {problem}). "
            "Is the data still there? If it is quiet, lower data.silence_dbfs"
        )

    def _pair(self, group: int, rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
        members = self.groups[group]
        chosen = rng.choice(members, 2, replace=len(members) == 1)
        fastest = self._config.augment.pair_speed
        speed = float(fastest ** rng.uniform(-1, 1)) if fastest > 1 else 1.0
        views = [self._view(int(index), speed, rng, first=not number) for number, index in enumerate(chosen)]
        pair = {"clips": np.stack([pcm for pcm, _ in views])}
        if self._targets is not None:
            pair["targets"] = np.stack([self._target(int(i), at) for i, (_, at) in zip(chosen, views, strict=True)])
        return pair

    def _target(self, index: int, start: float) -> Floats:
        path = relative_path(self._recordings[index].path, self._config.data.source)
        try:
            return self._targets.of_crop(path, start, self._config.data.crop_seconds)  # type: ignore[union-attr]
        except KeyError:
            warn_once(path, f"no windows of it in {self._config.teacher.targets}; another is used instead")
            raise TrackError("silent", f"{path}: no windows of it in teacher.targets") from None

    def _view(self, index: int, speed: float, rng: np.random.Generator, *, first: bool) -> tuple[Samples, float]:
        """Return an augmented crop and its start in seconds."""
        recording = self._recordings[index]
        path = recording.path
        variants = self._variants.get(index)
        if variants and rng.random() < self._config.augment.pitch_probability:
            path = variants[rng.integers(len(variants))]
        n_samples = self._config.crop_samples
        n_read = round(n_samples * speed)
        try:
            pcm, start = draw_crop(recording, path, n_read, self._sample_rate, self._config, rng)
        except TrackError as exc:
            warn_once(path, f"{exc}; another is used instead")
            raise TrackError(exc.code, f"{path}: {exc}") from exc
        if n_read != n_samples:
            faster = soxr.resample(pcm, n_read, n_samples, quality="LQ")[:n_samples]
            pcm = np.pad(faster, (0, n_samples - len(faster)))
        return self._augment(pcm, rng, first=first), start


class PairSampler(Sampler[list[PairKey]]):
    """Yields batches of keys for one device, as a function of seed and step."""

    def __init__(self, dataset: PairDataset, n_recordings: int, config: TrainConfig, devices: int) -> None:
        """Raises UsageError if an epoch has less than one batch, or there is only one group."""
        self._n_groups = len(dataset.groups)
        self._n_pairs = n_recordings * config.data.pairs_per_recording
        self._batch_size = config.data.batch_size
        self._devices = devices
        self._seed = config.seed
        self._rank = 0
        self._step: Callable[[], int] = lambda: 0
        if len(self) == 0:
            raise UsageError(
                f"an epoch has {self._n_pairs} pairs, fewer than a batch of {self._batch_size} on {devices} device(s)."
                " Lower data.batch_size or raise data.pairs_per_recording"
            )
        if self._n_groups == 1:
            raise UsageError("there is only one recording to train on. Add more to --data")

    def follow(self, rank: int, step: Callable[[], int]) -> None:
        """Yield the batches of device `rank` from now on, from the current step of the trainer, `step()`.

        `step` is called when iteration starts, so that it is right in a resumed run, however far workers have
        prefetched.
        """
        self._rank, self._step = rank, step

    def __len__(self) -> int:
        """Return the steps per epoch; an incomplete last batch is dropped."""
        return self._n_pairs // (self._batch_size * self._devices)

    def __iter__(self) -> Iterator[list[PairKey]]:
        """Yield the remaining batches of the epoch."""
        epoch, first = divmod(self._step(), len(self))
        groups = self._epoch(epoch)
        for step in range(first, len(self)):
            start = (step * self._devices + self._rank) * self._batch_size
            yield [
                PairKey(epoch, position, int(groups[position])) for position in range(start, start + self._batch_size)
            ]

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        """Return the group of each pair: permutations of all groups, so that a batch has as many groups as possible."""
        rng = np.random.default_rng((self._seed, epoch))
        rounds = math.ceil(self._n_pairs / self._n_groups)
        return np.concatenate([rng.permutation(self._n_groups) for _ in range(rounds)])


# --- pitch variants -------------------------------------------------------------------------------------------------


def variant_path(data: DataConfig, recording: Recording, number: int) -> Path:
    """Return the path of variant `number` of a recording. Raises UsageError if `data.source` is not a folder."""
    if not Path(data.source).is_dir() or is_partitioned(data.source):
        raise UsageError(f"pitch variants lie beside the recordings of a folder, and {data.source} is not one")
    relative = Path(recording.path).relative_to(data.source)
    return Path(data.pitch_variants) / relative.parent / f"{relative.name}.{number}.flac"


def _find_variants(recordings: Sequence[Recording], data: DataConfig) -> dict[int, list[str]]:
    """Return the existing variants of each recording, by its index. Raises UsageError if there are none at all."""
    found: dict[int, list[str]] = {}
    for index, recording in enumerate(recordings):
        paths = takewhile(Path.exists, (variant_path(data, recording, number) for number in count()))
        found[index] = [str(path) for path in paths]
    if not any(found.values()):
        raise UsageError(
            f"{data.pitch_variants} holds no variants; make them: python -m training.pitch_variants --help"
        )
    return found


# --- loaders ----------------------------------------------------------------------------------------------------------


class _Loading(TypedDict):
    num_workers: int
    persistent_workers: bool
    pin_memory: bool


class PairData(lightning.LightningDataModule):
    """The data loaders of a run."""

    def __init__(self, recordings: Sequence[Recording], config: TrainConfig, devices: int) -> None:
        """`devices`: number over all nodes. Raises UsageError if the recordings do not fit the configuration."""
        super().__init__()
        self._config = config
        training = [each for each in recordings if each.split == TRAIN]
        self._pairs = PairDataset(training, config)
        self._sampler = PairSampler(self._pairs, len(training), config, devices)
        self._crops = CropDataset([each for each in recordings if each.split == VALIDATION], config)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch."""
        return len(self._sampler)

    @property
    def can_validate(self) -> bool:
        """Whether there are at least two validation singers."""
        return len(set(self._crops.labels.singers.tolist())) > 1

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return this device's batches from the trainer's current step on."""
        trainer = self._trainer()
        self._sampler.follow(trainer.global_rank, lambda: trainer.global_step)
        return DataLoader(self._pairs, batch_sampler=self._sampler, **self._loading())

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return this device's share of the validation crops."""
        trainer = self._trainer()
        sampler = ValidationSampler(len(self._crops), trainer.global_rank, trainer.world_size)
        # Validation crops are often longer than training crops, but need no gradients, so the same batch size fits.
        return DataLoader(self._crops, batch_size=self._config.data.batch_size, sampler=sampler, **self._loading())

    def validation_metrics(self, embeddings: NDArray[np.float32], indices: NDArray[np.int64]) -> dict[str, float]:
        """Return the metrics of embeddings [n, dim] of the validation crops `indices`, [n]; duplicates count once.

        They are NaN if too few crops could be read, which should not end a training.
        """
        unique, first = np.unique(indices, return_index=True)
        usable = unique >= 0
        unique, first = unique[usable], first[usable]
        labels = CropLabels(self._crops.labels.singers[unique], self._crops.labels.recordings[unique])
        try:
            return verification_metrics(embeddings[first], labels)
        except ValueError as exc:
            _log.warning("no metrics from %d validation crops: %s", len(first), exc)
            return dict.fromkeys(METRICS, math.nan)

    def _trainer(self) -> lightning.Trainer:
        if self.trainer is None:
            raise RuntimeError("the loaders follow the trainer's step: ask for them in a fit")
        return self.trainer

    def _loading(self) -> _Loading:
        workers = self._config.data.workers
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
