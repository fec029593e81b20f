"""Answers a question about a crop by a logistic regression on features of its mel spectrogram."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from singerembed.model.mel import MelExtractor, Pcm
from singerembed.model.spec import ModelSpec

_MEL_OPTIONS = ("n_mels", "n_fft", "hop_samples", "mel_sample_rate", "mel_fmin", "mel_fmax", "log_offset")


class CropClassifier:
    """Thread-safe."""

    @staticmethod
    def fits(spec: ModelSpec) -> bool:
        """Whether the mel bands of `spec` are those that weights are for."""
        usual = ModelSpec(name="", method="")
        return all(getattr(spec, option) == getattr(usual, option) for option in _MEL_OPTIONS)

    def __init__(
        self, spec: ModelSpec, weights: str, features: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    ) -> None:
        """`spec`: of the encoder whose crops are looked at, which `fits`. `weights`: a file of the package's data.

        `features` maps log mel power, [crops, n_mels, n_frames], to [crops, n_features].
        """
        self._mel = MelExtractor(replace(spec, normalise=1.0), -np.inf)
        self._features = features
        with (resources.files("singerembed") / "data" / weights).open("rb") as file:
            content = np.load(file)
            self._weights, self._bias = content["weights"], float(content["bias"])

    def score(self, crop: Pcm) -> float:
        """The logarithm of the odds that the answer is yes, for `crop`: [crop_samples] of int16 or float32."""
        (features,) = self._features(self._mel.log_mel(crop[np.newaxis]).mel)
        return float(features @ self._weights + self._bias)


def grouped(log_mel: NDArray[np.float32], bands: int = 4) -> NDArray[np.float32]:
    """Return the means of every `bands` neighbouring mel bands: [crops, n_mels, ...] to [crops, n_mels / bands, ...].

    The last bands are left out where they make no group.
    """
    n = log_mel.shape[1] // bands
    whole = log_mel[:, : n * bands].reshape(len(log_mel), n, bands, *log_mel.shape[2:])
    means: NDArray[np.float32] = whole.mean(axis=2)
    return means
