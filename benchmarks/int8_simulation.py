"""What 8-bit integers in the encoder's 1 x 1 convolutions would cost in accuracy, simulated in torch.

python -m benchmarks.int8_simulation CHECKPOINT --calibrate FOLDER --labelled SOURCE [--song-column song]

Expansions, projections and the head read activations of 8 bits with a zero point and weights of 8 bits with a scale for
each output channel; the rest stays FP32. FOLDER: recordings of voices, a folder for each singer, to measure the ranges
of activations on. SOURCE: a catalogue or folder of other singers, to measure equal error rates on: of all pairs of crops
of two recordings, or of two songs if the catalogue has such a column.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from singerembed.audio.crops import CropPlan, read_crops
from singerembed.audio.limits import TimeLimit
from singerembed.audio.recording import open_recording
from singerembed.engine.build import fold_batch_norm
from singerembed.engine.torch import EncoderNet, load_encoder
from singerembed.evaluation.data import Recording, read_labelled
from singerembed.evaluation.metrics import bootstrap_over_singers, equal_error_rate
from singerembed.model.checkpoint import load_checkpoint
from singerembed.model.mel import MelExtractor
from singerembed.model.spec import ModelSpec

Floats = NDArray[np.float32]
_LEVELS = 255
_SAMPLE = 1 << 15  # activations kept of each crop and layer for the choice of a range
_REPLICATES = 1000


@dataclass(frozen=True)
class Variant:
    """A way to choose the range of the activations that a convolution reads."""

    name: str
    clip: str  # "max", "percentile", "error" (least squares), all of calibration, or "crop": the crop's own
    by_channel: bool = False  # a scale for each input channel, of its maximum, which the weights take in
    first: int = 0  # bottleneck from which on 8 bits are used


VARIANTS = (
    Variant("range of calibration", "max"),
    Variant("99.99th percentile of calibration", "percentile"),
    Variant("least squared error on calibration", "error"),
    Variant("range of the crop", "crop"),
    Variant("the same, FP32 up to bottleneck 3.1", "crop", first=5),
    Variant("least squared error, FP32 up to 3.1", "error", first=5),
    Variant("a scale for each input channel", "percentile", by_channel=True),
    Variant("the same, FP32 up to 3.1", "percentile", by_channel=True, first=5),
)


class Observed:
    """Activations that a convolution reads, as calibration has seen them."""

    def __init__(self, channels: int) -> None:
        self.low, self.high = torch.zeros(channels), torch.zeros(channels)
        self.values: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self.low = torch.minimum(self.low, x.amin((0, 2, 3)))
        self.high = torch.maximum(self.high, x.amax((0, 2, 3)))
        flat = x.flatten()
        self.values.append(flat[torch.randint(len(flat), (_SAMPLE,))])

    def bounds(self, clip: str, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the range of the activations divided by `scale`, [channels, 1, 1]."""
        low, high = (self.low / scale[:, 0, 0]).min(), (self.high / scale[:, 0, 0]).max()
        if clip == "max" or len(scale) > 1 and scale.std() > 0:
            return low, high
        values = torch.cat(self.values)
        if clip == "percentile":
            ends = np.quantile(values.numpy(), [1e-4, 1 - 1e-4])
            return torch.tensor(min(0.0, ends[0])), torch.tensor(ends[1])
        shares = torch.linspace(0.2, 1, 33)
        errors = [((rounded(values, low * s, high * s) - values) ** 2).mean() for s in shares]
        best = shares[int(torch.stack(errors).argmin())]
        return low * best, high * best


def rounded(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round to 256 levels of which one is zero, and clip to [low, high]."""
    step = (high - low).clamp_min(1e-12) / _LEVELS
    zero = (-low / step).round()
    return ((x / step).round() + zero).clamp(0, _LEVELS).sub(zero).mul(step)


def rounded_weights(weights: Tensor) -> Tensor:
    step = weights.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12) / 127
    return (weights / step).round() * step


def pointwise(encoder: EncoderNet) -> list[tuple[int, nn.Conv2d]]:
    """The convolutions to quantise, each with the number of its bottleneck; the head counts as one more."""
    found: list[tuple[int, nn.Conv2d]] = []
    blocks = [block for stage in encoder.net.features[1:-1] for block in stage]
    for i, block in enumerate(blocks):
        parts = [part[0] for part in block.block if isinstance(part, nn.Sequential)]
        found += [(i, part) for part in parts if part.kernel_size == (1, 1)]
    return [*found, (len(blocks), encoder.net.features[-1][0])]


def log_mels(recordings: list[Recording], spec: ModelSpec, count: int | None) -> Iterator[tuple[int, Floats]]:
    """Yield the number of its recording and the spectrogram of each loud crop."""
    mel = MelExtractor(spec)
    plan = CropPlan(spec.crop_samples, spec.crop_samples, count)
    for i, recording in enumerate(recordings):
        with open_recording(recording.location, spec.sample_rate, TimeLimit(600)) as reader:
            for block in read_crops(reader, plan, 4):
                yield from ((i, one) for one in mel.log_mel(block.pcm).mel)


def embed(encoder: EncoderNet, crops: list[Floats]) -> NDArray[np.float64]:
    with torch.inference_mode():
        rows = [encoder(torch.from_numpy(one[np.newaxis]))[0].numpy() for one in crops]
    return np.stack(rows).astype(np.float64)


def observe(encoder: EncoderNet, crops: list[Floats]) -> list[Observed]:
    layers = [layer for _, layer in pointwise(encoder)]
    observed = [Observed(layer.in_channels) for layer in layers]
    torch.manual_seed(0)
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, o=one: o.add(inputs[0]))
        for layer, one in zip(layers, observed, strict=True)
    ]
    embed(encoder, crops)
    for hook in hooks:
        hook.remove()
    return observed


def quantise(encoder: EncoderNet, observed: list[Observed], variant: Variant) -> EncoderNet:
    """Make the encoder's 1 x 1 convolutions round their weights and what they read, in place."""
    for (bottleneck, layer), seen in zip(pointwise(encoder), observed, strict=True):
        if bottleneck < variant.first:
            continue
        scale = torch.ones(layer.in_channels, 1, 1)
        if variant.by_channel:
            scale = torch.maximum(-seen.low, seen.high).clamp_min(1e-6)[:, None, None]
            # A part of the range alone: with all of it, weights of channels with rare peaks take all levels.
            weights = layer.weight.detach().abs().amax((0, 2, 3))[:, None, None].clamp_min(1e-6)
            scale = (scale / weights).sqrt()
        low, high = seen.bounds(variant.clip, scale) if variant.clip != "crop" else (None, None)
        layer.weight.data = rounded_weights(layer.weight.data * scale)

        def before(_: nn.Module, inputs: tuple[Tensor], s=scale, low=low, high=high) -> Tensor:
            x = inputs[0] / s
            return rounded(x, x.amin().clamp_max(0) if low is None else low, x.amax() if high is None else high)

        layer.register_forward_pre_hook(before)
    return encoder


def scores(rows: NDArray[np.float64], centred: bool) -> NDArray[np.float64]:
    rows = rows - rows.mean(axis=0) if centred else rows
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows @ rows.T)


class Trials:
    """All pairs of crops of two songs."""

    def __init__(self, singer: NDArray[np.int64], song: NDArray[np.int64]) -> None:
        first, second = np.triu_indices(len(singer), 1)
        apart = song[first] != song[second]
        self.first, self.second = first[apart], second[apart]
        self.singer, self.song = singer, song
        self.same = singer[self.first] == singer[self.second]

    def rate(self, matrix: NDArray[np.float64], drawn: NDArray[np.int64] | None = None) -> float:
        """Equal error rate in %. `drawn`: how often each singer was drawn by a bootstrap."""
        weights = None
        if drawn is not None:
            a, b = drawn[self.singer[self.first]], drawn[self.singer[self.second]]
            weights = (a * np.where(self.same, 1, b)).astype(float)
        return 100 * equal_error_rate(self.same, matrix[self.first, self.second], weights).rate

    def difference(self, matrix: NDArray[np.float64], reference: NDArray[np.float64]) -> str:
        """The difference of two equal error rates, with the 95 % interval over singers."""

        def statistic(drawn: NDArray[np.int64]) -> float:
            return self.rate(matrix, drawn) - self.rate(reference, drawn)

        interval = bootstrap_over_singers(statistic, int(self.singer.max()) + 1, replicates=_REPLICATES)
        point = self.rate(matrix) - self.rate(reference)
        return f"{point:+.2f} ({interval.low:+.2f} to {interval.high:+.2f})"

    def nearest(self, matrix: NDArray[np.float64]) -> float:
        """How often the nearest crop of another song is the singer's, in %."""
        hidden = np.where(self.song[:, np.newaxis] == self.song, -np.inf, matrix)
        return float(100 * (self.singer[hidden.argmax(axis=1)] == self.singer).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--calibrate", required=True, metavar="FOLDER")
    parser.add_argument("--labelled", required=True, metavar="SOURCE")
    parser.add_argument("--song-column", default="song")
    parser.add_argument("--crops", type=int, default=100, help="Crops to calibrate on, each of another recording.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(arguments.checkpoint)
    recordings = read_labelled(arguments.calibrate).recordings
    chosen = np.random.default_rng(0).permutation(len(recordings))[: arguments.crops]
    calibration = [crop for _, crop in log_mels([recordings[i] for i in chosen], checkpoint.spec, 1)]
    labelled = read_labelled(arguments.labelled).recordings
    found = list(log_mels(labelled, checkpoint.spec, None))
    singer = np.unique([labelled[i].singer for i, _ in found], return_inverse=True)[1]
    songs = [f"{labelled[i].singer}\0{labelled[i].conditions.get(arguments.song_column, i)}" for i, _ in found]
    trials = Trials(singer, np.unique(songs, return_inverse=True)[1])
    crops = [crop for _, crop in found]

    fresh: Callable[[], EncoderNet] = lambda: fold_batch_norm(load_encoder(checkpoint))  # noqa: E731
    observed = observe(fresh(), calibration)
    exact = embed(fresh(), crops)
    print(f"{len(calibration)} crops of calibration; {len(crops)} crops of {singer.max() + 1} singers", flush=True)
    for centred in (False, True):
        matrix = scores(exact, centred)
        print(f"FP32{', centred' * centred}: EER {trials.rate(matrix):.2f} %, nearest {trials.nearest(matrix):.1f} %")
    for variant in VARIANTS:
        rows = embed(quantise(fresh(), observed, variant), crops)
        cosine = (rows * exact).sum(axis=1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(exact, axis=1)
        text = f"{variant.name}: cosine {np.median(cosine):.4f}, least {cosine.min():.4f}"
        for centred in (False, True):
            ours, reference = scores(rows, centred), scores(exact, centred)
            text += f"; {'centred' if centred else 'cosine'}: EER {trials.difference(ours, reference)}"
            text += f", nearest {trials.nearest(ours) - trials.nearest(reference):+.1f}"
        print(text, flush=True)


if __name__ == "__main__":
    main()
