"""The evaluation: models on labelled data, their error rates, ranks and identification."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.errors import UsageError
from singerembed.evaluation.baselines.base import Model
from singerembed.evaluation.data import LabelledData, Recording
from singerembed.evaluation.embed import EmbeddedTable, embed_recordings, in_common, standardised, stored_table
from singerembed.evaluation.metrics import (
    Bools,
    ErrorCurve,
    Floats,
    Interval,
    Ints,
    equal_error_interval,
    equal_error_of,
    error_curve,
    mean_interval,
    normalised_rank,
)
from singerembed.evaluation.pairs import (
    Pairs,
    all_pairs,
    draw_pairs,
    draw_rank_scores,
    pair_scores,
    pairs_of_names,
    read_pair_file,
    unit_rows,
)
from singerembed.evaluation.probe import Identification, identify_singers
from singerembed.mel import DEFAULT_SILENCE_DBFS

DEFAULT_PAIRS = 20_000  # as many as the official pair files hold
_INTERVAL_PAIRS = 200_000  # drawn of all pairs for their interval
_MIN_PAIRS_OF_VALUE = 20  # of each kind, below which a value of a condition is not reported


@dataclass(frozen=True)
class EvaluationOptions:
    """What an evaluation may be told."""

    crops: int | None = None  # of each recording, evenly spaced; None: all consecutive ones
    pairs_file: str | None = None  # in the official format; None: pairs are drawn
    n_pairs: int = DEFAULT_PAIRS
    every_pair: bool = False  # all pairs instead of drawn ones
    conditions: tuple[str, ...] = ()  # columns of the catalogue
    silence_dbfs: float = DEFAULT_SILENCE_DBFS
    identify: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Measure:
    """A figure and its interval over singers; or why there is none."""

    value: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    missing: str = ""

    @classmethod
    def of(cls, value: float, interval: Interval) -> Measure:
        return cls(value, interval.low, interval.high)


@dataclass(frozen=True)
class Crops:
    """The crops that all models are compared on."""

    recordings: list[Recording]
    singer_names: list[str]
    singer: Ints  # [n]
    recording: Ints  # [n]
    names: list[str]  # [n], as pair files call them

    def same_value(self, column: str) -> Ints:
        """The value of a condition, as a number, of each crop: [n]; -1 where it is empty."""
        values = [r.conditions.get(column, "") for r in self.recordings]
        number = {value: i for i, value in enumerate(sorted(set(values) - {""}))}
        return np.array([number.get(value, -1) for value in values], np.int64)[self.recording]


@dataclass(frozen=True)
class ModelResult:
    """What was found of one model."""

    table: EmbeddedTable
    layer: str
    layer_eer: dict[str, float]  # of each layer, where there are several
    unit: NDArray[np.float32]  # [n, dim], of the layer, rows of length 1
    eer: Measure
    threshold: float
    mnr: Measure
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
    """All of it."""

    data: LabelledData
    options: EvaluationOptions
    crops: Crops
    pairs: Pairs
    results: list[ModelResult]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; figures that do not exist are null."""
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
        "mnr": _measure_fields(result.mnr),
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


# --- running --------------------------------------------------------------------------------------------------------


def evaluate(
    data: LabelledData,
    models: Sequence[Callable[[], Model]],
    options: EvaluationOptions | None = None,
    *,
    say: Callable[[str, str], None] = lambda _what, _text: None,
    advance: Callable[[str], object] = lambda _model: None,
) -> Evaluation:
    """Compare `models`, and the embeddings that `data` may hold, on the crops that all of them have embedded.

    Models are loaded one after the other, so that one at a time is in memory. `say` is told what happens, `advance`
    after each recording which model has heard it. Raises UsageError where there is nothing to compare.
    """
    options = options or EvaluationOptions()
    tables = [stored_table(data.stored)] if data.stored else []
    for load in models:
        model = load()
        try:
            name = model.facts.name
            say("model", f"{name}: {model.facts.description}")
            tables.append(
                embed_recordings(
                    model, data.recordings, crops=options.crops, silence_dbfs=options.silence_dbfs,
                    advance=lambda name=name: advance(name),  # type: ignore[misc]
                )
            )  # fmt: skip
        finally:
            model.close()
    if not tables:
        raise UsageError("nothing to evaluate: name a model with --model, or give a Parquet file written by run")
    notes = [*data.notes, *_losses(tables)]
    tables = in_common(tables)
    crops = describe_crops(data.recordings, tables[0])
    if not len(crops.singer):
        raise UsageError("the models have embedded no crop in common")
    pairs, pair_notes = _find_pairs(crops, options)
    notes += pair_notes
    if len(np.unique(crops.singer)) < 2:
        notes.append("there is one singer only: no error rates, ranks or identification")
    for note in notes:
        say("note", note)
    results = [_measure(table, crops, pairs, options) for table in tables]
    return Evaluation(data, options, crops, pairs, results, notes)


def describe_crops(recordings: list[Recording], table: EmbeddedTable) -> Crops:
    """Say whose the crops of `table` are and what they are called: `name`, or `name@seconds` if there are several."""
    singer_names = sorted({r.singer for r in recordings})
    number = {name: i for i, name in enumerate(singer_names)}
    of_recording = np.array([number[r.singer] for r in recordings], np.int64)
    several = np.bincount(table.recording, minlength=len(recordings)) > 1
    names = [
        f"{recordings[r].name}@{start:g}" if several[r] else recordings[r].name
        for r, start in zip(table.recording, table.start, strict=True)
    ]
    return Crops(recordings, singer_names, of_recording[table.recording], table.recording, names)


def _losses(tables: list[EmbeddedTable]) -> list[str]:
    notes = []
    for table in tables:
        name = table.facts.name
        parts = [
            f"{count} {what}"
            for count, what in ((table.n_silent, "silent crops"), (table.n_invalid, "crops with NaN or infinity"))
            if count
        ]
        if parts:
            notes.append(f"{name}: {' and '.join(parts)} left out")
        if table.n_failed:
            example = f", first: {table.failures[0]}" if table.failures else ""
            notes.append(f"{name}: {table.n_failed} recordings could not be read{example}")
    most, least = max(len(t.crop) for t in tables), len(in_common(tables)[0].crop)
    if most > least:
        notes.append(f"compared on the {least} crops that all models have embedded (one has {most})")
    return notes


def _find_pairs(crops: Crops, options: EvaluationOptions) -> tuple[Pairs, list[str]]:
    if options.pairs_file is None:
        return draw_pairs(crops.singer, options.n_pairs, options.seed), []
    rows = read_pair_file(options.pairs_file)
    row_of = {name: row for row, name in reversed(list(enumerate(crops.names)))}
    for row in reversed(range(len(crops.names))):  # a recording by its name alone is its first crop
        row_of[crops.recordings[crops.recording[row]].name] = row
    pairs, n_missing = pairs_of_names(rows, row_of)
    if not len(pairs):
        raise UsageError(
            f"{options.pairs_file}: none of its paths is among the data's. The first is {rows[0][1]}, "
            f"the data's first is {crops.names[0]}"
        )
    notes = [f"{n_missing} of {len(rows)} pairs name crops that are missing or silent"] if n_missing else []
    wrong = int(((crops.singer[pairs.first] == crops.singer[pairs.second]) != pairs.labels).sum())
    return pairs, [*notes, *([f"{wrong} pairs have another label than the data's singers say"] if wrong else [])]


# --- one model ------------------------------------------------------------------------------------------------------


def _measure(table: EmbeddedTable, crops: Crops, pairs: Pairs, options: EvaluationOptions) -> ModelResult:
    layer_eer = {}
    for name, embedding in table.layers.items():
        try:
            layer_eer[name] = equal_error_of(error_curve(pairs.labels, pair_scores(unit_rows(embedding), pairs))).rate
        except ValueError:
            layer_eer[name] = float("nan")
    layer = min(layer_eer, key=lambda name: (math.isnan(layer_eer[name]), layer_eer[name]))
    embedding = table.layers[layer]
    unit = unit_rows(standardised(embedding) if table.facts.standardise else embedding)
    scores = pair_scores(unit, pairs)
    eer, threshold, curve = _equal_error(unit, crops, pairs, scores, options, None)
    identification, why_not = _identification(embedding, crops, options)
    return ModelResult(
        table=table,
        layer=layer,
        layer_eer=layer_eer if len(layer_eer) > 1 else {},
        unit=unit,
        eer=eer,
        threshold=threshold,
        mnr=_rank(unit, crops, pairs, options),
        top1=_identified(identification, why_not, "top1"),
        top5=_identified(identification, why_not, "top5"),
        identification=identification,
        conditions=_conditions(unit, crops, pairs, scores, options),
        curve=curve,
        histogram=_histogram(pairs, scores),
    )


def _equal_error(
    unit: NDArray[np.float32],
    crops: Crops,
    pairs: Pairs,
    scores: Floats,
    options: EvaluationOptions,
    condition: Callable[[Ints, Ints], Bools] | None,
) -> tuple[Measure, float, ErrorCurve | None]:
    """Equal error rate of the pairs whose rows satisfy `condition`."""
    if condition is not None:
        kept = condition(pairs.first, pairs.second)
        pairs, scores = pairs.select(kept), scores[kept]
    try:
        if options.every_pair:
            rows = np.arange(len(unit))
            accept = None if condition is None else _block_filter(condition, rows)
            found = all_pairs(unit, crops.singer, accept)
            rate, threshold, curve = found.eer.rate, found.eer.threshold, found.curve
            pairs = draw_pairs(crops.singer, _INTERVAL_PAIRS, options.seed, uniform=True)
            if condition is not None:
                pairs = pairs.select(condition(pairs.first, pairs.second))
            scores = pair_scores(unit, pairs)
        else:
            curve = error_curve(pairs.labels, scores)
            rate, threshold = equal_error_of(curve).rate, equal_error_of(curve).threshold
    except ValueError as exc:
        return Measure(missing=str(exc)), float("nan"), None
    singers = crops.singer[pairs.first], crops.singer[pairs.second]
    return Measure.of(rate, equal_error_interval(pairs.labels, scores, singers, seed=options.seed)), threshold, curve


def _block_filter(condition: Callable[[Ints, Ints], Bools], rows: Ints) -> Callable[[slice, slice], Bools]:
    return lambda a, b: condition(rows[a, np.newaxis], rows[np.newaxis, b])


def _rank(unit: NDArray[np.float32], crops: Crops, pairs: Pairs, options: EvaluationOptions) -> Measure:
    try:
        drawn = draw_rank_scores(unit, crops.singer, pairs, seed=options.seed)
    except ValueError as exc:
        return Measure(missing=str(exc))
    ranks = normalised_rank(drawn.positive, drawn.distractors)
    return Measure.of(float(ranks.mean()), mean_interval(ranks, drawn.singer, seed=options.seed))


def _identification(
    embedding: NDArray[np.float32], crops: Crops, options: EvaluationOptions
) -> tuple[Identification | None, str]:
    if not options.identify:
        return None, "not asked for"
    try:
        return identify_singers(embedding, crops.singer, crops.recording, seed=options.seed), ""
    except ValueError as exc:
        return None, str(exc)


def _identified(identification: Identification | None, why_not: str, name: str) -> Measure:
    if identification is None:
        return Measure(missing=why_not)
    return Measure.of(getattr(identification, name), getattr(identification, f"{name}_interval"))


def _conditions(
    unit: NDArray[np.float32], crops: Crops, pairs: Pairs, scores: Floats, options: EvaluationOptions
) -> dict[str, Measure]:
    """Equal error rates of pairs from two recordings, and for each condition of pairs that share it and do not."""
    tests: dict[str, Callable[[Ints, Ints], Bools]] = {
        "two recordings": lambda a, b: crops.recording[a] != crops.recording[b]
    }
    for column in options.conditions:
        if not any(column in r.conditions for r in crops.recordings):
            known = sorted({name for r in crops.recordings for name in r.conditions})
            raise UsageError(f"--condition {column}: there is no such column; there are: {', '.join(known) or 'none'}")
        value = crops.same_value(column)
        tests |= {f"{column}: same": _Sharing(value), f"{column}: different": _Sharing(value, apart=True)}
        for number, name in enumerate(sorted({r.conditions.get(column, "") for r in crops.recordings} - {""})):
            both = (value[pairs.first] == number) & (value[pairs.second] == number)
            n_positive = int(pairs.labels[both].sum())
            if min(n_positive, int(both.sum()) - n_positive) >= _MIN_PAIRS_OF_VALUE:
                tests[f"{column}: {name}"] = _Sharing(np.where(value == number, number, -1))
    return {name: _equal_error(unit, crops, pairs, scores, options, test)[0] for name, test in tests.items()}


@dataclass(frozen=True)
class _Sharing:
    """Which pairs share a value, or, `apart`, have two values; crops with value -1 are in no such pair."""

    value: Ints  # [n]
    apart: bool = False

    def __call__(self, first: Ints, second: Ints) -> Bools:
        a, b = self.value[first], self.value[second]
        return np.asarray(((a == b) ^ self.apart) & (a >= 0) & (b >= 0))


def _histogram(pairs: Pairs, scores: Floats) -> tuple[Floats, Ints, Ints] | None:
    if not len(pairs):
        return None
    edges = np.linspace(float(scores.min()) - 1e-6, float(scores.max()) + 1e-6, 61)
    return edges, np.histogram(scores[pairs.labels], edges)[0], np.histogram(scores[~pairs.labels], edges)[0]
