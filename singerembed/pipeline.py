"""The run: what is to be done, by which processes, and the merge of what they publish."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from singerembed import storage
from singerembed.catalog import Catalog
from singerembed.devices import choose_devices, embed_on_devices
from singerembed.engine.file import read_engine_file
from singerembed.engine.load import bundled_engine_path
from singerembed.errors import OutputError, UsageError
from singerembed.options import RunOptions
from singerembed.parquet import RESERVED_COLUMNS, Counts
from singerembed.parts import PartStore, differences
from singerembed.previous import PreviousOutput
from singerembed.units import Job, Listener, UnitRunner


@dataclass(frozen=True)
class RunSummary:
    """How a run ended."""

    output: str
    counts: Counts  # of the whole output
    embedded: Counts  # of what this run itself embedded
    seconds: float
    units_before: int = 0  # units that an earlier run had finished
    already_done: bool = False


def run(
    catalog: str,
    output: str,
    *,
    engine: str | None = None,
    options: RunOptions | None = None,
    listeners: Sequence[Listener] = (),
    stop: Callable[[], int] = lambda: 0,
) -> RunSummary:
    """Embed every track of the catalogue `catalog` into the Parquet file `output`; go on where an earlier run ended.

    `engine` is an engine file (default: the bundled one). `stop` returns 0, or the number of a signal on which to stop.
    Raises CatalogError, EngineError, OutputError, or InterruptedRun after a stop.
    """
    options = options or RunOptions()
    started = time.monotonic()
    fingerprint = Catalog(catalog, options.columns, RESERVED_COLUMNS).fingerprint()
    engine = engine or bundled_engine_path()
    engine_file = read_engine_file(engine)
    devices = choose_devices(engine_file.backend, options.devices)
    identity = {
        "catalog": {"name": storage.redacted(catalog).rpartition("/")[2], "sha256": fingerprint.sha256},
        "engine": {"name": engine_file.spec.name, "sha256": engine_file.sha256},
        "options": options.decisive(),
        "version": version("singerembed"),
    }
    with PartStore(output) as parts, closing(PreviousOutput(output)) as previous:
        if options.restart:
            parts.remove()
        elif previous.exists:
            _check_same(output, previous, identity)
            if not (options.retry_errors and previous.counts.errors):
                storage.remove_folder(parts.folder)
                return RunSummary(output, previous.counts, Counts(), time.monotonic() - started, already_done=True)
        elif options.retry_errors:
            raise UsageError(f"--retry-errors is for a finished output, and {output} does not exist. Run without it")
        retrying = previous if options.retry_errors and not options.restart else None
        parts.open(identity | {"retrying": dict(retrying.counts.errors)} if retrying else identity)
        units_before = len(parts.done)
        for listener in listeners if units_before else ():
            listener.resumed(units_before)
        job = Job(catalog, output, engine, options, devices[0])
        runner = UnitRunner(job, parts, listeners, stop)
        if retrying:
            embedded = runner.retry_errors(retrying)
        elif len(devices) > 1:
            embedded = embed_on_devices(job, devices, parts, fingerprint.rows, listeners, stop)
        else:
            embedded = runner.embed_all(fingerprint.rows)
        metadata = {**identity, "spec": engine_file.spec.to_dict(), "verification": engine_file.verification}
        counts = parts.merge(runner.schema, metadata | {"engine_build": engine_file.build}, retrying)
    return RunSummary(output, counts, embedded, time.monotonic() - started, units_before)


def _check_same(output: str, previous: PreviousOutput, identity: dict[str, Any]) -> None:
    different = differences({key: previous.metadata.get(key) for key in identity}, identity)
    if different:
        raise OutputError(
            f"{output} comes from another run: {', '.join(different)}. Give another output, or --restart to replace it"
        )
