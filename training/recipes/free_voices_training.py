"""Trains the bundled checkpoint, `free-voices`, on the corpus of free_voices, on one GPU or on a CPU.

    python -m training.recipes.free_voices corpus --jobs 2
    python -m training.teacher corpus/train targets.parquet --teacher campplus --window 4.5
    python -m training.recipes.bands bands
    python -m training.recipes.separated corpus/train bands spleeter.engine corpus/separated
    python -m training.recipes.free_voices_training corpus/train targets.parquet new.pt --backing bands \
        --separated corpus/separated --device cpu --minutes 80

The corpus lies in memory (memory_corpus.py). The encoder learns the teacher's embeddings of the recordings, their
similarities, and their neighbours in the corpus from ever longer crops, each through a channel of its own, some over a
band; the rate falls to 0 at the end of the time. In the end the last layer is whitened (last_layer.py).

On a GPU, `--ask-teacher` asks the teacher about every crop instead, played at a speed of its own (crop_teacher.py).
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from singerembed.errors import SingerEmbedError, UsageError
from singerembed.model.checkpoint import Checkpoint, load_checkpoint
from singerembed.model.spec import ModelSpec
from training import files, losses
from training.command import command
from training.model import Encoder, MelSpectrogram
from training.recipes.crop_teacher import CropTeacher
from training.recipes.last_layer import whitened
from training.recipes.memory_corpus import Corpus
from training.targets import read_targets
from training.train import keep_freed_memory

NORMALISE = 9.2  # constant, so that the encoder sees the level of a band, which differs between catalogues
# Share of the time, seconds of a crop.
PHASES = ((0.5, 1.6), (0.8, 2.4), (1.0, 4.0))
PHASES_WITH_TEACHER = ((0.3, 2.4), (1.0, 4.0))  # which knows less of a shorter crop
AVERAGED_STEPS = 200  # of the exponential moving average of the weights, which is what is written
RELATIONS = 5.0  # weight of the similarities, beside the cosine's 1
NEIGHBOURS, TEMPERATURE = 0.2, 0.1  # weight of the divergence among all targets of the corpus
WARMUP = 0.03  # share of the time
FROZEN = 4  # first stages, of 9, of a checkpoint that a CPU starts from: 1.4 times as many steps in the time
WHITENED_ON = 3000  # crops
LOG_EVERY_STEPS = 100


@command
@click.argument("corpus", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("targets", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--minutes",
    default=6.0,
    type=click.FloatRange(0, min_open=True),
    help="Of training; the rate falls to 0 at their end.",
)
@click.option("--batch-seconds", default=80.0, help="Of audio in a batch; steps count for more than their size.")
@click.option("--rate", default=1e-3, help="Highest learning rate.")
@click.option("--backing", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of bands.")
@click.option(
    "--separated",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the same recordings from under a band (separated.py), to train on as well.",
)
@click.option(
    "--initial", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Checkpoint to start from."
)
@click.option("--ask-teacher", is_flag=True, help="About every crop, at a speed of its own; for a GPU.")
@click.option("--snapshots", default=0, help="Checkpoints to write on the way, beside TARGET.")
@click.option("--device", default="cuda", help="Of torch.")
@click.option("--seed", default=1, help="Of everything that is drawn.")
def main(
    corpus: Path,
    targets: Path,
    target: Path,
    minutes: float,
    batch_seconds: float,
    rate: float,
    backing: Path | None,
    separated: Path | None,
    initial: Path | None,
    ask_teacher: bool,
    snapshots: int,
    device: str,
    seed: int,
) -> None:
    """Train on the folder CORPUS towards the table TARGETS and write a checkpoint with halved weights to TARGET."""
    torch.manual_seed(seed)
    keep_freed_memory()
    where = _usable(device)
    folders = [corpus, separated] if separated else [corpus]
    table = read_targets(str(targets))
    voices = Corpus(folders, table, backing, where, CropTeacher(table, where) if ask_teacher else None)
    phases = PHASES_WITH_TEACHER if ask_teacher else PHASES
    run = _Run(where, rate, initial, voices.targets)
    facts = {"method": "teacher", "recipe": Path(__file__).stem, "seed": seed, "minutes": minutes, "rate": rate} | {
        "batch_seconds": batch_seconds, "ask_teacher": ask_teacher, "hours": round(voices.seconds / 3600, 2)
    }  # fmt: skip

    def write(checkpoint: Checkpoint, path: Path) -> None:
        files.save_checkpoint(checkpoint, facts | {"step": run.steps, "crops": run.crops}, path, half=True)

    started, snapshot = time.monotonic(), 1
    while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
        seconds = next(length for share, length in phases if done < share)
        pcm, targets_of_crops = voices.draw(round(batch_seconds / seconds), round(seconds * run.spec.sample_rate))
        terms = run.step(pcm, targets_of_crops, done)
        if run.steps % LOG_EVERY_STEPS == 0:
            if not all(math.isfinite(float(value)) for value in terms.values()):
                raise SingerEmbedError(f"the training has diverged after {run.steps} steps: give a lower --rate")
            words = ", ".join(f"{name} {float(value):.3f}" for name, value in terms.items())
            click.echo(f"step     {run.steps} at {done:.0%}, crops of {seconds} s, {run.crops} crops: {words}")
        if snapshot <= snapshots and done > snapshot / (snapshots + 1):
            write(run.averaged(), target.with_stem(f"{target.stem}_{snapshot}"))
            snapshot += 1
    write(run.averaged(), target.with_stem(f"{target.stem}_raw"))
    embeddings = run.embed(voices, WHITENED_ON, batch_seconds)
    if not np.isfinite(embeddings).all():
        raise SingerEmbedError("the training has diverged: give a lower --rate. Nothing was whitened")
    write(whitened(run.averaged(), embeddings, rank=voices.targets.shape[1]), target)
    click.echo(f"wrote    {target} after {run.steps} steps, {run.crops} crops")


def _usable(device: str) -> torch.device:
    """Return torch's device of that name. Raises UsageError if it cannot be used here."""
    try:
        where = torch.device(device)
        torch.zeros(1, device=where)
    except (RuntimeError, AssertionError) as exc:
        reason = str(exc).splitlines()[0]
        raise UsageError(f"--device {device} cannot be used here ({reason}); --device cpu can") from exc
    return where


class _Run:
    """The encoder and its optimiser."""

    def __init__(self, device: torch.device, rate: float, initial: Path | None, targets: Tensor) -> None:
        """`targets`: of all recordings, [n, dim]."""
        self.spec = ModelSpec(name="free-voices", method="teacher", normalise=NORMALISE)
        self.steps = self.crops = 0
        self._device, self._rate = device, rate
        self._map = losses.orthonormal_map(targets.shape[1], self.spec.embedding_dim).to(device)
        self._bank = targets @ self._map
        self._mel = MelSpectrogram(self.spec).to(device)
        self._encoder = Encoder(self.spec, normalise=NORMALISE, dropout=0.0, stochastic_depth_prob=0.0)
        if initial:
            self._encoder.backbone.load_state_dict(load_checkpoint(str(initial)).state_dict)
            for stage in range(FROZEN if device.type == "cpu" else 0):  # their batch norms go on taking statistics
                self._encoder.backbone.get_submodule(f"features.{stage}").requires_grad_(False)
        self._encoder.to(device)
        self._optimiser = torch.optim.AdamW(self._encoder.parameters(), lr=rate, weight_decay=1e-2, fused=True)
        self._average = {name: tensor.clone() for name, tensor in self._encoder.backbone.state_dict().items()}

    def step(self, pcm: Tensor, target: Tensor, done: float) -> dict[str, Tensor]:
        """Take one step. Return the terms of the loss."""
        factor = done / WARMUP if done < WARMUP else (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP))) / 2
        for group in self._optimiser.param_groups:
            group["lr"] = self._rate * max(factor, 1e-3)
        with torch.no_grad():
            power = self._mel(pcm)
        # On a CPU bfloat16 is slower.
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            embedding = self._encoder(power)
        embedding = embedding.float()
        mapped = target @ self._map
        terms = {
            "teacher": losses.towards(embedding, mapped),
            "relations": RELATIONS * losses.relations(embedding, target),
            "neighbours": NEIGHBOURS * losses.neighbours(embedding, mapped, self._bank, temperature=TEMPERATURE),
        }
        self._optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._encoder.parameters(), 1.0)
        self._optimiser.step()
        self.steps += 1
        self.crops += len(pcm)
        self._take_average()
        return {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def _take_average(self) -> None:
        state = self._encoder.backbone.state_dict()
        floats = [name for name, tensor in state.items() if tensor.is_floating_point()]
        averages = [self._average[name] for name in floats]
        # One call for all: on a GPU one for each takes longer than the step.
        torch._foreach_lerp_(averages, [state[name] for name in floats], 1 / min(AVERAGED_STEPS, self.steps))
        for name in state.keys() - floats:
            self._average[name].copy_(state[name])

    @torch.inference_mode()
    def embed(self, voices: Corpus, crops: int, batch_seconds: float) -> NDArray[np.float32]:
        """Return embeddings of drawn crops of the encoder's length, by the average of the weights: [crops, dim]."""
        self._encoder.backbone.load_state_dict(self._average)
        self._encoder.eval()
        size = max(1, round(batch_seconds / self.spec.crop_seconds))
        batches = (voices.draw(min(size, crops - i), self.spec.crop_samples)[0] for i in range(0, crops, size))
        return torch.cat([self._encoder(self._mel(pcm)) for pcm in batches]).cpu().numpy()

    def averaged(self) -> Checkpoint:
        """Return the encoder with the average of the weights."""
        return Checkpoint(self.spec, {name: tensor.cpu() for name, tensor in self._average.items()}, "", {})


if __name__ == "__main__":
    main()
