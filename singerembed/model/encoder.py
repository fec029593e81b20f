"""The Python interface of the compiled encoder; other modules do not import the extension directly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from singerembed import _csrc
from singerembed.model.mel import DEFAULT_SILENCE_DBFS, MelExtractor, Pcm
from singerembed.model.spec import ModelSpec


def available_int8_isas() -> list[str]:
    """Return the instruction sets whose kernels for int8 this processor can run, the widest last."""
    return list(_csrc.available_int8_isas())


class CompiledEncoder:
    """EfficientNet-B0 with its mel front end, as csrc/encoder.h describes it. Thread-safe.

    With the spec's precision "int8" its 1 x 1 convolutions compute in 8-bit integers, else all is FP32.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: NDArray[np.float32],
        silence_dbfs: float = DEFAULT_SILENCE_DBFS,
        *,
        isa: str = "",
    ) -> None:
        """Pack `weights`, float32 [n] in the order of csrc/encoder_network.h.

        `isa`: one of `available_isas()`, or empty for the widest that this processor supports. Raises ValueError if
        there are too few or too many weights.
        """
        self._mel = MelExtractor(spec, silence_dbfs, isa=isa)
        self._encoder = _csrc.Encoder(
            weights,
            n_mels=spec.n_mels,
            n_frames=spec.n_frames,
            embedding_dim=spec.embedding_dim,
            int8=spec.precision == "int8",
            isa=isa,
        )

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._encoder.isa

    def embed(
        self, crops: Pcm
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
        """Embed `crops`, int16 or float32 [n, crop_samples], C-contiguous.

        Return the embeddings of the loud crops [loud crops, embedding_dim], and peak, rms and state [n] of all, as
        `EmbeddedCrops` has them.
        """
        return self._encoder.embed(self._mel.plan, crops)

    def encode(self, log_mel: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embed spectrograms, float32 [n, n_mels, n_frames], C-contiguous."""
        return self._encoder.encode(log_mel)

    def trace(self, log_mel: NDArray[np.float32]) -> list[tuple[NDArray[np.float32], float]]:
        """Return the output [channels, height, width] of each bottleneck, and the seconds that it took."""
        return self._encoder.trace(log_mel)
