"""Formats the results of an evaluation as text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math

from singerembed.evaluation.result import Evaluation, Measure, ModelResult

HEADER = (
    "model", "parameters", "rate", "dim", "poster", "EER %", "EER % of two recordings", "EER % centred", "MNR %",
    "nearest %", "top-1 %", "top-5 %", "effective rank",
)  # fmt: skip


def table_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Return the cells of the table, one row per model, in the order of HEADER."""
    return [_row(result) for result in evaluation.results]


def _row(result: ModelResult) -> tuple[str, ...]:
    facts = result.table.facts
    return (
        f"{facts.name} (layer {result.layer})" if result.layer_eer else facts.name,
        "?" if facts.n_parameters is None else f"{facts.n_parameters / 1e6:.1f} M",
        f"{facts.sample_rate / 1000:g} kHz",
        f"{len(result.layer_eer)} x {result.dim}" if result.layer_eer else str(result.dim),
        facts.poster or "-",
        percent(result.eer),
        percent(result.conditions["two recordings"]),
        *(percent(each) for each in (result.centred, result.mnr, result.nearest, result.top1, result.top5)),
        "-" if math.isnan(result.effective_rank) else f"{result.effective_rank:.1f}",
    )


def percent(measure: Measure) -> str:
    """Format a share as a percentage with its interval; "-" if there is none."""
    if math.isnan(measure.value):
        return "-"
    text = f"{100 * measure.value:.1f}"
    return text if math.isnan(measure.low) else f"{text} [{100 * measure.low:.1f}, {100 * measure.high:.1f}]"


def as_text(evaluation: Evaluation) -> str:
    """Return the table for a terminal, in aligned columns."""
    rows = [HEADER, *table_rows(evaluation)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def as_markdown(evaluation: Evaluation) -> str:
    """Return the table, the error rates by condition and by layer, and the notes, as Markdown."""
    lines = [_md(HEADER), _md(["---"] * len(HEADER)), *map(_md, table_rows(evaluation))]
    names = list(evaluation.results[0].conditions)
    lines += [
        "",
        "Equal error rate in per cent by condition:",
        "",
        _md(["model", *names]),
        _md(["---"] * (len(names) + 1)),
    ]
    for result in evaluation.results:
        lines.append(_md([result.table.facts.name, *(percent(result.conditions[name]) for name in names)]))
    for result in evaluation.results:
        if result.layer_eer:
            layers = ", ".join(f"{layer}: {100 * rate:.1f}" for layer, rate in result.layer_eer.items())
            lines += ["", f"{result.table.facts.name}, equal error rate by layer, chosen on these pairs: {layers}"]
    return "\n".join([*lines, *([""] if evaluation.notes else []), *(f"- {note}" for note in evaluation.notes), ""])


def _md(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def as_csv(evaluation: Evaluation) -> str:
    """Return CSV with one line per value: model, layer, metric, value, low, high."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "layer", "metric", "value", "low", "high"])
    for result in evaluation.results:
        measures = {"eer": result.eer, "eer centred": result.centred, "mnr": result.mnr, "nearest": result.nearest}
        measures |= {"top1": result.top1, "top5": result.top5, "effective rank": Measure(result.effective_rank)}
        measures |= {f"eer {name}": measure for name, measure in result.conditions.items()}
        for name, measure in measures.items():
            figures = ["" if math.isnan(v) else repr(v) for v in (measure.value, measure.low, measure.high)]
            writer.writerow([result.table.facts.name, result.layer, name, *figures])
    return out.getvalue()
