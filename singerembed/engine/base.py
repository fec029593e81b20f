"""The interface of an engine: crops of PCM in, embeddings and levels out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from singerembed.model.mel import Pcm
from singerembed.model.spec import ModelSpec


@dataclass(frozen=True)
class EmbeddedCrops:
    """Results for a batch of n crops."""

    embedding: NDArray[np.float32]  # [loud crops, embedding_dim], in the order of the loud crops
    peak: NDArray[np.float32]  # [n], full scale is 1; NaN in an invalid crop
    rms: NDArray[np.float32]  # [n]
    state: NDArray[np.uint8]  # [n] of mel.LOUD, mel.SILENT, mel.INVALID


class Engine(Protocol):
    """A loaded model. `embed` is thread-safe; the result for a crop does not depend on the other crops of the call."""

    spec: ModelSpec
    description: str  # for display: model, precision, back end, device
    batch: int  # crops per call at which throughput is best
    waits: bool  # `embed` blocks on a device, so use more calling threads than cores

    def embed(self, crops: Pcm) -> EmbeddedCrops:
        """Embed `crops`, int16 or float32 [n, crop_samples], n >= 1, C-contiguous. Silent crops are not inferred.

        Raises EngineError when the back end fails.
        """
        ...

    def close(self) -> None:
        """Free the device. The engine cannot be used afterwards."""
        ...
