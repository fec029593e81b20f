"""Fast ResNet-34 (Chung et al. 2020, arXiv 2003.11982) and H/ASP (Heo et al. 2020, arXiv 2009.14153).

They are ResNetSE34L and ResNetSE34V2 of the public VoxCeleb trainer (github clovaai/voxceleb_trainer), with the same
tensor names, so that the published weights load unchanged. The trainer's mel spectrogram is torchaudio's, whose
defaults are written out here.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from singerembed import storage
from singerembed.errors import CheckpointError
from singerembed.evaluation.baselines.base import ONLY_LAYER, Crops, ModelFacts, count_parameters

SAMPLE_RATE = 16_000  # Hz
_N_FFT, _WINDOW, _HOP = 512, 400, 160  # samples; the Hamming window is centred in the frame
_EMBEDDING_DIM = 512
_SQUEEZE = 8  # reduction ratio of squeeze and excitation
_BLOCKS = (3, 4, 6, 3)
# Tensors that are computed from the front end's parameters; a file may lack them.
_FRONT_END = ("torchfb.",)


@dataclass(frozen=True)
class Published:
    """A published model of the VoxCeleb trainer."""

    title: str
    url: str
    poster: str


PUBLISHED = {
    "fast-resnet34": Published(
        "Fast ResNet-34", "http://www.robots.ox.ac.uk/~joon/data/baseline_lite_ap.model", "1.4 M / 16 kHz / 512"
    ),
    "h-asp": Published(
        "H/ASP", "http://www.robots.ox.ac.uk/~joon/data/baseline_v2_smproto.model", "8.0 M / 16 kHz / 512"
    ),
}


# --- front end ------------------------------------------------------------------------------------------------------


def _mel_filters(n_mels: int) -> Tensor:
    """Return triangles of height 1 on the HTK mel scale from 0 Hz to half the sample rate, [n_fft / 2 + 1, n_mels]."""
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), n_mels + 2) / 2595) - 1)
    frequencies = np.linspace(0, SAMPLE_RATE / 2, _N_FFT // 2 + 1)[:, np.newaxis]
    rising = (frequencies - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - frequencies) / np.diff(edges)[1:]
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling)).astype(np.float32))


class _Spectrogram(nn.Module):
    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hamming_window(_WINDOW))

    def forward(self, audio: Tensor) -> Tensor:
        return torch.stft(audio, _N_FFT, _HOP, _WINDOW, self.window, pad_mode="reflect", return_complex=True).abs() ** 2


class _MelScale(nn.Module):
    fb: Tensor

    def __init__(self, n_mels: int) -> None:
        super().__init__()
        self.register_buffer("fb", _mel_filters(n_mels))

    def forward(self, power: Tensor) -> Tensor:
        return (power.transpose(1, 2) @ self.fb).transpose(1, 2)


class _MelSpectrogram(nn.Module):
    def __init__(self, n_mels: int) -> None:
        super().__init__()
        self.spectrogram = _Spectrogram()
        self.mel_scale = _MelScale(n_mels)

    def forward(self, audio: Tensor) -> Tensor:
        """Map [batch, samples] to power, [batch, n_mels, frames]."""
        return self.mel_scale(self.spectrogram(audio))  # type: ignore[no-any-return]


class _PreEmphasis(nn.Module):
    flipped_filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flipped_filter", torch.tensor([[[-0.97, 1.0]]]))

    def forward(self, audio: Tensor) -> Tensor:
        return F.conv1d(F.pad(audio[:, None], (1, 0), "reflect"), self.flipped_filter)[:, 0]


def _normalised_log(power: Tensor) -> Tensor:
    """Return log mel with each band at mean 0 and variance 1 over time, [batch, 1, n_mels, frames]."""
    return F.instance_norm((power + 1e-6).log())[:, None]


# --- the residual network -------------------------------------------------------------------------------------------


class _Squeeze(nn.Module):
    """Squeeze and excitation (Hu et al. 2018): weights channels by a function of their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        middle = channels // _SQUEEZE
        self.fc = nn.Sequential(nn.Linear(channels, middle), nn.ReLU(), nn.Linear(middle, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean(dim=(2, 3)))[:, :, None, None]  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Residual block. The first convolution is followed by ReLU, then batch norm, as the weights expect."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = _Squeeze(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != channels:
            short_cut = nn.Conv2d(inputs, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(short_cut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(F.relu(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def _stages(channels: Sequence[int], strides: Sequence[int]) -> list[nn.Sequential]:
    stages, inputs = [], channels[0]
    for outputs, stride, n_blocks in zip(channels, strides, _BLOCKS, strict=True):
        first = _Block(inputs, outputs, stride)
        stages.append(nn.Sequential(first, *(_Block(outputs, outputs, 1) for _ in range(n_blocks - 1))))
        inputs = outputs
    return stages


class FastResNet34(nn.Module):
    """ResNet-34 with a quarter of the channels and self-attentive pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.torchfb = _MelSpectrogram(40)
        self.conv1 = nn.Conv2d(1, 16, 7, stride=(2, 1), padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages((16, 32, 64, 128), (1, 2, 2, 1))
        self.sap_linear = nn.Linear(128, 128)
        self.attention = nn.Parameter(nn.init.xavier_normal_(torch.empty(128, 1)))
        self.fc = nn.Linear(128, _EMBEDDING_DIM)

    def forward(self, audio: Tensor) -> Tensor:
        """Map audio [batch, samples] at 16 kHz to [batch, 512]."""
        x = F.relu(self.bn1(self.conv1(_normalised_log(self.torchfb(audio)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = x.mean(dim=2).transpose(1, 2)  # [batch, frames, channels]
        weight = F.softmax(torch.tanh(self.sap_linear(x)) @ self.attention, dim=1)
        return self.fc((weight * x).sum(dim=1))  # type: ignore[no-any-return]


class HalfResNet34Asp(nn.Module):
    """H/ASP: ResNet-34 with half of the channels and attentive statistics pooling."""

    def __init__(self) -> None:
        super().__init__()
        n_mels, width = 64, 256 * 64 // 8
        self.torchfb = nn.Sequential(_PreEmphasis(), _MelSpectrogram(n_mels))
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(32)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages((32, 64, 128, 256), (1, 2, 2, 2))
        self.attention = nn.Sequential(
            nn.Conv1d(width, 128, 1), nn.ReLU(), nn.BatchNorm1d(128), nn.Conv1d(128, width, 1), nn.Softmax(dim=2)
        )
        self.fc = nn.Linear(2 * width, _EMBEDDING_DIM)

    def forward(self, audio: Tensor) -> Tensor:
        """Map audio [batch, samples] at 16 kHz to [batch, 512]."""
        x = self.bn1(F.relu(self.conv1(_normalised_log(self.torchfb(audio)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x)))).flatten(1, 2)  # [batch, channels and bands, frames]
        weight = self.attention(x)
        mean = (weight * x).sum(dim=2)
        deviation = ((weight * x**2).sum(dim=2) - mean**2).clamp(min=1e-5).sqrt()
        return self.fc(torch.cat([mean, deviation], dim=1))  # type: ignore[no-any-return]


NETWORKS: dict[str, type[nn.Module]] = {"fast-resnet34": FastResNet34, "h-asp": HalfResNet34Asp}


# --- the model ------------------------------------------------------------------------------------------------------


class VoxCelebModel:
    """A network of the VoxCeleb trainer as a `Model`."""

    batch = 16
    workers = 1

    def __init__(self, name: str, network: nn.Module, description: str) -> None:
        self._network = network.eval()
        published = PUBLISHED[name]
        self.facts = ModelFacts(
            name, SAMPLE_RATE, count_parameters(network), f"{published.title}, {description}", published.poster
        )

    @torch.inference_mode()
    def embed(self, crops: Crops) -> dict[str, NDArray[np.float32]]:
        """See `Model.embed`."""
        return {ONLY_LAYER: np.asarray(self._network(torch.from_numpy(np.ascontiguousarray(crops))).numpy())}

    def close(self) -> None:
        """Do nothing: there is nothing to free."""


def load_voxceleb(name: str, weights: str = "") -> VoxCelebModel:
    """Load `fast-resnet34` or `h-asp` from `weights`, a path or a URL; empty: the URL of its authors.

    Downloads are kept in torch.hub's cache. Raises CheckpointError if the file cannot be downloaded or read, or holds
    another network.
    """
    path = _fetched(weights or PUBLISHED[name].url)
    network = NETWORKS[name]()
    load_weights(network, _read(path), str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return VoxCelebModel(name, network, f"{path.name} (sha256 {digest[:12]})")


def load_weights(network: nn.Module, content: Mapping[str, Any], path: str) -> None:
    """Load the trainer's tensors into `network`, except those of its loss. Raises CheckpointError for other tensors."""
    tensors = {}
    for key, value in content.items():
        name = key.removeprefix("module.")
        if not name.startswith("__L__."):
            tensors[name.removeprefix("__S__.")] = value
    expected = network.state_dict()
    wrong = [
        f"{name} is {tuple(tensors[name].shape) if name in tensors else 'missing'}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if (name in tensors or not name.startswith(_FRONT_END))
        and tuple(getattr(tensors.get(name), "shape", ("missing",))) != tuple(tensor.shape)
    ]
    wrong += [f"{name} is unknown" for name in tensors if name not in expected]
    if wrong:
        raise CheckpointError(f"{path} holds another network: {len(wrong)} tensors do not fit (first: {wrong[0]})")
    network.load_state_dict(tensors, strict=False)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # the exception depends on where the file is damaged
        raise CheckpointError(f"{path} is not a file of weights: {str(exc).splitlines()[0]}") from exc
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} is not a file of weights: it holds a {type(content).__name__}")
    return content


def _fetched(source: str) -> Path:
    """Return a local path of `source`; a URL is downloaded into torch.hub's cache unless it is there."""
    if "://" not in source:
        if not Path(source).is_file():
            raise CheckpointError(f"{source}: no such file")
        return Path(source)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / source.rpartition("/")[2]
    if path.exists():
        return path
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
            raise OSError("HF_HUB_OFFLINE is set")
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(source, str(path), progress=False)
    except (urllib.error.URLError, OSError) as exc:
        raise CheckpointError(
            f"{storage.redacted(source)} cannot be fetched: {getattr(exc, 'reason', exc)}. Download it on another "
            f"machine to {path}, or give its place: --model NAME=FILE"
        ) from exc
    return path
