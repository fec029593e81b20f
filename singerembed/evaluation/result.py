"""Options and results of an evaluation, and the results as JSON types."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.evaluation.data import LabelledData, Recording
from singerembed.evaluation.embed import EmbeddedTable
from singerembed.evaluation.metrics import ErrorCurve, Floats, Interval, Ints
from singerembed.evaluation.pairs import Pairs
from singerembed.evaluation.probe import Identification
from singerembed.model.mel import DEFAULT_SILENCE_DBFS

DEFAULT_PAIRS = 20_000  # as in the official pair files


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation."""

    crops: int | None = None  # per recording, evenly spaced; None: all consecutive ones
    pairs_file: str | None = None  # in the official format; None: pairs are drawn
    n_pairs: int = DEFAULT_PAIRS
    every_pair: bool = False  # error rates over all pairs instead of drawn ones
    conditions: tuple[str, ...] = ()  # columns of the catalogue to report error rates by
    within: tuple[str, ...] = ()  # columns whose values are groups: report error rates of pairs within a group
    silence_dbfs: float = DEFAULT_SILENCE_DBFS
    identify: bool = True
    scoring: str = "cosine"  # of scoring.SCORINGS that need no labels; fitted on the compared crops
    seed: int = 0


@dataclass(frozen=True)
class Measure:
    """A value and its confidence interval over singers, or the reason why there is none."""

    value: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    missing: str = ""

    @classmethod
    def of(cls, value: float, interval: Interval) -> Measure:
        return cls(value, interval.low, interval.high)


@dataclass(frozen=True)
class Crops:
    """The n crops that all models are compared on."""

    recordings: list[Recording]
    singer_names: list[str]
    singer: Ints  # [n]
    recording: Ints  # [n]
    names: list[str]  # [n], names in pair files

    def same_value(self, column: str) -> Ints:
        """Return the value of a condition for each crop, as a number: int64 [n]; -1 if it is empty."""
        values = [r.conditions.get(column, "") for r in self.recordings]
        number = {value: i for i, value in enumerate(sorted(set(values) - {""}))}
        return np.array([number.get(value, -1) for value in values], np.int64)[self.recording]


@dataclass(frozen=True)
class ModelResult:
    """Results of one model."""

    table: EmbeddedTable
    layer: str  # the layer with the lowest equal error rate
    layer_eer: dict[str, float]  # equal error rate by layer; empty with one layer
    unit: NDArray[np.float32]  # [n, dim], embeddings of `layer`, rows of length 1
    eer: Measure
    threshold: float
    centred: Measure  # equal error rate with the mean of the compared crops subtracted first
    effective_rank: float  # of the embeddings, see metrics.effective_rank
    mnr: Measure
    nearest: Measure  # share of crops whose most similar crop of another recording is the same singer's
    top1: Measure
    top5: Measure
    identification: Identification | None
    conditions: dict[str, Measure]  # equal error rates
    curve: ErrorCurve | None
    histogram: tuple[Floats, Ints, Ints] | None  # edges [k + 1], pairs of one singer [k], of two [k]

    @property
    def dim(self) -> int:
        return int(self.unit.shape[1])


@dataclass(frozen=True)
class Evaluation:
    """Data, options and results of an evaluation."""

    data: LabelledData
    options: EvaluationOptions
    crops: Crops
    pairs: Pairs
    results: list[ModelResult]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON types; missing values are null."""
        return {
            "data": self.data.source,
            "recordings": len(np.unique(self.crops.recording)),
            "crops": len(self.crops.singer),
            "singers": len(np.unique(self.crops.singer)),
            "pairs": {
                "one_singer": int(self.pairs.labels.sum()),
                "two_singers": int((~self.pairs.labels).sum()),
                "from": _pairs_origin(self.options),
            },
            "options": asdict(self.options),
            "notes": self.notes,
            "models": [_result_fields(result) for result in self.results],
        }


def _pairs_origin(options: EvaluationOptions) -> str:
    if options.every_pair:
        return "all pairs (ranks: drawn)"
    return options.pairs_file or f"drawn, seed {options.seed}"


def _result_fields(result: ModelResult) -> dict[str, Any]:
    facts, identification = result.table.facts, result.identification
    return {
        "name": facts.name,
        "description": facts.description,
        "parameters": facts.n_parameters,
        "sample_rate": facts.sample_rate,
        "dim": result.dim,
        "poster": facts.poster,
        "layer": result.layer,
        "layer_eer": result.layer_eer,
        "eer": _measure_fields(result.eer),
        "threshold": _finite(result.threshold),
        "centred": _measure_fields(result.centred),
        "effective_rank": _finite(result.effective_rank),
        "mnr": _measure_fields(result.mnr),
        "nearest": _measure_fields(result.nearest),
        "top1": _measure_fields(result.top1),
        "top5": _measure_fields(result.top5),
        "probe": None
        if identification is None
        else {k: getattr(identification, k) for k in ("n_singers", "n_crops", "folds")},
        "conditions": {name: _measure_fields(measure) for name, measure in result.conditions.items()},
        "silent": result.table.n_silent,
        "invalid": result.table.n_invalid,
        "failed_recordings": result.table.n_failed,
        "failures": result.table.failures,
        "seconds": round(result.table.seconds, 3),
    }


def _measure_fields(measure: Measure) -> dict[str, Any]:
    figures = {name: _finite(getattr(measure, name)) for name in ("value", "low", "high")}
    return figures | ({"missing": measure.missing} if measure.missing else {})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
