"""Describe a file: an engine, a checkpoint, an output, or the parts of an unfinished run."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from singerembed import storage
from singerembed.engine.file import MAGIC, SEPARATOR, is_engine, read_any_engine_file
from singerembed.errors import UsageError
from singerembed.model.separator_spec import SeparatorSpec
from singerembed.output import finished
from singerembed.output.finished import FinishedOutput
from singerembed.output.parts import count_parts

_PARQUET_MAGIC = b"PAR1"


def describe(path: str) -> dict[str, Any]:
    """Describe `path`: kind, origin and verification, as JSON types.

    Raises UsageError if it is nothing that singerembed knows, and the errors of the file's own reader.
    """
    if not storage.is_remote(path) and Path(path).is_dir():
        if (Path(path) / "run.json").exists():
            return _parts(path)
        return _output(path, partitioned=True) if finished.is_partitioned(path) else _checkpoint(path)
    try:
        with storage.open_input(path) as file:
            start = file.read(len(MAGIC))
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror or exc}") from exc
    if is_engine(start):
        return _engine(path)
    if start.startswith(_PARQUET_MAGIC):
        return _output(path, partitioned=False)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _checkpoint(path)
    raise UsageError(f"{path} is neither an engine, a checkpoint, a Parquet file nor a parts folder")


def _engine(path: str) -> dict[str, Any]:
    engine = read_any_engine_file(path)
    return {
        "kind": SEPARATOR if isinstance(engine.spec, SeparatorSpec) else "engine",
        "backend": engine.backend,
        "sha256": engine.sha256,
        "payload_bytes": len(engine.payload),
        "spec": engine.spec.to_dict(),
        "build": engine.build,
        "verification": engine.verification,
    }


def _checkpoint(path: str) -> dict[str, Any]:
    from singerembed.model.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path)
    return {
        "kind": "checkpoint",
        "layout": checkpoint.layout,
        "spec": checkpoint.spec.to_dict(),
        "training": checkpoint.facts,
    }


def _output(path: str, *, partitioned: bool) -> dict[str, Any]:
    kind = "partitioned output" if partitioned else "output"
    with closing(FinishedOutput(path, partitioned=partitioned)) as output:
        return {"kind": kind, "counts": output.counts.to_dict(), **output.metadata}


def _parts(path: str) -> dict[str, Any]:
    identity = json.loads((Path(path) / "run.json").read_text(encoding="utf-8"))
    return {
        "kind": "parts of an unfinished run",
        "units_done": count_parts(path.rstrip("/").removesuffix(".parts")),
        **identity,
    }
