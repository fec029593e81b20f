"""Back ends of scores: what is done to embeddings before their inner product is called a similarity.

Which one is best was measured on labelled singers (docs/search.md): the mean subtracted before rows are scaled to
length 1, the default of `singerembed index`. None of them looks at a query's neighbours, so the score of two crops
stays the same whatever else is in an index.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.evaluation.pairs import unit_rows

SCORINGS = ("centred", "cosine", "whitened", "lda")
# Added to every variance, as a share of the largest: what varies little is mostly noise, and is not blown up. With 0.1
# and 0.01 whitening gives more errors than the cosine of centred embeddings; see docs/search.md.
_SHRINKAGE = 1.0


@dataclass
class Moments:
    """Sums over embeddings, from which back ends are fitted; bounded memory however many rows are added."""

    n: int = 0
    total: Any = 0.0  # [dim]
    products: Any = 0.0  # [dim, dim]; not summed up unless `second`
    second: bool = False

    def add(self, embedding: NDArray[np.floating]) -> None:
        """Add rows, [n, dim]."""
        rows = np.asarray(embedding, np.float64)
        self.n += len(rows)
        self.total = self.total + rows.sum(axis=0)
        if self.second:
            self.products = self.products + rows.T @ rows

    def mean(self) -> NDArray[np.float64]:
        """Mean of the rows, [dim]. Raises ValueError without any."""
        if not self.n:
            raise ValueError("there are no embeddings")
        return np.asarray(self.total / self.n)

    def covariance(self) -> NDArray[np.float64]:
        """Covariance of the rows, [dim, dim]."""
        mean = self.mean()
        return np.asarray(self.products / self.n - np.outer(mean, mean))


@dataclass(frozen=True)
class Scoring:
    """Maps embeddings to vectors of length 1 whose inner product is the score."""

    kind: str  # of SCORINGS
    mean: NDArray[np.float32]  # [dim], subtracted first; zeros for "cosine"
    projection: NDArray[np.float32] | None = None  # [dim, k], applied after that

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return len(self.mean) if self.projection is None else int(self.projection.shape[1])

    def vectors(self, embedding: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return the vectors of embeddings [n, dim of embeddings], float32 [n, dim]."""
        centred = np.asarray(embedding, np.float32) - self.mean
        return unit_rows(centred if self.projection is None else centred @ self.projection)


def needs_second_moments(kind: str) -> bool:
    """Say whether `fit_scoring` reads covariances."""
    return kind in {"whitened", "lda"}


def fit_scoring(kind: str, moments: Moments, of_singers: Iterable[Moments] = ()) -> Scoring:
    """Fit the back end `kind` of SCORINGS.

    `moments`: of all embeddings. `of_singers`: of each singer's, for "lda" alone, which needs labels: it keeps the
    directions in which the means of singers differ most, measured in units of the scatter within singers. Raises
    ValueError without embeddings, and for "lda" with fewer than three singers.
    """
    mean = moments.mean()
    centre = np.asarray(mean, np.float32)
    if kind == "cosine":
        return Scoring(kind, np.zeros_like(centre))
    if kind == "centred":
        return Scoring(kind, centre)
    if kind == "whitened":
        return Scoring(kind, centre, np.asarray(_whitener(moments.covariance()), np.float32))
    if kind == "lda":
        singers = list(of_singers)
        if len(singers) < 3:
            raise ValueError(f"lda needs three singers or more, there are {len(singers)}")
        n = sum(singer.n for singer in singers)
        whitener = _whitener(np.asarray(sum(singer.n * singer.covariance() for singer in singers)) / n)
        between = np.stack([np.sqrt(singer.n / n) * (singer.mean() - mean) @ whitener for singer in singers])
        directions = np.linalg.svd(between, full_matrices=False)[2][: len(singers) - 1]
        return Scoring(kind, centre, np.asarray(whitener @ directions.T, np.float32))
    raise ValueError(f"no back end of scores is called {kind!r}; there are {', '.join(SCORINGS)}")


def _whitener(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """The matrix after which rows of this covariance have the same variance in all directions, but for _SHRINKAGE."""
    variance, directions = np.linalg.eigh(covariance)
    return np.asarray(directions / np.sqrt(np.maximum(variance, 0) + _SHRINKAGE * variance.max()))
