"""Run a catalogue through an engine into an output: check, resume, choose devices, embed, merge."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from singerembed import storage
from singerembed.catalog.formats import Fingerprint
from singerembed.catalog.read import Catalog
from singerembed.catalog.scan import ScanCounts, is_source
from singerembed.engine.file import read_engine_file, read_separator_file
from singerembed.engine.load import bundled_engine_path
from singerembed.errors import OutputError, UsageError
from singerembed.jobs.crash_journal import gather_suspects
from singerembed.jobs.error_watch import ErrorWatch
from singerembed.jobs.folder import catalog_of
from singerembed.jobs.gpus import choose_devices, embed_on_devices
from singerembed.jobs.options import RunOptions
from singerembed.jobs.ray_cluster import embed_on_ray
from singerembed.jobs.ray_worker import ClusterJob
from singerembed.jobs.units import Job, Listener, UnitRunner
from singerembed.output.finished import FinishedOutput
from singerembed.output.parts import PartStore, differences
from singerembed.output.schema import RESERVED_COLUMNS, Counts


@dataclass(frozen=True)
class RunSummary:
    """Result of a run."""

    output: str
    counts: Counts  # of the whole output
    embedded: Counts  # of the tracks that this run embedded itself
    seconds: float
    units_before: int = 0  # units that an earlier run had finished
    already_done: bool = False
    unreadable_folders: int = 0  # whose recordings are missing, where the run was over a folder


def run(
    catalog: str,
    output: str,
    *,
    engine: str | None = None,
    options: RunOptions | None = None,
    listeners: Sequence[Listener] = (),
    stop: Callable[[], int] = lambda: 0,
    say: Callable[[str, str], None] = lambda _what, _text: None,
    scanned: Callable[[ScanCounts], None] = lambda _counts: None,
) -> RunSummary:
    """Embed every track of the catalogue `catalog`, or every recording in the folder of that name, into `output`, a
    Parquet file or a folder of them; go on where an earlier run ended.

    `engine` is an engine file (default: the bundled one). `stop` returns 0, or the number of a signal on which to stop.
    `say` is called with what a person should know of the catalogue: a subject and a text; `scanned` now and then while
    a folder is scanned.
    Raises CatalogError, EngineError, OutputError, ClusterError, or InterruptedRun after a stop.
    """
    options = options or RunOptions()
    output = output.rstrip("/") if options.partitioned else output
    if options.ray is not None:  # nodes have working folders of their own
        catalog, output = storage.absolute(catalog), storage.absolute(output)
    started = time.monotonic()
    catalog, output = storage.local_path(catalog), storage.local_path(output)
    unreadable = 0
    if is_source(catalog):
        catalog, unreadable = catalog_of(catalog, output, options, say, scanned, stop)
    fingerprint = _examine(catalog, options, say)
    engine = engine or bundled_engine_path()
    engine_file = read_engine_file(engine)
    separator_file = read_separator_file(options.separate) if options.separate else None
    if options.ray is not None and options.devices is not None:
        raise UsageError("--devices is for this machine's GPUs; with --ray, Ray gives them out. Leave one of them out")
    devices = (0,) if options.ray is not None else choose_devices(engine_file.backend, options.devices)
    identity = {
        "catalog": {"name": storage.redacted(catalog).rpartition("/")[2], "sha256": fingerprint.sha256},
        "engine": {"name": engine_file.spec.name, "sha256": engine_file.sha256},
        "separator": separator_file
        and {
            "name": separator_file.spec.name,
            "sha256": separator_file.sha256,
            "min_vocals_db": options.min_vocals_db,
        },
        "options": options.decisive(),
        "version": version("singerembed"),
    }
    partitioned = options.partitioned
    with (
        PartStore(output, partitioned=partitioned) as parts,
        closing(FinishedOutput(output, partitioned=partitioned)) as previous,
    ):
        if options.restart:
            parts.remove()
        elif previous.exists:
            _check_same(output, previous, identity)
            if not (options.retry_errors and previous.counts.errors):
                parts.discard()
                seconds = time.monotonic() - started
                return RunSummary(
                    output, previous.counts, Counts(), seconds, already_done=True, unreadable_folders=unreadable
                )
        elif options.retry_errors:
            raise UsageError(f"--retry-errors is for a finished output, and {output} does not exist. Run without it")
        retrying = previous if options.retry_errors and not options.restart else None
        parts_identity = identity | {"retrying": dict(retrying.counts.errors)} if retrying else identity
        parts.open(parts_identity, retrying=retrying is not None)
        gather_suspects(parts.local_folder)
        units_before = len(parts.done)
        for listener in listeners if units_before else ():
            listener.resumed(units_before)
        job = Job(catalog, output, engine, options, partitioned, devices[0], unchanged_since=fingerprint)
        listeners = [*listeners, ErrorWatch(options.max_errors, say)]
        runner = UnitRunner(job, parts, listeners, stop)
        to_embed = retrying.counts.error_tracks if retrying else fingerprint.rows
        if options.ray is not None:
            files = engine_file, separator_file
            cluster_job = ClusterJob(output, retrying is not None, parts_identity, options, *files, runner.schema)
            work = runner.open_units(retrying)
            embedded = embed_on_ray(options.ray, cluster_job, work, parts, to_embed, listeners, stop)
        elif len(devices) > 1 and not retrying:
            embedded = embed_on_devices(job, devices, parts, to_embed, listeners, stop)
        else:
            embedded = runner.embed_all(to_embed, retrying)
        metadata = {**identity, "spec": engine_file.spec.to_dict(), "verification": engine_file.verification}
        counts = parts.finish(runner.schema, metadata | {"engine_build": engine_file.build}, retrying)
    return RunSummary(output, counts, embedded, time.monotonic() - started, units_before, unreadable_folders=unreadable)


def _examine(path: str, options: RunOptions, say: Callable[[str, str], None]) -> Fingerprint:
    """Read the whole catalogue once: hash it, and say what is odd about it. Raises CatalogError and UsageError."""
    catalog = Catalog(path, options.columns, RESERVED_COLUMNS)
    fingerprint = catalog.fingerprint()
    check = catalog.check(fingerprint)
    if not fingerprint.rows:
        say("warning", f"{path} has no rows: the output will have none either")
    for text in catalog.remarks + check.notes:
        say("catalog", f"{path}: {text}")
    if check.doubled_ids and options.pool == "mean":
        raise UsageError(f"{path}: {check.doubled_ids}; --pool mean needs one id for each recording. Mend the ids")
    return fingerprint


def _check_same(output: str, previous: FinishedOutput, identity: dict[str, Any]) -> None:
    different = differences({key: previous.metadata.get(key) for key in identity}, identity)
    if different:
        raise OutputError(
            f"{output} comes from another run: {', '.join(different)}. Give another output, or --restart to replace it"
        )
