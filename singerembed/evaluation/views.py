"""Computes the data of one model's plots, for the page and the figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from singerembed.evaluation.geometry import (
    Cohesion,
    average_similarity,
    centroid_confusions,
    cluster_order,
    cohesion,
    map_3d,
    spread_sample,
)
from singerembed.evaluation.metrics import Floats, Ints
from singerembed.evaluation.result import Crops, ModelResult

MAX_SINGERS = 150  # in a heat map: those with most crops
MAX_POINTS = 5000  # in a map
DET_TICKS = (0.001, 0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95)  # error rates on the axes of a DET plot


@dataclass(frozen=True)
class View:
    """The data of one model's plots."""

    model: str
    heat: Floats  # [singers, singers], average similarity, in cluster order
    heat_names: list[str]
    n_singers: int  # in the data; the heat map may show fewer
    points: NDArray[np.float32]  # [n, 3]
    point_singer: Ints  # [n], index in `heat_names`
    point_names: list[str]  # [n], names of the crops
    n_crops: int  # in the data
    cohesion: list[Cohesion]  # singers by index in `heat_names`


def make_view(result: ModelResult, crops: Crops, *, max_points: int = MAX_POINTS, seed: int = 0) -> View:
    """Compute the plots of one model."""
    n_crops = np.bincount(crops.singer, minlength=len(crops.singer_names))
    shown = np.sort(np.argsort(-n_crops, kind="stable")[: min(MAX_SINGERS, int((n_crops > 0).sum()))])
    number = np.full(len(n_crops), -1, np.int64)
    number[shown] = np.arange(len(shown))
    rows = np.flatnonzero(number[crops.singer] >= 0)
    similarity = average_similarity(result.unit[rows], number[crops.singer[rows]], seed=seed)
    order = cluster_order(similarity)
    number[shown[order]] = np.arange(len(shown))  # index in the heat map
    singer, similarity = number[crops.singer[rows]], similarity[np.ix_(order, order)]
    confusions = centroid_confusions(result.unit[rows], singer, crops.recording[rows])
    some = spread_sample(singer, max_points, seed=seed)
    names = [crops.singer_names[i] for i in shown[order]]
    return View(
        model=result.table.facts.name,
        heat=similarity,
        heat_names=names,
        n_singers=int((n_crops > 0).sum()),
        points=map_3d(result.unit[rows[some]], seed=seed),
        point_singer=singer[some],
        point_names=[crops.names[rows[i]] for i in some],
        n_crops=len(crops.singer),
        cohesion=cohesion(similarity, confusions, singer, crops.recording[rows]),
    )
