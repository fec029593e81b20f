"""GE2E (Wan et al. 2018, arXiv 1710.10467): the speaker encoder of resemblyzer, whose package has the weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from singerembed.evaluation.baselines.base import ONLY_LAYER, Crops, ModelFacts, count_parameters, require


class Ge2eModel:
    """resemblyzer with its own pre-processing: level normalised, long silences cut, then 1.6 s windows averaged."""

    batch = 1
    workers = 1

    def __init__(self, name: str) -> None:
        module = require("resemblyzer", "the baseline ge2e")
        self._preprocess = module.preprocess_wav
        self._rate = int(module.hparams.sampling_rate)
        self._encoder = module.VoiceEncoder("cpu", verbose=False).eval()
        self.facts = ModelFacts(
            name=name,
            sample_rate=self._rate,
            n_parameters=count_parameters(self._encoder),
            description="resemblyzer's VoiceEncoder with its own preprocessing",
            poster="1.4 M / 16 kHz / 256",
        )

    def embed(self, crops: Crops) -> dict[str, NDArray[np.float32]]:
        """See `Model.embed`."""
        return {ONLY_LAYER: np.stack([self._embed_one(crop) for crop in crops])}

    def _embed_one(self, crop: NDArray[np.float32]) -> NDArray[np.float32]:
        voiced = self._preprocess(crop, source_sr=None)
        # Its voice activity detector, made for speech, may remove a whole crop of singing.
        return np.asarray(self._encoder.embed_utterance(voiced if len(voiced) else crop), np.float32)

    def close(self) -> None:
        """Do nothing: there is nothing to free."""
