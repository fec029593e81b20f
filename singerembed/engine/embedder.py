"""The Python API for audio that is already decoded: arrays in, embeddings out."""

from __future__ import annotations

from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from singerembed.audio.limits import MAX_SAMPLE_RATE, MIN_SAMPLE_RATE
from singerembed.engine.base import Engine
from singerembed.engine.load import load_engine as load_back_end
from singerembed.model.mel import DEFAULT_SILENCE_DBFS, INVALID, LOUD
from singerembed.model.spec import ModelSpec


class Embedder:
    """A loaded engine that takes arrays of audio. Thread-safe."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def spec(self) -> ModelSpec:
        """The model's spec."""
        return self.engine.spec

    def embed(self, audio: NDArray[Any], sample_rate: int) -> NDArray[np.float32]:
        """Embed the consecutive crops of `audio`. Return float32 [crops, embedding_dim]; rows of silent crops are NaN.

        `audio`: int16, or float with full scale 1; mono [samples], or [samples, channels], which are averaged.
        `sample_rate`: Hz; audio at another rate than the model's is resampled. Audio shorter than a crop is padded with
        zeros, and a remainder is dropped, as in `singerembed run`. Raises ValueError for another shape or type, no
        samples, NaN or infinity.
        """
        crops = self._crops(np.asarray(audio), sample_rate)
        embedding = np.full((len(crops), self.spec.embedding_dim), np.nan, np.float32)
        for first in range(0, len(crops), self.engine.batch):
            result = self.engine.embed(crops[first : first + self.engine.batch])
            if (result.state == INVALID).any():
                raise ValueError("audio holds NaN or infinity")
            embedding[first : first + self.engine.batch][result.state == LOUD] = result.embedding
        return embedding

    def _crops(self, audio: NDArray[Any], sample_rate: int) -> NDArray[np.float32]:
        if audio.ndim not in {1, 2} or audio.size == 0:
            raise ValueError(f"audio must be [samples] or [samples, channels] and not empty, got shape {audio.shape}")
        if audio.dtype != np.int16 and not np.issubdtype(audio.dtype, np.floating):
            raise ValueError(f"audio must be int16 or float, got {audio.dtype}")
        if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
            raise ValueError(
                f"sample_rate must lie between {MIN_SAMPLE_RATE} and {MAX_SAMPLE_RATE} Hz, got {sample_rate}"
            )
        mono = audio.astype(np.float32) / (32768 if audio.dtype == np.int16 else 1)
        if mono.ndim == 2:
            mono = mono.mean(axis=1)
        if sample_rate != self.spec.sample_rate:
            mono = soxr.resample(mono, sample_rate, self.spec.sample_rate)
        size = self.spec.crop_samples
        if len(mono) < size:
            mono = np.pad(mono, (0, size - len(mono)))
        return np.ascontiguousarray(mono[: len(mono) // size * size].reshape(-1, size), np.float32)


def load_engine(path: str | None = None, silence_dbfs: float = DEFAULT_SILENCE_DBFS) -> Embedder:
    """Load the engine file `path` (default: the bundled one). Raises EngineError."""
    return Embedder(load_back_end(path, silence_dbfs))
