"""GE2E (Wan et al. 2018, arXiv 1710.10467): resemblyzer's speaker encoder, whose weights are in its package."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from singerembed.evaluation.baselines.base import ONLY_LAYER, Crops, ModelFacts, count_parameters, require


class Ge2eModel:
    """resemblyzer as its authors use it: level and long silences are evened out, then 1.6 s windows are averaged."""

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
        # Its voice detector, made for speech, may drop all of a crop of singing: such a crop is taken as it is.
        return np.asarray(self._encoder.embed_utterance(voiced if len(voiced) else crop), np.float32)

    def close(self) -> None:
        """Nothing to free."""
