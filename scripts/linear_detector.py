"""Fits the logistic regressions that are shipped as weights and a bias."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from singerembed.storage import publishing


class Detector(NamedTuple):
    """Scores are `features @ weights + bias`, above 0 for what is detected."""

    weights: NDArray[np.float64]
    bias: float

    def write(self, path: Path) -> None:
        """Put it in the place of the file `path`, as float32."""
        with publishing(str(path)) as temporary, Path(temporary).open("wb") as file:
            np.savez(file, weights=self.weights.astype(np.float32), bias=np.float32(self.bias))


def fit(features: NDArray[np.float32], is_wanted: NDArray[np.int64], strength: float) -> Detector:
    """Fit on features [n, n_features], labels 0 and 1 [n]; the scaling of the features goes into the weights."""
    scale = StandardScaler().fit(features)
    fitted = LogisticRegression(C=strength, class_weight="balanced", max_iter=5000)
    fitted.fit(scale.transform(features), is_wanted)
    weights = fitted.coef_[0] / scale.scale_
    return Detector(weights, float(fitted.intercept_[0] - scale.mean_ @ weights))
