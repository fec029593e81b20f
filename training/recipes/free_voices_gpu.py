"""Trains the bundled checkpoint, `free-voices`, on one GPU within minutes, from the corpus of free_voices.

    pip install resemblyzer
    python -m training.recipes.free_voices corpus --jobs 8
    python -m training.recipes.free_voices_gpu corpus/train free_voices.pt --minutes 6

The corpus lies in the GPU's memory, which does all else (gpu_corpus.py): the targets are those of the very crop, at the
speed it was drawn with. From scratch, on longer and longer crops, towards the target and the similarities of targets,
with the contrastive loss beside them; the rate falls to 0 at the end of the time given.
"""

from __future__ import annotations

import importlib.util
import math
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from singerembed.errors import UsageError
from singerembed.model.checkpoint import Checkpoint
from singerembed.model.spec import ModelSpec
from training import files, losses
from training.command import command
from training.model import Encoder, MelSpectrogram, Projection
from training.recipes.gpu_corpus import Corpus, Targets, through_channel

NORMALISE = 9.2  # constant, so that the encoder sees the level of a band; see free_voices.yaml
# Share of the time, seconds of a crop.
PHASES = ((0.5, 1.6), (0.75, 2.4), (1.0, 4.0))
AVERAGED_STEPS = 200  # of the exponential moving average of the weights, which is what is written
RELATIONS, CONTRASTIVE, TEMPERATURE = 5.0, 0.1, 0.1
WARMUP = 0.03  # share of the time
FITTED_BATCHES = 8
LOG_EVERY_STEPS = 100


@command
@click.argument("corpus", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--minutes", default=6.0, help="Of training; the rate falls to 0 at their end.")
@click.option("--batch-seconds", default=200.0, help="Of audio in a batch; steps count for more than their size.")
@click.option("--rate", default=2e-3, help="Highest learning rate.")
@click.option("--cepstra", default=0.5, help="Weight of cepstral statistics in the target, beside GE2E's embedding.")
@click.option(
    "--ge2e", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="resemblyzer's pretrained.pt."
)
@click.option("--snapshots", default=0, help="Checkpoints to write on the way, beside TARGET.")
@click.option("--device", default="cuda", help="Of torch.")
@click.option("--seed", default=1, help="Of everything that is drawn.")
def main(
    corpus: Path,
    target: Path,
    minutes: float,
    batch_seconds: float,
    rate: float,
    cepstra: float,
    ge2e: Path | None,
    snapshots: int,
    device: str,
    seed: int,
) -> None:
    """Train on the folder CORPUS and write a checkpoint with halved weights to TARGET."""
    torch.manual_seed(seed)
    where = torch.device(device)
    voices = Corpus(corpus, where)
    click.echo(f"corpus   {voices.seconds / 3600:.1f} hours of {voices.n_singers} singers")
    targets = Targets(ge2e or installed_ge2e(), cepstra).to(where)
    run = _Run(where, rate)
    facts = {"method": "teacher", "recipe": Path(__file__).stem, "seed": seed, "minutes": minutes, "rate": rate} | {
        "batch_seconds": batch_seconds, "cepstra": cepstra, "hours": round(voices.seconds / 3600, 2)
    }  # fmt: skip
    started, seconds, snapshot = time.monotonic(), 0.0, 1
    while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
        now = next(length for share, length in PHASES if done < share)
        if now != seconds:
            seconds = now
            samples = round(seconds * run.spec.sample_rate)
            pairs = max(2, round(batch_seconds / seconds / 2))
            targets.fit([voices.draw_pairs(pairs, samples)[0] for _ in range(FITTED_BATCHES)])
        pcm, singers = voices.draw_pairs(pairs, samples)
        terms = run.step(pcm, singers, targets(pcm), done)
        if run.steps % LOG_EVERY_STEPS == 0:
            words = ", ".join(f"{name} {float(value):.3f}" for name, value in terms.items())
            click.echo(f"step     {run.steps} at {done:.0%}, crops of {seconds} s, {run.crops} crops: {words}")
        if snapshot <= snapshots and done > snapshot / (snapshots + 1):
            run.save(target.with_stem(f"{target.stem}_{snapshot}"), facts)
            snapshot += 1
    run.save(target, facts)
    click.echo(f"wrote    {target} after {run.steps} steps, {run.crops} crops")


def installed_ge2e() -> Path:
    """Return the weights in resemblyzer's package. Raises UsageError if it is not installed."""
    spec = importlib.util.find_spec("resemblyzer")
    if spec is None or spec.origin is None:
        raise UsageError("the targets need GE2E's weights: pip install resemblyzer, or give --ge2e")
    return Path(spec.origin).with_name("pretrained.pt")


class _Run:
    """The networks and their optimiser."""

    def __init__(self, device: torch.device, rate: float) -> None:
        self.spec = ModelSpec(name="free-voices", method="teacher", normalise=NORMALISE)
        self.steps = self.crops = 0
        self._device, self._rate = device, rate
        self._mel = MelSpectrogram(self.spec).to(device)
        self._encoder = Encoder(self.spec, normalise=NORMALISE, dropout=0.0, stochastic_depth_prob=0.0).to(device)
        self._projection = Projection(self.spec.embedding_dim, l2_normalise=True).to(device)
        parameters = [*self._encoder.parameters(), *self._projection.parameters()]
        self._optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2, fused=device.type == "cuda")
        self._average = {name: tensor.clone() for name, tensor in self._encoder.backbone.state_dict().items()}

    def step(self, pcm: Tensor, singers: Tensor, target: Tensor, done: float) -> dict[str, Tensor]:
        """Take one step. Return the terms of the loss."""
        factor = done / WARMUP if done < WARMUP else (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP))) / 2
        for group in self._optimiser.param_groups:
            group["lr"] = self._rate * max(factor, 1e-3)
        with torch.no_grad():
            power = self._mel(through_channel(pcm))
        with torch.autocast(self._device.type, torch.bfloat16):
            embedding = self._encoder(power)
        embedding = embedding.float()
        z1, z2 = self._projection(embedding).chunk(2)
        mapped = target @ losses.orthonormal_map(target.shape[1], embedding.shape[1]).to(target)
        contrast = losses.contrastive(
            z1, z2, temperature=TEMPERATURE, negatives=len(z1) - 1, decoupled=True, singers=singers
        )
        terms = {
            "teacher": losses.towards(embedding, mapped),
            "relations": RELATIONS * losses.relations(embedding, target),
            "contrastive": CONTRASTIVE * contrast,
        }
        self._optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._encoder.parameters(), 1.0)
        self._optimiser.step()
        self.steps += 1
        self.crops += len(pcm)
        self._take_average()
        return {name: term.detach() for name, term in terms.items()}

    def _take_average(self) -> None:
        weight = 1 / min(AVERAGED_STEPS, self.steps)
        for name, tensor in self._encoder.backbone.state_dict().items():
            if tensor.is_floating_point():
                self._average[name].lerp_(tensor, weight)
            else:
                self._average[name].copy_(tensor)

    def save(self, target: Path, facts: dict[str, Any]) -> None:
        """Write the average of the weights, halved."""
        tensors = {name: tensor.cpu() for name, tensor in self._average.items()}
        checkpoint = Checkpoint(self.spec, tensors, "", {})
        files.save_checkpoint(checkpoint, facts | {"step": self.steps, "crops": self.crops}, target, half=True)


if __name__ == "__main__":
    main()
