"""The command `inspect`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from singerembed.cli.console import verbosity_options

_SHORT_HASH = 12  # characters


@click.command()
@click.argument("file")
@click.option("--full", is_flag=True, help="Print everything that the file says of itself.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@verbosity_options
def inspect(file: str, full: bool, as_json: bool) -> None:
    """Say what FILE is, from what it was made, and how it was verified.

    FILE is an engine of an encoder or a separator, a checkpoint, what run has written, the .parts folder of an
    unfinished run, or an index.
    """
    from singerembed.jobs.describe import describe
    from singerembed.search.store import MANIFEST

    facts = _index(file) if (Path(file) / MANIFEST).exists() else describe(file)
    if as_json:
        click.echo(json.dumps(facts))
        return
    lines = _outline(facts) if full else (f"{what:<12}{text}" for what, text in _summary(file, facts) if text)
    for line in lines:
        click.echo(line)


def _index(path: str) -> dict[str, Any]:
    from singerembed.search.store import StoredIndex

    index = StoredIndex(path)
    tracks, crops = int(index.active.sum()), int(index.tracks["n_crops"].to_numpy()[index.active].sum())
    scoring = {"singer_column": index.singer_column, "scoring": index.scoring.kind}
    facts = {"engine": index.engine, "spec": index.manifest["spec"]}
    return {"kind": "index", "tracks": tracks, "crops": crops, **scoring, **facts}


def _summary(file: str, facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The facts a person asks for first, a line each: what it is about, and the text (empty: leave it out)."""
    yield facts["kind"].split()[0], f"{file} ({facts['kind']})"
    if "tracks" in facts:
        yield "rows", f"{facts['tracks']:,} tracks, {facts['crops']:,} crops"
        yield "scores", f"{facts['scoring']}; singers by column {facts['singer_column'] or '(none)'}"
    if "counts" in facts:
        counts = facts["counts"]
        minutes = counts["audio_seconds"] / 60
        crops = f"{counts['crops']:,} crops ({counts['silent']:,} silent), {minutes:,.1f} minutes of audio"
        yield "rows", f"{counts['tracks']:,} tracks, {crops}"
        yield "errors", "   ".join(f"{code} {count:,}" for code, count in counts["errors"].items()) or "none"
    if "units_done" in facts:
        yield "units", f"{facts['units_done']:,} done"
    for name in ("catalog", "engine"):
        if name in facts:
            yield name, f"{facts[name]['name']}, sha256 {facts[name]['sha256'][:_SHORT_HASH]}..."
    yield "backend", facts.get("backend", "")
    yield "layout", facts.get("layout", "")
    yield "model", _model(facts.get("spec", {}))
    yield "options", _one_line(facts.get("options", {}))
    build = facts.get("build") or facts.get("engine_build") or {}
    yield "made from", _one_line({"checkpoint": build.get("checkpoint"), "stored": build.get("stored")})
    training = build.get("training") or facts.get("training") or {}
    yield "training", _one_line({name: training.get(name) for name in ("method", "epoch", "step", "seed")})
    found = facts.get("verification") or {}
    if "cosine" in found:
        closeness = f"cosine {found['cosine']:.7f}, largest difference {found.get('difference', 0):.1e} of the norm"
        yield "verified", f"{found.get('crops')} crops against {found.get('against')}: {closeness}"
    if "difference_db" in found:
        yield "verified", f"a made mixture against {found['against']}: difference {found['difference_db']:.1f} dB"
    yield "versions", _one_line(build.get("versions") or {"singerembed": facts.get("version")})
    yield "", "everything: --full or --json"


def _model(spec: dict[str, Any]) -> str:
    if not spec:
        return ""
    if "crop_samples" not in spec:  # a separator's
        return f"{spec['name']}, {spec['channels']} channels at {spec['sample_rate']:,} Hz"
    crop = f"crops of {spec['crop_samples'] / spec['sample_rate']:g} s at {spec['sample_rate']:,} Hz"
    mel = f"{spec['n_mels']} mel bands, normalise {spec['normalise']}"
    weights = f"weights {spec['weights_sha256'][:_SHORT_HASH] or 'unknown'}..."
    if spec.get("centred_on"):
        weights = f"centred on {spec['centred_on']}, {weights}"
    encoder = f"{spec['name']} ({spec['method']}, {spec['backbone']}, {spec['embedding_dim']} dimensions)"
    return f"{encoder}, {spec['precision']}, {crop}, {mel}, {weights}"


def _one_line(values: dict[str, Any]) -> str:
    """Names and values, those that are None or empty left out."""
    flat = {
        name: _one_line(value).join("()") if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None and value != {}
    }
    return ", ".join(f"{name} {value}" for name, value in flat.items())


def _outline(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    width = max((len(key) for key in facts), default=0)
    for key, value in facts.items():
        if isinstance(value, dict):
            yield f"{indent}{key}"
            yield from _outline(value, indent + "  ")
        else:
            yield f"{indent}{key:<{width}}  {value}"
