"""The reference back end: the encoder in FP32 torch as torchvision defines it. For verification and tests."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models import efficientnet_b0

from singerembed.engine.base import EmbeddedCrops
from singerembed.model.checkpoint import Checkpoint
from singerembed.model.mel import DEFAULT_SILENCE_DBFS, MelExtractor, Pcm
from singerembed.model.spec import ModelSpec


class EncoderNet(nn.Module):
    """The encoder after the log-mel: three equal channels, normalised by ImageNet statistics, into EfficientNet-B0."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.net = efficientnet_b0(num_classes=spec.embedding_dim)
        self.register_buffer("mean", torch.tensor(spec.image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.image_std).view(1, 3, 1, 1), persistent=False)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Map [batch, n_mels, n_frames] to [batch, embedding_dim]."""
        image = (log_mel.unsqueeze(1) - self.mean) / self.std
        return self.net(image)  # type: ignore[no-any-return]


def load_encoder(checkpoint: Checkpoint) -> EncoderNet:
    """Build the encoder of `checkpoint` in evaluation mode."""
    encoder = EncoderNet(checkpoint.spec)
    encoder.net.load_state_dict(checkpoint.state_dict)
    return encoder.eval()


class TorchEngine:
    """An engine that runs a checkpoint in torch, without an engine file."""

    batch = 8
    waits = False

    def __init__(self, checkpoint: Checkpoint, silence_dbfs: float = DEFAULT_SILENCE_DBFS) -> None:
        self.spec = checkpoint.spec
        self.description = f"{checkpoint.spec.name}, fp32, torch {torch.__version__}"
        self._mel = MelExtractor(checkpoint.spec, silence_dbfs)
        self._encoder = load_encoder(checkpoint)

    def encode(self, log_mel: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embed spectrograms [n, n_mels, n_frames] one at a time. Return float32 [n, embedding_dim]."""
        with torch.inference_mode():
            rows = [self._encoder(torch.from_numpy(one[np.newaxis]))[0].numpy() for one in log_mel]
        return np.stack(rows) if rows else np.empty((0, self.spec.embedding_dim), np.float32)

    def embed(self, crops: Pcm) -> EmbeddedCrops:
        """See `Engine.embed`."""
        mel = self._mel.log_mel(crops)
        return EmbeddedCrops(self.encode(mel.mel), mel.peak, mel.rms, mel.state)

    def close(self) -> None:
        """Do nothing: there is nothing to free."""
