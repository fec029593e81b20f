"""Figures as PNG and SVG: heat map, t-SNE map, DET curves, score histograms."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from singerembed.evaluation.baselines.base import require
from singerembed.evaluation.result import Evaluation, ModelResult
from singerembed.evaluation.views import DET_TICKS, View

_SUFFIXES = (".png", ".svg")
_MAX_TICKS = 60  # with more singers the names do not fit on an axis


def save_figures(evaluation: Evaluation, views: list[View], folder: str) -> list[str]:
    """Write all figures of `evaluation` to `folder`, in both formats. Return the paths.

    Raises MissingDependencyError without matplotlib.
    """
    require("matplotlib", "drawing figures")
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = []
    for result, view in zip(evaluation.results, views, strict=True):
        stem = file_stem(result.table.facts.name)
        written += _save(_heat_map(view), folder, f"similarity-{stem}")
        written += _save(_map(view), folder, f"tsne-{stem}")
        if result.histogram is not None:
            written += _save(_histogram(result), folder, f"scores-{stem}")
    if any(result.curve is not None for result in evaluation.results):
        written += _save(_det(evaluation), folder, "det")
    return written


def file_stem(name: str) -> str:
    """Return `name` as a valid file name."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_") or "model"


def _figure(width: float, height: float, **axes: Any) -> tuple[Any, Any]:
    """Return a figure and its axes, without pyplot and its global state; sizes in inches."""
    figure = require("matplotlib.figure", "drawing figures").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot(**axes)


def _save(figure: Any, folder: str, stem: str) -> list[str]:
    paths = [str(Path(folder) / f"{stem}{suffix}") for suffix in _SUFFIXES]
    with warnings.catch_warnings():
        # Names in a script that no font here has are drawn as boxes; the page shows them in the browser's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for path in paths:
            figure.savefig(path, dpi=300)
    return paths


def _heat_map(view: View) -> Any:
    n = len(view.heat_names)
    size = min(12.0, 3.5 + 0.11 * n)
    figure, axes = _figure(size + 0.8, size)
    image = axes.imshow(view.heat, cmap="viridis", interpolation="nearest")
    if n <= _MAX_TICKS:
        axes.set_xticks(range(n), view.heat_names, rotation=90, fontsize=6)
        axes.set_yticks(range(n), view.heat_names, fontsize=6)
    figure.colorbar(image, ax=axes, label="average cosine similarity")
    axes.set_title(view.model, fontsize=9)
    return figure


def _map(view: View) -> Any:
    require("mpl_toolkits.mplot3d", "drawing figures", "matplotlib")
    figure, axes = _figure(5.0, 4.5, projection="3d")
    axes.scatter(*view.points.T, c=view.point_singer, cmap="turbo", s=4, linewidths=0)
    axes.set(xticklabels=[], yticklabels=[], zticklabels=[])
    axes.set_title(f"{view.model}: t-SNE, colour by singer", fontsize=9)
    return figure


def _histogram(result: ModelResult) -> Any:
    assert result.histogram is not None
    edges, positive, negative = result.histogram
    figure, axes = _figure(4.5, 3.0)
    for counts, label in ((positive, "one singer"), (negative, "two singers")):
        axes.stairs(counts / max(1, counts.sum()), edges, fill=True, alpha=0.5, label=label)
    axes.set(xlabel="cosine similarity", ylabel="share of pairs")
    axes.set_title(result.table.facts.name, fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _det(evaluation: Evaluation) -> Any:
    """Draw DET curves on normal deviate axes (Martin et al. 1997), where normal scores give straight lines."""
    figure, axes = _figure(4.5, 4.5)
    deviate = require("scipy.special", "the DET curve", "scipy").ndtri
    for result in evaluation.results:
        if result.curve is not None:
            inside = (result.curve.false_acceptance > 0) & (result.curve.false_rejection > 0)
            rates = result.curve.false_acceptance[inside], result.curve.false_rejection[inside]
            axes.plot(deviate(rates[0]), deviate(rates[1]), linewidth=1, label=result.table.facts.name)
    ticks = deviate(np.array(DET_TICKS))
    labels = [f"{100 * tick:g}" for tick in DET_TICKS]
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    axes.set(xlabel="false acceptances, %", ylabel="false rejections, %", xlim=ticks[[0, -1]], ylim=ticks[[0, -1]])
    axes.plot(ticks[[0, -1]], ticks[[0, -1]], color="0.7", linewidth=0.5)
    axes.legend(frameon=False, fontsize=8)
    return figure
