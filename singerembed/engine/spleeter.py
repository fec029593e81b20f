"""Spleeter's U-Nets in torch, from a TensorFlow checkpoint: for building a separator engine and for tests.

The network: R. Hennequin et al., "Spleeter: a fast and efficient music source separation tool with pre-trained models",
JOSS 5(50), 2020; A. Jansson et al., "Singing voice separation with deep U-Net convolutional networks", ISMIR 2017.
"""

from __future__ import annotations

import copy
import math

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from singerembed.errors import CheckpointError
from singerembed.model.separator_spec import SpectrogramSpec

_LEVELS = 6
_BATCH_NORM_EPSILON = 1e-3  # Keras's
_LEAK = 0.2
_MASK_EPSILON = 1e-10
# The sum of the window, which no signal within full scale exceeds. At full scale a sine reaches 26,000 in the U-Nets, a
# real mix 2,600, and FP16 65,504; scaled down they would hear something else, because their biases stay.
_LARGEST_HALF = 2048.0
_STEMS = ("vocals", "accompaniment")
_CONVOLUTIONS = _LEVELS + 1  # of one stem, with the last one
_NORMS = 2 * _LEVELS


class _Upsampling(nn.Module):
    """TensorFlow's transposed convolution with stride 2 and "same" padding, which doubles both sides.

    (As a 3x3 convolution of four phases and a shuffle, which has 1.4 times the products, ONNX Runtime is 12 % slower.)
    """

    def __init__(self, kernel: Tensor, bias: Tensor) -> None:
        """`kernel` as TensorFlow has it, [5, 5, outputs, inputs]."""
        super().__init__()
        self.weight = nn.Parameter(kernel.permute(3, 2, 0, 1).contiguous())
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, inputs, height, width] to [batch, outputs, 2 height, 2 width]."""
        # Of the 2n + 3 values of a side, one is cut at its beginning and two at its end.
        return functional.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)[:, :, :-1, :-1]


class _Stem(nn.Module):
    """The U-Net of one stem: magnitudes of a mixture to a mask between 0 and 1, both [batch, 2, frames, bins]."""

    def __init__(self, tensors: dict[str, Tensor], number: int) -> None:
        """`number`: the first stem's variables have no suffix or a low one, the next stem's go on counting."""
        super().__init__()

        def get(layer: str, i: int, *names: str) -> list[Tensor]:
            prefix = f"{layer}_{i}" if i else layer
            return [tensors[f"{prefix}/{name}"] for name in names]

        def convolution(i: int, stride: int, dilation: int) -> nn.Conv2d:
            kernel, bias = get("conv2d", number * _CONVOLUTIONS + i, "kernel", "bias")
            size, _, inputs, outputs = kernel.shape
            layer = nn.Conv2d(inputs, outputs, size, stride, dilation=dilation)
            layer.weight.data, layer.bias = kernel.permute(3, 2, 0, 1).contiguous(), nn.Parameter(bias)
            return layer

        def norm(i: int) -> nn.BatchNorm2d:
            gamma, beta, mean, variance = get(
                "batch_normalization", number * _NORMS + i, "gamma", "beta", "moving_mean", "moving_variance"
            )
            layer = nn.BatchNorm2d(len(gamma), eps=_BATCH_NORM_EPSILON)
            layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var = gamma, beta, mean, variance
            return layer

        up = [get("conv2d_transpose", number * _LEVELS + i, "kernel", "bias") for i in range(_LEVELS)]
        self.down = nn.ModuleList(convolution(i, 2, 1) for i in range(_LEVELS))
        self.down_norm = nn.ModuleList(norm(i) for i in range(_LEVELS - 1))
        self.up = nn.ModuleList(_Upsampling(kernel, bias) for kernel, bias in up)
        self.up_norm = nn.ModuleList(norm(_LEVELS + i) for i in range(_LEVELS))
        self.last = convolution(_LEVELS, 1, 2)

    def forward(self, magnitude: Tensor) -> Tensor:
        """See the class."""
        levels: list[Tensor] = []
        x = magnitude
        for i, down in enumerate(self.down):
            # "Same" padding of TensorFlow: one value before, two behind.
            levels.append(down(functional.pad(x, (1, 2, 1, 2))))
            if i < _LEVELS - 1:  # what follows the last one is not used
                x = functional.leaky_relu(self.down_norm[i](levels[i]), _LEAK)
        x = levels.pop()
        for i, up in enumerate(self.up):
            x = self.up_norm[i](functional.relu(up(x)))
            if levels:
                x = torch.cat([levels.pop(), x], dim=1)
        logits: Tensor = self.last(functional.pad(x, (3, 3, 3, 3)))
        if logits.dtype == torch.float16:
            logits = logits.float()
        # Not torch.sigmoid: ONNX Runtime's has the right absolute error, and a mask is a ratio of small values.
        return torch.reciprocal(1 + torch.exp(-logits))


class SpleeterNet(nn.Module):
    """Both U-Nets, and the share of the voice in each bin: V^2 / (V^2 + A^2)."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.vocals, self.accompaniment = (_Stem(tensors, i) for i in range(len(_STEMS)))
        self._in_fp16 = False

    def in_fp16(self) -> SpleeterNet:
        """Return a copy whose U-Nets compute in FP16 up to their last convolution; masks and their share are FP32."""
        halved = copy.deepcopy(self)
        halved.vocals, halved.accompaniment = halved.vocals.half(), halved.accompaniment.half()
        halved._in_fp16 = True
        return halved

    def forward(self, magnitude: Tensor) -> Tensor:
        """Map magnitudes [batch, 2 channels, frames, bins] to the mask of the voice; frames and bins fill 64."""
        seen = magnitude.clamp(max=_LARGEST_HALF).half() if self._in_fp16 else magnitude
        vocals = (self.vocals(seen) * magnitude) ** 2
        accompaniment = (self.accompaniment(seen) * magnitude) ** 2
        share: Tensor = (vocals + _MASK_EPSILON / len(_STEMS)) / (vocals + accompaniment + _MASK_EPSILON)
        return share


class SpleeterOfSamples(nn.Module):
    """A network of masks with the transform before it and the inverse one behind: samples to samples of the voice.

    For a GPU, where nothing but samples is then copied. A DFT of n = m^2 points is two of m points with twiddle factors
    between them (Cooley and Tukey, 1965), each a product of small matrices. Only the bins that the network sees count.
    """

    half_of_first: Tensor
    window: Tensor
    undo: Tensor
    cos: Tensor
    sin: Tensor
    turn_cos: Tensor
    turn_sin: Tensor

    def __init__(self, network: SpleeterNet, spec: SpectrogramSpec) -> None:
        super().__init__()
        self.network = network
        self._m = m = math.isqrt(spec.n_fft)
        self._columns = spec.n_bins // m
        self._hops = spec.n_fft // spec.hop_samples
        if m * m != spec.n_fft or self._columns * m != spec.n_bins or self._hops * spec.hop_samples != spec.n_fft:
            raise ValueError(f"a transform of {spec.n_fft} points, {spec.n_bins} bins and hops of {spec.hop_samples}")
        numbers = torch.arange(m, dtype=torch.float64)
        window = torch.hann_window(spec.n_fft, dtype=torch.float64)
        # The squares of the window, added at this hop, are a constant; a bin but the first stands for its mirror too.
        undo = window * (2 * spec.hop_samples / (window**2).sum() / spec.n_fft)
        product = torch.outer(numbers, numbers)
        constants = {
            "window": window.reshape(m, m),
            "undo": undo,
            "cos": torch.cos(2 * torch.pi * product / m),
            "sin": torch.sin(2 * torch.pi * product / m),
            "turn_cos": torch.cos(2 * torch.pi * product / spec.n_fft),
            "turn_sin": torch.sin(2 * torch.pi * product / spec.n_fft),
        }
        for name, value in constants.items():
            self.register_buffer(name, value.float())
        self.register_buffer("half_of_first", torch.where(torch.arange(spec.n_bins) == 0, 0.5, 1.0))

    def forward(self, mixture: Tensor) -> Tensor:
        """Map [channels, blocks of a hop, hop], contiguous samples, to the voice in as many."""
        re, im = self._transform(mixture)
        mask = self.network(torch.sqrt(re * re + im * im)[None])[0] * self.half_of_first
        return self._inverse(re * mask, im * mask)

    def _transform(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        """Both parts of the lowest bins, [channels, frames, bins]."""
        m, hops = self._m, self._hops
        frames = torch.cat([mixture[:, i : i + 1 - hops or None] for i in range(hops)], dim=2)
        x = frames.reshape(mixture.shape[0], -1, m, m) * self.window  # sample m r + c in row r and column c
        re, im = self.cos @ x, -(self.sin @ x)
        re, im = re * self.turn_cos + im * self.turn_sin, im * self.turn_cos - re * self.turn_sin
        cos, sin = self.cos[:, : self._columns], self.sin[:, : self._columns]
        re, im = re @ cos + im @ sin, im @ cos - re @ sin  # bin r + m c in row r and column c
        shape = (mixture.shape[0], -1, m * self._columns)
        return re.transpose(2, 3).reshape(shape), im.transpose(2, 3).reshape(shape)

    def _inverse(self, re: Tensor, im: Tensor) -> Tensor:
        m, hops, channels = self._m, self._hops, re.shape[0]
        re, im = (part.reshape(channels, -1, self._columns, m).transpose(2, 3) for part in (re, im))
        cos, sin = self.cos[: self._columns], self.sin[: self._columns]
        re, im = re @ cos - im @ sin, im @ cos + re @ sin
        re, im = re * self.turn_cos - im * self.turn_sin, im * self.turn_cos + re * self.turn_sin
        frames = (self.cos @ re - self.sin @ im).reshape(channels, -1, m * m) * self.undo
        pieces = frames.chunk(hops, dim=2)
        added = [functional.pad(piece, (0, 0, i, hops - 1 - i)) for i, piece in enumerate(pieces)]
        return torch.stack(added).sum(dim=0)


def load_spleeter(tensors: dict[str, NDArray]) -> SpleeterNet:  # type: ignore[type-arg]
    """Build the network of a checkpoint's `tensors`. Raises CheckpointError if they are another network's."""
    try:
        return SpleeterNet({name: torch.from_numpy(value.copy()) for name, value in tensors.items()}).eval()
    except KeyError as exc:
        raise CheckpointError(f"the checkpoint is not Spleeter's for two stems: it has no tensor {exc}") from exc
    except (ValueError, RuntimeError) as exc:
        raise CheckpointError(f"the checkpoint is not Spleeter's for two stems: {exc}") from exc
