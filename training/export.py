"""Exports training checkpoints to the project's own layout or to that of the official release."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from singerembed.errors import CheckpointError, OutputError, UsageError
from singerembed.model.checkpoint import Checkpoint, load_checkpoint
from singerembed.model.mel import mel_basis
from singerembed.model.spec import ModelSpec
from singerembed.storage import absolute, publishing, writing
from training import files
from training.command import command
from training.evaluate import encoder_embedder, labelled_crops

LAST_WEIGHT, LAST_BIAS = "classifier.1.weight", "classifier.1.bias"
CENTRED_ON = 1000  # recordings, at most, of which a crop each makes the mean


@command
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--layout", type=click.Choice(["singerembed", "official"]), default="singerembed", help="Of TARGET.")
@click.option("--centre", metavar="DATA", help="Subtract the mean embedding of this folder or catalogue's recordings.")
@click.option("--half", is_flag=True, help="Round weights to FP16: half the size. Layout singerembed only.")
def main(source: Path, target: Path, layout: str, centre: str | None, half: bool) -> None:
    """Export the encoder of a training checkpoint SOURCE (runs/x/last.ckpt) to TARGET.

    Layout singerembed: one file with the encoder's weights, its spec and the facts of its training. Layout official: a
    folder with model.pt and hyperparams.yaml, which the authors' code loads. With --centre (the training data) the mean
    is folded into the bias of the last layer, so that all embeddings come out centred, at no cost.

    \b
    python -m training.export runs/byol/last.ckpt byol.pt
    python -m training.export runs/byol/last.ckpt released/byol --layout official
    """
    checkpoint = load_checkpoint(str(source))
    if centre is not None:
        checkpoint = centred(checkpoint, absolute(centre))
    if layout == "official":
        if half:
            raise UsageError("--half is for --layout singerembed; the official code expects FP32")
        export_official(checkpoint, target)
        if checkpoint.spec.normalise != "crop":
            click.echo(
                f"note     trained with log-mel spectrograms divided by {checkpoint.spec.normalise}, which the official"
                " layout cannot say: its readers divide by a maximum",
                err=True,
            )
    else:
        files.save_checkpoint(checkpoint, training_facts(source), target, half=half)
    click.echo(f"wrote    {target}")


def training_facts(source: Path) -> dict[str, Any]:
    """Return the training metadata of the Lightning checkpoint `source`, as JSON types.

    Of paths only the last part is kept, for privacy. Raises CheckpointError if `source` was not written by
    training.train.
    """
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
        config = content["hyper_parameters"]["config"]
    except (pickle.UnpicklingError, KeyError, TypeError) as exc:
        raise CheckpointError(
            f"{source} was not written by training.train. Other checkpoints need no export: "
            f"singerembed build-engine {source}"
        ) from exc
    return {
        "method": config["method"],
        "epoch": content["epoch"],
        "step": content["global_step"],
        "seed": config["seed"],
        "config": _without_folders(config),
        **content["training"],
    }


def _without_folders(value: Any) -> Any:
    """Return a configuration in which of each path only the last part is kept."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if isinstance(value, str) else value


def centred(checkpoint: Checkpoint, source: str, limit: int = CENTRED_ON) -> Checkpoint:
    """Return the encoder with the mean embedding of recordings in `source` subtracted in the bias of its last layer.

    One crop each of at most `limit` recordings, drawn with a fixed seed. Raises UsageError if none can be used.
    """
    crops = labelled_crops(source, crops=2)  # a dataset has two crops of a recording at least; the first is taken
    chosen = np.random.default_rng(0).permutation(len(crops) // 2)[:limit] * 2
    embed = encoder_embedder(checkpoint)
    items = (crops[int(index)] for index in tqdm(chosen, desc="centring", unit=" crops", disable=None))
    embeddings = [embed(item["clips"]) for item in items if item["indices"] >= 0]
    if not embeddings:
        raise UsageError(f"{source}: no recording to centre on can be read and is not silent")
    tensors = dict(checkpoint.state_dict)
    tensors[LAST_BIAS] = tensors[LAST_BIAS] - torch.from_numpy(np.mean(embeddings, axis=0, dtype=np.float64)).float()
    words = f"{len(embeddings)} crops of {Path(source).name}"
    return replace(checkpoint, state_dict=tensors, spec=replace(checkpoint.spec, centred_on=words))


def export_official(checkpoint: Checkpoint, target: Path) -> None:
    """Write a folder in the official layout. Raises OutputError if `target` is a file or cannot be written.

    The official code divides the log-mel by the maximum over its batch; with single crops that equals the spec's
    "crop".
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; the official layout is a folder")
    with writing(str(target)):
        target.mkdir(parents=True, exist_ok=True)
    spec = checkpoint.spec
    encoder = {f"encoder.net.2.{name}": tensor for name, tensor in files.dense(checkpoint.state_dict).items()}
    files.save({**_official_front_end(spec), **encoder}, target / "model.pt")
    hyperparams = {
        "feature_extractor": {"spec_layer": "melspectogram", "n_fft": spec.n_fft, "hop_length": spec.hop_samples},
        "encoder": {"backbone": spec.backbone, "pretrained": False, "embedding_dim": spec.embedding_dim},
    }
    path = str(target / "hyperparams.yaml")
    with writing(path), publishing(path) as temporary:
        Path(temporary).write_text(yaml.safe_dump(hyperparams), encoding="utf-8")


def _official_front_end(spec: ModelSpec) -> dict[str, Tensor]:
    """Return the tensors of nnAudio's MelSpectrogram: windowed sines and cosines, the window, and the mel basis."""
    sample = np.arange(spec.n_fft)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * sample / spec.n_fft)
    phase = 2 * np.pi / spec.n_fft * (np.arange(spec.n_fft // 2 + 1)[:, None] * sample % spec.n_fft)
    kernels = {
        "mel_basis": mel_basis(spec),
        "stft.wsin": (np.sin(phase) * window)[:, None, :],
        "stft.wcos": (np.cos(phase) * window)[:, None, :],
        "stft.window_mask": window[None, :, None],
    }
    prefix = "feature_extractor.spec_layer."
    return {f"{prefix}{name}": torch.from_numpy(kernel.astype(np.float32)) for name, kernel in kernels.items()}


if __name__ == "__main__":
    main()
