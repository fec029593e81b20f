"""Runs an evaluation: compares models on the same crops and pairs of labelled data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from singerembed.errors import InputError, UsageError
from singerembed.evaluation.baselines.base import Model
from singerembed.evaluation.data import LabelledData, Recording
from singerembed.evaluation.embed import EmbeddedTable, embed_recordings, in_common, stored_table
from singerembed.evaluation.measure import measure_model
from singerembed.evaluation.pairs import Pairs, draw_pairs, pairs_of_names, read_pair_file
from singerembed.evaluation.result import Crops, Evaluation, EvaluationOptions


def evaluate(
    data: LabelledData,
    models: Sequence[Callable[[], Model]],
    options: EvaluationOptions | None = None,
    *,
    say: Callable[[str, str], None] = lambda _what, _text: None,
    advance: Callable[[str], object] = lambda _model: None,
) -> Evaluation:
    """Compare `models`, and the embeddings in `data` if any, on the crops that all of them have embedded.

    One model at a time is in memory. Callbacks: `say(what, text)` for each model and note, `advance(model)` after each
    recording. Raises InputError or UsageError if there is nothing to compare.
    """
    options = options or EvaluationOptions()
    _check_columns(data, options)
    pair_rows = None if options.pairs_file is None else read_pair_file(options.pairs_file)
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
    notes = [*data.notes, *_notes_on_dropped(tables)]
    tables = in_common(tables)
    crops = describe_crops(data.recordings, tables[0])
    if not len(crops.singer):
        raise InputError("the models have embedded no crop in common")
    pairs, pair_notes = _find_pairs(crops, pair_rows, options)
    notes += pair_notes
    if len(np.unique(crops.singer)) < 2:
        notes.append("there is one singer only: no error rates, ranks or identification")
    for note in notes:
        say("note", note)
    results = [measure_model(table, crops, pairs, options) for table in tables]
    return Evaluation(data, options, crops, pairs, results, notes)


def describe_crops(recordings: list[Recording], table: EmbeddedTable) -> Crops:
    """Return singers and names of the crops of `table`: `name`, or `name@seconds` if a recording has several crops."""
    singer_names = sorted({r.singer for r in recordings})
    number = {name: i for i, name in enumerate(singer_names)}
    of_recording = np.array([number[r.singer] for r in recordings], np.int64)
    several = np.bincount(table.recording, minlength=len(recordings)) > 1
    names = [
        f"{recordings[r].name}@{start:g}" if several[r] else recordings[r].name
        for r, start in zip(table.recording, table.start, strict=True)
    ]
    return Crops(recordings, singer_names, of_recording[table.recording], table.recording, names)


def _notes_on_dropped(tables: list[EmbeddedTable]) -> list[str]:
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
    most, least = max(len(t.start) for t in tables), len(in_common(tables)[0].start)
    if most > least:
        notes.append(f"compared on the {least} crops that all models have embedded (one has {most})")
    return notes


def _check_columns(data: LabelledData, options: EvaluationOptions) -> None:
    """Raise UsageError where pairs are wanted by a column that no recording has."""
    known = {name for recording in data.recordings for name in recording.conditions}
    for option, columns in (("--within", options.within), ("--condition", options.conditions)):
        for column in columns:
            if column not in known:
                there_are = ", ".join(sorted(known)) or "none"
                raise UsageError(f"{option} {column}: there is no such column; there are: {there_are}")


def _find_pairs(
    crops: Crops, rows: list[tuple[bool, str, str]] | None, options: EvaluationOptions
) -> tuple[Pairs, list[str]]:
    if rows is None:
        return draw_pairs(crops.singer, options.n_pairs, options.seed), []
    row_of = {name: row for row, name in reversed(list(enumerate(crops.names)))}
    for row in reversed(range(len(crops.names))):  # the name of a recording without @seconds is its first crop
        row_of[crops.recordings[crops.recording[row]].name] = row
    pairs, n_missing = pairs_of_names(rows, row_of)
    if not len(pairs):
        raise InputError(
            f"{options.pairs_file}: none of its paths is among the data's. The first is {rows[0][1]}, "
            f"the data's first is {crops.names[0]}"
        )
    notes = [f"{n_missing} of {len(rows)} pairs name crops that are missing or silent"] if n_missing else []
    wrong = int(((crops.singer[pairs.first] == crops.singer[pairs.second]) != pairs.labels).sum())
    return pairs, [*notes, *([f"{wrong} pairs have another label than the data's singers say"] if wrong else [])]
