"""Scores training checkpoints and two baselines on labelled data. `singerembed evaluate` is the full evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import click
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dct
from tqdm import tqdm

from singerembed.errors import UsageError
from singerembed.model.checkpoint import Checkpoint, load_checkpoint
from singerembed.model.spec import ModelSpec
from singerembed.storage import absolute
from training.augment import Samples
from training.command import command
from training.config import DataConfig, TrainConfig
from training.data import CropDataset
from training.metrics import METRICS, CropLabels, verification_metrics
from training.model import Encoder, MelSpectrogram
from training.recordings import VALIDATION, build_index

N_MFCC = 20

Embedder = Callable[[Samples], NDArray[np.float32]]  # crop [samples] -> embedding [dim]


def mfcc_statistics(pcm: Samples) -> NDArray[np.float32]:
    """Return mean and deviation over time of 20 cepstral coefficients, without the first (level), and their deltas."""
    spec = ModelSpec(name="mfcc", method="mfcc", mel_sample_rate=44_100, mel_fmax=16_000.0)
    power = MelSpectrogram(spec)(torch.from_numpy(pcm)[None])[0].numpy()
    cepstrum = dct(10 * np.log10(power + 1e-10), axis=0, norm="ortho")[1 : N_MFCC + 1]
    tracks = np.concatenate([cepstrum, np.gradient(cepstrum, axis=1)])
    return np.concatenate([tracks.mean(axis=1), tracks.std(axis=1)]).astype(np.float32)


def encoder_embedder(path: str) -> Embedder:
    """Return the encoder of a checkpoint, or a randomly initialised one for an empty path."""
    return embedder(load_checkpoint(path) if path else None)


def embedder(checkpoint: Checkpoint | None) -> Embedder:
    """Return the encoder of a checkpoint, or for None a randomly initialised one."""
    spec = checkpoint.spec if checkpoint else ModelSpec(name="untrained", method="untrained")
    torch.manual_seed(0)
    front_end, encoder = MelSpectrogram(spec), Encoder(spec, normalise=spec.normalise).eval()
    if checkpoint:
        encoder.backbone.load_state_dict(checkpoint.state_dict)

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
    click.echo(f"{'':32}" + "".join(f"{name:>12}" for name in METRICS))
    rows: list[tuple[str, Embedder]] = [("mfcc statistics", mfcc_statistics), ("untrained", encoder_embedder(""))]
    rows += [(path, encoder_embedder(path)) for path in checkpoints]
    for name, embed in rows:
        metrics = score(embed, dataset, standardise=embed is mfcc_statistics)
        click.echo(f"{name[-32:]:32}" + "".join(f"{metrics[key]:12.4f}" for key in METRICS))


if __name__ == "__main__":
    main()
