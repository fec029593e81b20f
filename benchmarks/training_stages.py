"""Measures each stage of training on one thread: `python -m benchmarks.training_stages DATA [--seconds 4]`.

Prints JSON: machine, versions, and clips per second of each stage, as median, minimum and maximum over repetitions.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import numpy as np
import torch

from training.augment import Augmenter
from training.command import command
from training.config import AugmentConfig, DataConfig, ModelConfig, TrainConfig
from training.data import PairDataset, PairKey, draw_crop
from training.methods import build_method
from training.recordings import build_index

OFF = {f"{name}_probability": 0.0 for name in ("pitch", "noise", "gain", "mask")}
STAGES = {"pitch": "pitch shift (Praat)", "noise": "noise", "gain": "gain", "mask": "time mask"}


def rate(run: Callable[[], object], clips: int, repetitions: int) -> dict[str, float]:
    """Return clips per second of `run`, which processes `clips` clips: median, minimum and maximum."""
    run()
    rates = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        rates.append(clips / (time.perf_counter() - start))
    return {"median": round(statistics.median(rates), 1), "min": round(min(rates), 1), "max": round(max(rates), 1)}


@command
@click.argument("data")
@click.option("--seconds", default=4.0, show_default=True, help="Of a clip.")
@click.option("--batch", default=16, show_default=True, help="Clips at a time, in the network.")
@click.option("--repetitions", default=7, show_default=True)
def main(data: str, seconds: float, batch: int, repetitions: int) -> None:
    """Measure on the recordings in the folder or catalogue DATA."""
    if batch < 4 or batch % 2:
        raise click.BadParameter("it is trained on as pairs, two at least: give an even number", param_hint="--batch")
    torch.set_num_threads(1)
    section = DataConfig(source=data, validation_fraction=0, crop_seconds=seconds)
    config = TrainConfig(method="contrastive", data=section, model=ModelConfig(initialise="random"))
    recordings = build_index(config)
    sample_rate = config.front_end().sample_rate
    rng = np.random.default_rng(0)

    def read() -> np.ndarray[Any, np.dtype[np.float32]]:
        recording = recordings[rng.integers(len(recordings))]
        return draw_crop(recording, recording.path, config.crop_samples, sample_rate, config, rng)[0]

    results = {"read, avoiding silence": rate(lambda: [read() for _ in range(10)], 10, repetitions)}
    crops = [read() for _ in range(batch)]
    for name, label in STAGES.items():
        one = AugmentConfig.model_validate({**OFF, f"{name}_probability": 1.0})
        augment = partial(Augmenter(one, sample_rate, shift_pitch=True), rng=rng)
        results[label] = rate(partial(lambda each: list(map(each, crops[:10])), augment), 10, repetitions)
    dataset = PairDataset(recordings, config)
    keys = [PairKey(0, position, position % len(dataset.groups)) for position in range(5)]
    results["one worker, everything at the paper's odds"] = rate(
        lambda: [dataset[key] for key in keys], 10, repetitions
    )
    results |= network_rates(config, torch.from_numpy(np.stack(crops)), repetitions)
    machine = {"processor": platform.processor() or platform.machine(), "clip_seconds": seconds, "batch": batch}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "audiomentations")}
    click.echo(json.dumps({"machine": machine, "versions": versions, "clips_per_second": results}, indent=1))


def network_rates(config: TrainConfig, clips: torch.Tensor, repetitions: int) -> dict[str, dict[str, float]]:
    """Return the rates of the front end, of the forward pass, and of a whole training step."""
    method = build_method(config, steps_per_epoch=1)
    optimiser = torch.optim.Adam(method.parameters(), lr=1e-4)
    pairs = {"clips": clips.reshape(-1, 2, clips.shape[-1]), "groups": torch.arange(len(clips) // 2)}

    def step() -> None:
        terms, _ = method.pair_terms(pairs)  # type: ignore[arg-type]
        optimiser.zero_grad()
        torch.autograd.backward(list(terms.values()))
        optimiser.step()

    @torch.inference_mode()
    def embed() -> None:
        method.eval().embed(clips)

    rates = {"mel in torch": rate(lambda: method.feature_extractor(clips), len(clips), repetitions)}
    rates["mel and encoder, forward only"] = rate(embed, len(clips), repetitions)
    method.train()
    rates["training step (forward, backward, Adam)"] = rate(step, len(clips), repetitions)
    return rates


if __name__ == "__main__":
    main()
