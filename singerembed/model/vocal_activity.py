"""Says how much a crop of a mix seems to hold a voice: logistic regression on how its mel spectrogram moves.

Weights are those of scripts/make_vocal_detector.py. A voice is told from instruments by its glides: energy that passes
from a mel band to the next one within some frames, where a struck or fretted note stays in its band; by the pace of its
changes; and by how rough and how steady the spectrum is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from singerembed.model.crop_classifier import CropClassifier, grouped
from singerembed.model.mixture import mixture_features
from singerembed.model.spec import ModelSpec

_CHANGES = (1, 3, 8, 20)  # frames, of 12 ms
_GLIDES = (2, 4)  # frames
_FAST = 0.9  # quantile of a band's changes


class VocalDetector(CropClassifier):
    """Thread-safe. `score` is above 0 where somebody seems to sing."""

    @staticmethod
    def fits(spec: ModelSpec) -> bool:
        """Whether the crops of `spec`, and their mel bands, are those that the weights are for."""
        return CropClassifier.fits(spec) and spec.crop_samples == ModelSpec(name="", method="").crop_samples

    def __init__(self, spec: ModelSpec) -> None:
        """`spec`: of the encoder whose crops are looked at, which `fits`."""
        super().__init__(spec, "vocal_activity.npz", activity_features)


def activity_features(log_mel: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the features of spectrograms, [crops, n_mels, n_frames], log mel power: [crops, n_features]."""
    bands = grouped(log_mel)
    found = [mixture_features(log_mel)]
    for frames in _CHANGES:
        change = np.abs(bands[:, :, frames:] - bands[:, :, :-frames])
        found += [change.mean(axis=2), np.quantile(change, _FAST, axis=2)]
    found += [grouped(np.abs(np.diff(log_mel, axis=1)).mean(axis=2)), grouped(log_mel.std(axis=2))]
    for frames in _GLIDES:
        before = log_mel[:, 1:-1, :-frames]
        stays, rises, falls = (
            grouped(np.abs(log_mel[:, at : at + before.shape[1], frames:] - before)) for at in (1, 2, 0)
        )
        found.append(np.maximum(0, stays - np.minimum(rises, falls)).mean(axis=2))
    return np.asarray(np.concatenate(found, axis=1), np.float32)
