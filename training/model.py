"""The networks: the mel front end in torch, the encoder, the projection and BYOL's predictor.

Module names are those of the official training code, so that `model.checkpoint` reads the checkpoints of both.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import EfficientNet_B0_Weights, efficientnet_b0

from singerembed.errors import CheckpointError
from singerembed.model.mel import mel_basis
from singerembed.model.spec import ModelSpec

PROJECTION_DIM = 128
PREDICTOR_WIDTH = 1024
# The official code divides by the maximum over the batch in training and evaluation. Here evaluation divides by a
# running mean of those maxima, as in batch normalisation, so that an embedding depends only on its own crop.
_MAXIMUM_MOMENTUM = 0.01
# Initial value of the running mean: the mean over batches of 128 crops of professional singing.
_FIRST_MAXIMUM = 9.2


class MelSpectrogram(nn.Module):
    """Mel power spectrograms of waveforms of any length in torch, equal to those of `singerembed.model.mel`."""

    window: Tensor
    basis: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self._hop_samples = spec.hop_samples
        # Not persistent: they are computed from the spec.
        self.register_buffer("window", torch.hann_window(spec.n_fft, periodic=True), persistent=False)
        self.register_buffer("basis", torch.from_numpy(mel_basis(spec)), persistent=False)

    def forward(self, pcm: Tensor) -> Tensor:
        """Return [crops, n_mels, frames] power of `pcm`, float32 [crops, samples], full scale 1."""
        n_fft = len(self.window)
        spectrum = torch.stft(
            pcm, n_fft, self._hop_samples, window=self.window, center=True, pad_mode="reflect", return_complex=True
        )
        return self.basis @ (spectrum.real.square() + spectrum.imag.square())


class LogScale(nn.Module):
    """Logarithm of mel power."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self._offset = spec.log_offset

    def forward(self, power: Tensor) -> Tensor:
        """Return log(power + offset), of the shape of `power`."""
        return (power + self._offset).log()


class Image(nn.Module):
    """The input of the backbone: the normalised log-mel as three channels, standardised by ImageNet statistics."""

    mean: Tensor
    std: Tensor
    running_maximum: Tensor

    def __init__(self, spec: ModelSpec, normalise: str | float) -> None:
        """`normalise`: divide by the maximum of the "crop", of the "batch" (as the official code), or by a constant."""
        super().__init__()
        self.normalise = normalise
        self.register_buffer("mean", torch.tensor(spec.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.image_std).view(3, 1, 1), persistent=False)
        # Only "batch" has state.
        self.register_buffer("running_maximum", torch.tensor(_FIRST_MAXIMUM), persistent=normalise == "batch")

    def forward(self, log_mel: Tensor) -> Tensor:
        """Return [crops, 3, n_mels, frames] of `log_mel`, [crops, n_mels, frames]."""
        image = (log_mel / self._divisor(log_mel)).unsqueeze(1)
        return ((image - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def _divisor(self, log_mel: Tensor) -> Tensor | float:
        if self.normalise == "crop":
            return log_mel.amax(dim=(1, 2), keepdim=True)
        if self.normalise != "batch":
            return float(self.normalise)
        if not self.training:
            return self.running_maximum
        maximum = log_mel.max()
        self.running_maximum.lerp_(maximum, _MAXIMUM_MOMENTUM)
        return maximum


class Encoder(nn.Module):
    """Mel power to embeddings: logarithm, image, EfficientNet-B0."""

    def __init__(
        self, spec: ModelSpec, *, normalise: str | float, pretrained: bool = False, **backbone_options: float
    ) -> None:
        """`pretrained`: on ImageNet. `backbone_options`: torchvision's `dropout` and `stochastic_depth_prob`."""
        super().__init__()
        make = _imagenet_backbone if pretrained else partial(efficientnet_b0, num_classes=spec.embedding_dim)
        backbone = make(**backbone_options)
        # Channels last is 1.2 to 1.7 times as fast on a CPU, and can use the tensor cores of a GPU.
        self.net = nn.Sequential(LogScale(spec), Image(spec, normalise), backbone.to(memory_format=torch.channels_last))

    @property
    def backbone(self) -> nn.Module:
        """The EfficientNet, whose tensors make up a checkpoint."""
        return self.net[2]

    def forward(self, power: Tensor) -> Tensor:
        """Return embeddings [crops, embedding_dim] of mel power [crops, n_mels, frames]."""
        with torch.no_grad(), torch.autocast(power.device.type, enabled=False):
            image = self.net[1](self.net[0](power))  # log(1e-8) and the division need more than half precision
        return cast(Tensor, self.net[2](image))


class Projection(nn.Module):
    """Projection head: SiLU and a linear layer, L2-normalised by default. Used by the losses only, not exported."""

    def __init__(self, embedding_dim: int, *, l2_normalise: bool) -> None:
        super().__init__()
        self.l2_normalise = l2_normalise
        self.net = nn.Sequential(nn.SiLU(), nn.Linear(embedding_dim, PROJECTION_DIM))

    def forward(self, embedding: Tensor) -> Tensor:
        """Return float32 [crops, 128]."""
        projection = self.net(embedding).float()
        return F.normalize(projection, dim=-1) if self.l2_normalise else projection


class Predictor(nn.Module):
    """BYOL's predictor (arXiv 2006.07733): linear without bias, batch norm, ReLU, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(PROJECTION_DIM, PREDICTOR_WIDTH, bias=False),
            nn.BatchNorm1d(PREDICTOR_WIDTH),
            nn.ReLU(),
            nn.Linear(PREDICTOR_WIDTH, PROJECTION_DIM),
        )

    def forward(self, projection: Tensor) -> Tensor:
        """Return float32 [crops, 128], L2-normalised."""
        return F.normalize(self.model(projection).float(), dim=-1)


def _imagenet_backbone(**options: float) -> nn.Module:
    """Return EfficientNet-B0 with torchvision's ImageNet weights. Raises CheckpointError if they cannot be fetched."""
    weights = EfficientNet_B0_Weights.IMAGENET1K_V1
    try:
        return cast(nn.Module, efficientnet_b0(weights=weights, **options))
    except OSError as exc:
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise CheckpointError(
            f"torchvision's ImageNet weights could not be fetched ({exc}). Put {weights.url.rsplit('/', 1)[-1]} "
            f"into {folder}, or start from scratch: --set model.initialise=random"
        ) from exc
