"""Renders an evaluation as a self-contained HTML page: tables, heat maps, 3D maps, DET curves, provenance."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from singerembed.evaluation.baselines.base import require
from singerembed.evaluation.metrics import Floats
from singerembed.evaluation.result import Evaluation, ModelResult
from singerembed.evaluation.table import HEADER, percent, table_rows
from singerembed.evaluation.views import DET_TICKS, View

_MAX_CURVE_POINTS = 400
_MAX_COHESION_ROWS = 500

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1b1f24 }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem } h3 { font-size: 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #e4e7eb; white-space: nowrap }
.fits th, .fits td:first-child { white-space: normal; overflow-wrap: anywhere } .fits td { vertical-align: top }
details { margin-top: 2.5rem } summary { cursor: pointer; font-weight: bold }
th { border-bottom: 2px solid #8a939c } .wide { overflow-x: auto } .scroll { max-height: 24rem; overflow: auto }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem }
.plot { height: 32rem; min-width: 0 } .note { color: #57606a } button { font: inherit; padding: .15rem .8rem }
.map { position: relative; min-width: 0 } .map > button { position: absolute; right: 0 }
.map canvas { display: block; width: 100%; height: 26rem; touch-action: none }
.tip { position: absolute; left: 0; top: 0; max-width: 50%; background: #fff; border: 1px solid #8a939c;
  padding: .1rem .5rem; font-size: .8rem; white-space: pre-line; overflow-wrap: anywhere; pointer-events: none }
.legend { display: flex; flex-wrap: wrap; max-height: 6rem; overflow: auto }
.legend button { border: 0; background: none; color: inherit; font-size: .8rem; padding: 0 .4rem; cursor: pointer }
.legend [aria-pressed=true] { background: #e4e7eb; font-weight: bold }
pre { background: #f6f8fa; padding: 1rem; overflow-x: auto; font-size: .8rem }
"""

# Draws `figures` and `maps`, and then sets data-drawn of the body to their number.
_SCRIPT = """
const read = id => Object.entries(JSON.parse(document.getElementById(id).textContent));
const maps = Object.fromEntries(read('maps').map(([id, map]) => [id, new PointMap(document.getElementById(id), map)]));
const options = {responsive: true, displaylogo: false};
const drawn = read('figures').map(([id, f]) => Plotly.newPlot(id, f.data, f.layout, options));
Promise.all(drawn).then(() => { document.body.dataset.drawn = drawn.length + Object.keys(maps).length; });
"""


def make_page(evaluation: Evaluation, views: list[View], title: str) -> str:
    """Return the page as HTML without external resources. Raises MissingDependencyError without plotly."""
    plotly_js = require("plotly.offline", "drawing the page", "plotly").get_plotlyjs()
    map_js = (resources.files("singerembed.evaluation") / "map.js").read_text(encoding="utf-8")
    figures: dict[str, Any] = {}
    maps: dict[str, Any] = {}
    body = [f"<h1>{html.escape(title)}</h1>", _summary(evaluation), _table(HEADER, table_rows(evaluation), fits=True)]
    body.append(
        "<p class=note>In brackets: 95 % intervals over singers. EER: equal error rate of pairs of crops. MNR: mean "
        "normalised rank of a singer's crop among crops of others. Nearest: crops whose most similar crop of another "
        "recording is the same singer's. Top-1, top-5: linear probe on unseen recordings. Effective rank: how "
        "many directions the embeddings use.</p>"
    )
    body += [f"<p class=note>{html.escape(note)}</p>" for note in evaluation.notes]
    names = list(evaluation.results[0].conditions)
    conditions = [(r.table.facts.name, *(percent(r.conditions[name]) for name in names)) for r in evaluation.results]
    body += ["<h2>Equal error rate by condition, %</h2>", _table(("model", *names), conditions)]
    body += _layers(evaluation)
    if any(result.curve is not None for result in evaluation.results):
        figures["det"] = _det(evaluation)
        body += ["<h2>Detection error trade-off</h2>", '<div class=plot id="det"></div>']
    for i, (result, view) in enumerate(zip(evaluation.results, views, strict=True)):
        body += _model_section(i, result, view, figures, maps)
    provenance = html.escape(json.dumps(_provenance(evaluation), indent=1))
    summary = "<summary>Provenance: data, models, options and versions, as JSON</summary>"
    body.append(f"<details>{summary}<pre>{provenance}</pre></details>")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">',
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
            f"<script>{plotly_js}</script></head><body>",
            *body,
            f'<script type="application/json" id="figures">{_json(figures)}</script>',
            f'<script type="application/json" id="maps">{_json(maps)}</script>',
            f"<script>{map_js}{_SCRIPT}</script></body></html>",
        ]
    )


def _json(value: Any) -> str:
    """Return JSON that is safe inside a script element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, fits: bool = False) -> str:
    """Return a table; one that `fits` breaks its header and its intervals into lines rather than scroll."""

    def line(cells: tuple[str, ...], tag: str) -> str:
        texts = [html.escape(cell).replace(" [", "<br>[" if fits else " [") for cell in cells]
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"

    kind = "fits" if fits else "wide"
    return f"<div class={kind}><table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table></div>"


def _summary(evaluation: Evaluation) -> str:
    facts = evaluation.to_dict()
    pairs = facts["pairs"]
    return (
        f"<p>{html.escape(facts['data'])}: {facts['singers']:,} singers, {facts['recordings']:,} recordings, "
        f"{facts['crops']:,} crops of 4 s; {pairs['one_singer']:,} pairs of one singer and "
        f"{pairs['two_singers']:,} of two "
        f"({html.escape(pairs['from'])}).</p>"
    )


def _layers(evaluation: Evaluation) -> list[str]:
    parts = []
    for result in evaluation.results:
        if result.layer_eer:
            rows = [(layer, f"{100 * rate:.1f}") for layer, rate in result.layer_eer.items()]
            name = html.escape(result.table.facts.name)
            parts.append(f"<h2>{name}: layer {html.escape(result.layer)} was chosen on these pairs</h2>")
            parts.append(_table(("layer", "EER %"), rows))
    return parts


def _model_section(i: int, result: ModelResult, view: View, figures: dict[str, Any], maps: dict[str, Any]) -> list[str]:
    figures[f"heat{i}"] = _heat_map(view)
    maps[f"map{i}"] = _map(view)
    cut = f" of {view.n_singers}, those with most crops" if len(view.heat_names) < view.n_singers else ""
    section = [
        f"<h2>{html.escape(view.model)}</h2><p class=note>{html.escape(result.table.facts.description)}</p>",
        f"<div class=side><div><h3>Average similarity: {len(view.heat_names)} singers{cut}, 100 draws of two crops "
        f'each, ordered by clustering</h3><div class=plot id="heat{i}"></div></div>',
        f"<div><h3>t-SNE: {len(view.points):,} of {view.n_crops:,} crops</h3><div class=map id='map{i}'></div>"
        "<p class=note>Drag or arrow keys rotate, the wheel zooms; click a singer or a point to highlight it.</p>"
        "</div></div>",
    ]
    if result.histogram is not None:
        figures[f"scores{i}"] = _histogram(result)
        section.append(f'<h3>Scores</h3><div class=plot style="height:20rem" id="scores{i}"></div>')
    section += ["<h3>Singers</h3><div class=scroll>", _cohesion_table(view), "</div>"]
    return section


def _cohesion_table(view: View) -> str:
    names = view.heat_names
    header = ("singer", "crops", "recordings", "similarity within", "nearest singer", "similarity to it",
              "crops nearest to own centroid", "confused with")  # fmt: skip
    rows = [
        (
            names[c.singer], str(c.n_crops), str(c.n_recordings), _number(c.within),
            names[c.nearest] if c.nearest >= 0 else "-", _number(c.nearest_similarity),
            "-" if math.isnan(c.recognised) else f"{100 * c.recognised:.0f} %",
            f"{names[c.confused_with]} ({c.confusions})" if c.confused_with >= 0 else "-",
        )
        for c in view.cohesion[:_MAX_COHESION_ROWS]
    ]  # fmt: skip
    return _table(header, rows)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _rounded(values: Any, decimals: int = 4) -> list[Any]:
    """Return nested lists of rounded numbers; NaN and infinity become None."""
    rounded = np.round(np.asarray(values, float), decimals)
    cells = rounded.astype(object)
    cells[~np.isfinite(rounded)] = None
    return list(cells.tolist())


def _heat_map(view: View) -> dict[str, Any]:
    names = list(map(str, view.heat_names))
    trace = {
        "type": "heatmap", "x": names, "y": names, "z": _rounded(view.heat), "colorscale": "Viridis",
        "hovertemplate": "%{y}<br>%{x}<br>%{z:.3f}<extra></extra>",
    }  # fmt: skip
    axis = {"type": "category", "tickfont": {"size": 9}}
    layout = {
        "xaxis": axis,
        "yaxis": {**axis, "autorange": "reversed", "scaleanchor": "x"},
        "margin": {"t": 10, "r": 0},
    }
    return {"data": [trace], "layout": layout}


def _map(view: View) -> dict[str, Any]:
    """Return the input of PointMap in map.js, with points scaled into the unit ball."""
    points = view.points - view.points.mean(axis=0)
    points /= max(float(np.linalg.norm(points, axis=1).max()), 1e-9)
    return {
        "points": _rounded(points.ravel()),
        "singer": view.point_singer.tolist(),
        "singers": list(map(str, view.heat_names)),
        "crops": view.point_names,
    }


def _histogram(result: ModelResult) -> dict[str, Any]:
    assert result.histogram is not None
    edges, positive, negative = result.histogram
    middle = _rounded((edges[1:] + edges[:-1]) / 2)
    traces = [
        {"type": "bar", "x": middle, "y": _rounded(counts / max(1, counts.sum()), 5), "name": name, "opacity": 0.6}
        for counts, name in ((positive, "one singer"), (negative, "two singers"))
    ]
    axis = {"title": {"text": "cosine similarity"}}
    layout = {"barmode": "overlay", "bargap": 0, "xaxis": axis, "margin": {"t": 10},
              "yaxis": {"title": {"text": "share of pairs"}}}  # fmt: skip
    return {"data": traces, "layout": layout}


def _det(evaluation: Evaluation) -> dict[str, Any]:
    deviate = require("scipy.special", "the DET curve", "scipy").ndtri
    traces = []
    for result in evaluation.results:
        if result.curve is not None:
            accepted, rejected = _thinned(result.curve.false_acceptance, result.curve.false_rejection)
            traces.append(
                {
                    "type": "scatter", "mode": "lines", "name": result.table.facts.name,
                    "x": _rounded(deviate(accepted)), "y": _rounded(deviate(rejected)),
                    "text": [f"{100 * a:.2f} % / {100 * r:.2f} %" for a, r in zip(accepted, rejected, strict=True)],
                    "hovertemplate": "%{text}",
                }
            )  # fmt: skip
    rates = np.array(DET_TICKS)
    axis = {"tickvals": _rounded(deviate(rates)), "ticktext": [f"{100 * r:g} %" for r in rates],
            "range": _rounded(deviate(rates[[0, -1]]))}  # fmt: skip
    x, y = ({**axis, "title": {"text": text}} for text in ("false acceptances", "false rejections"))
    return {"data": traces, "layout": {"xaxis": x, "yaxis": {**y, "scaleanchor": "x"}, "margin": {"t": 10}}}


def _thinned(accepted: Floats, rejected: Floats) -> tuple[Floats, Floats]:
    """Return at most _MAX_CURVE_POINTS points of a curve, without rates of 0, whose normal deviate is infinite."""
    inside = np.flatnonzero((accepted > 0) & (rejected > 0))
    some = (
        inside[np.linspace(0, len(inside) - 1, min(len(inside), _MAX_CURVE_POINTS)).astype(int)]
        if len(inside)
        else inside
    )
    return accepted[some], rejected[some]


def _provenance(evaluation: Evaluation) -> dict[str, Any]:
    stored = evaluation.data.stored
    return {"evaluation": evaluation.to_dict(), **({"run": stored.metadata} if stored else {})}
