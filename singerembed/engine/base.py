"""The engine seam: PCM crops go in, embeddings and levels come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from singerembed.model.mel import Pcm
from singerembed.model.spec import ModelSpec


@dataclass(frozen=True)
class EmbeddedCrops:
    """What an engine says of a batch of n crops."""

    embedding: NDArray[np.float32]  # [loud crops, embedding_dim], in the order of the loud crops
    peak: NDArray[np.float32]  # [n], full scale is 1; NaN in an invalid crop
    rms: NDArray[np.float32]  # [n]
    state: NDArray[np.uint8]  # [n] of mel.LOUD, mel.SILENT, mel.INVALID


class Engine(Protocol):
    """One loaded model. Any number of threads may call `embed`; a crop's result does not depend on the others."""

    spec: ModelSpec
    description: str  # for people: back end, precision, device
    batch: int  # crops in one call that keep it busy
    waits: bool  # whether `embed` waits for a device, so that more callers than cores keep it busy

    def embed(self, crops: Pcm) -> EmbeddedCrops:
        """Embed `crops`, int16 or float32 [n, crop_samples], n >= 1, C-contiguous; silent crops cost no inference.

        Raises EngineError when the back end fails.
        """
        ...

    def close(self) -> None:
        """Free the device; the engine cannot be used afterwards."""
        ...
