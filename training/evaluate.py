"""Scores training checkpoints and two baselines on labelled data. `singerembed evaluate` is the full evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import click
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from singerembed.errors import UsageError
from singerembed.evaluation.baselines.base import ONLY_LAYER
from singerembed.evaluation.baselines.encoders import untrained_checkpoint
from singerembed.evaluation.baselines.mfcc import MfccModel
from singerembed.model.checkpoint import Checkpoint, load_checkpoint
from singerembed.model.spec import ModelSpec
from singerembed.storage import absolute
from training.augment import Samples
from training.command import command
from training.config import DataConfig, TrainConfig
from training.metrics import METRICS, CropLabels, verification_metrics
from training.model import Encoder, MelSpectrogram
from training.recordings import VALIDATION, build_index
from training.validation import CropDataset

Embedder = Callable[[Samples], NDArray[np.float32]]  # crop [samples] -> embedding [dim]


def mfcc_statistics(n_samples: int) -> Embedder:
    """Return the baseline `mfcc` of `singerembed evaluate`, for crops of `n_samples` samples."""
    model = MfccModel("mfcc", n_samples)
    return lambda pcm: model.embed(pcm[np.newaxis])[ONLY_LAYER][0]


def encoder_embedder(checkpoint: Checkpoint) -> Embedder:
    """Return the encoder of a checkpoint, for crops of any length."""
    front_end, encoder = MelSpectrogram(checkpoint.spec), Encoder(checkpoint.spec, normalise=checkpoint.spec.normalise)
    encoder.backbone.load_state_dict(checkpoint.state_dict)
    encoder.eval()

    @torch.inference_mode()
    def embed(pcm: Samples) -> NDArray[np.float32]:
        return np.asarray(encoder(front_end(torch.from_numpy(pcm)[None]))[0].numpy())

    return embed


def score(embed: Embedder, crops: CropDataset, *, standardise: bool = False) -> dict[str, float]:
    """Return the verification metrics of `embed` on the `crops` that can be read and are not silent.

    `standardise`: scale each dimension to mean 0 and deviation 1 over the crops, for features of different units.
    """
    items = (crops[index] for index in tqdm(range(len(crops)), disable=None))
    embedded = [(item["indices"], embed(item["clips"])) for item in items if item["indices"] >= 0]
    kept = [index for index, _ in embedded]
    labels = CropLabels(crops.labels.singers[kept], crops.labels.recordings[kept])
    if len(set(labels.singers.tolist())) < 2:
        raise UsageError("the data has no two singers with crops that can be read and are not silent")
    embeddings = np.stack([embedding for _, embedding in embedded])
    if standardise:
        embeddings = (embeddings - embeddings.mean(axis=0)) / (embeddings.std(axis=0) + 1e-9)
    return verification_metrics(embeddings, labels)


def labelled_crops(source: str, crops: int, seconds: float | None = None) -> CropDataset:
    """Return `crops` crops per recording of labelled data, `seconds` long (default: the encoder's length)."""
    length = ModelSpec(name="", method="").crop_seconds if seconds is None else seconds
    data = DataConfig(source=source, validation_fraction=0, validation_crops=crops, crop_seconds=length)
    config = TrainConfig(method="", data=data)
    recordings = [replace(each, split=VALIDATION) for each in build_index(config)]
    return CropDataset(recordings, config, seconds)


@command
@click.argument("data")
@click.argument("checkpoints", nargs=-1)
@click.option("--crops", default=4, type=click.IntRange(min=2), help="Of each recording.")
@click.option("--seconds", type=click.FloatRange(min=0.1), help="Of a crop; the encoder's own length if not given.")
def main(data: str, checkpoints: Sequence[str], crops: int, seconds: float | None) -> None:
    """Compare CHECKPOINTS with MFCC statistics and the untrained encoder on the labelled folder or catalogue DATA."""
    dataset = labelled_crops(absolute(data), crops, seconds)
    click.echo(f"{'':32}" + "".join(f"{name:>16}" for name in METRICS))
    mfcc = mfcc_statistics(dataset.n_samples)
    rows = [("mfcc statistics", mfcc), ("untrained", encoder_embedder(untrained_checkpoint()))]
    rows += [(path, encoder_embedder(load_checkpoint(path))) for path in checkpoints]
    for name, embed in rows:
        metrics = score(embed, dataset, standardise=embed is mfcc)
        click.echo(f"{name[-32:]:32}" + "".join(f"{metrics[key]:16.4f}" for key in METRICS))


if __name__ == "__main__":
    main()
