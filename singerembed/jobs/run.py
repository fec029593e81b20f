"""Run a catalogue through an engine into an output: check, resume, choose devices, embed, merge."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from singerembed import storage
from singerembed.catalog.formats import Fingerprint
from singerembed.catalog.read import Catalog
from singerembed.catalog.scan import ScanCounts, is_source
from singerembed.engine.file import EngineFile, SeparatorFile, read_engine_file, read_separator_file
from singerembed.engine.load import bundled_engine_path
from singerembed.errors import InterruptedRun, OutputError, SingerEmbedError, UsageError
from singerembed.jobs.crash_journal import gather_suspects
from singerembed.jobs.error_watch import ErrorWatch
from singerembed.jobs.folder import catalog_of
from singerembed.jobs.gpus import choose_devices, embed_on_devices
from singerembed.jobs.mixture_watch import MixtureWatch
from singerembed.jobs.options import RunOptions
from singerembed.jobs.ray_cluster import embed_on_ray
from singerembed.jobs.ray_worker import ClusterJob
from singerembed.jobs.retry import FailedTracks
from singerembed.jobs.track import Stopped
from singerembed.jobs.units import Job, Listener, UnitRunner, Work, publish_kept
from singerembed.jobs.update import UpdateCounts, UpdatePlan, new_update, take_in, take_in_interrupted
from singerembed.output.finished import FinishedOutput
from singerembed.output.known_tracks import KnownTracks
from singerembed.output.parts import PartStore, differences
from singerembed.output.schema import RESERVED_COLUMNS, Counts


@dataclass(frozen=True)
class RunSummary:
    """Result of a run."""

    output: str
    counts: Counts  # of the whole output
    embedded: Counts  # of the tracks that this run embedded itself
    seconds: float = 0.0
    units_before: int = 0  # units that an earlier run had finished
    already_done: bool = False
    unreadable_folders: int = 0  # whose recordings are missing, where the run was over a folder
    update: UpdateCounts | None = None  # what an update did
    at_deadline: bool = False  # it passed, and not everything is done


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
    Raises UsageError, CatalogError, EngineError, OutputError, ClusterError, or InterruptedRun after a stop.
    """
    options = options or RunOptions()
    if output.endswith("/") and not options.partitioned:
        raise UsageError(f"{output} names a folder: say --partitioned too, or give the name of a file")
    output = output.rstrip("/")
    if options.ray is not None:  # nodes have working folders of their own
        catalog, output = storage.absolute(catalog), storage.absolute(output)
    started = time.monotonic()
    catalog, output = storage.local_path(catalog), storage.local_path(output)
    engine = engine or bundled_engine_path()
    engine_file = read_engine_file(engine)
    separator_file = read_separator_file(options.separate) if options.separate else None
    unreadable = 0
    if is_source(catalog):
        catalog, unreadable = catalog_of(catalog, output, options, say, scanned, stop)
    fingerprint = _examine(catalog, options, say)
    if options.ray is not None and options.devices is not None:
        raise UsageError("--devices is for this machine's GPUs; with --ray, Ray gives them out. Leave one of them out")
    devices = (0,) if options.ray is not None else choose_devices(engine_file, options.devices)
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
    job = Job(catalog, output, engine, options, options.partitioned, devices[0], unchanged_since=fingerprint)
    with PartStore(output, partitioned=options.partitioned) as parts:
        files = engine_file, separator_file
        mixtures = MixtureWatch(say)
        watches = ErrorWatch(options.max_errors, say), mixtures
        one = _Run(job, devices, files, identity, parts, [*listeners, *watches], stop)
        try:
            summary = one.run(fingerprint.rows, say, all_was_seen=not unreadable)
        except SingerEmbedError as exc:
            if parts.identity() is None and not isinstance(exc, InterruptedRun):
                parts.discard()  # nothing was begun
            raise
    mixtures.conclude()
    return replace(summary, seconds=time.monotonic() - started, unreadable_folders=unreadable)


class _Run:
    """One run, once its catalogue, engine and output are known, and the output's lock is held."""

    def __init__(
        self,
        job: Job,
        devices: tuple[int, ...],
        files: tuple[EngineFile, SeparatorFile | None],
        identity: dict[str, Any],
        parts: PartStore,
        listeners: Sequence[Listener],
        stop: Callable[[], int],
    ) -> None:
        self._job, self._devices, self._identity = job, devices, identity
        engine_file, _ = self._files = files
        self._parts, self._listeners, self._stop = parts, listeners, stop
        self._runner = UnitRunner(job, parts, listeners, stop)
        verification, build = engine_file.verification, engine_file.build
        self._facts = {"spec": engine_file.spec.to_dict(), "verification": verification, "engine_build": build}

    def run(self, rows: int, say: Callable[[str, str], None], *, all_was_seen: bool) -> RunSummary:
        """Embed all `rows` of the catalogue, or what is to be embedded of them."""
        options, output = self._job.options, self._job.output
        with self._finished_output() as previous:
            if options.restart:
                self._parts.remove()
            elif options.update and (previous.exists or self._parts.is_of_another(self._identity)):
                if take_in_interrupted(self._parts, previous, self._identity, self._facts):
                    try:
                        return self._update(say, all_was_seen=all_was_seen)
                    except Stopped as exc:
                        raise self._parts.interrupted(self._stop()) from exc
            elif previous.exists:
                _check_same(output, previous, self._identity)
                if options.retry_errors and previous.counts.errors:
                    return self._retry(previous)
                if self._parts.identity() is None:  # else a retry or an update was stopped, and can go on
                    self._parts.discard()
                return RunSummary(output, previous.counts, Counts(), already_done=True)
            elif options.retry_errors:
                raise UsageError(
                    f"--retry-errors is for a finished output, and {output} does not exist. Run without it"
                )
        self._parts.open(self._identity)
        return self._embed(self._runner.open_units(), rows, None, units_before=len(self._parts.done))

    def _finished_output(self) -> closing[FinishedOutput]:
        return closing(FinishedOutput(self._job.output, partitioned=self._job.partitioned))

    def _retry(self, previous: FinishedOutput) -> RunSummary:
        self._identity["retrying"] = dict(previous.counts.errors)
        self._parts.stage()
        self._parts.open(self._identity)
        with ExitStack() as stack:
            known = stack.enter_context(closing(KnownTracks(previous)))
            today = stack.enter_context(closing(self._runner.todays_tracks(with_facts=False)))
            failed = FailedTracks(known, today, self._runner.schema)
            work, before = failed.work(self._parts.done, self._listeners), len(self._parts.done)
            return self._embed(work, len(failed), previous, units_before=before)

    def _update(self, say: Callable[[str, str], None], *, all_was_seen: bool) -> RunSummary:
        self._identity |= new_update()
        runner = self._runner
        with ExitStack() as stack:
            previous = stack.enter_context(self._finished_output())
            known = stack.enter_context(closing(KnownTracks(previous)))
            today = stack.enter_context(closing(runner.todays_tracks()))
            plan = UpdatePlan(known, today, runner.schema, self._job.options, all_was_seen=all_was_seen)
            say("kept", str(plan.counts))
            if plan.is_empty:
                self._parts.discard()
                return RunSummary(self._job.output, previous.counts, Counts(), already_done=True, update=plan.counts)
            self._parts.stage()
            self._parts.open(self._identity)
            publish_kept(plan.rewritten(), self._parts, runner.schema, self._listeners, previous, self._stop)
            summary = self._embed(plan.work(), plan.n_to_embed, previous)
            return replace(summary, update=plan.counts)

    def _embed(self, work: Work, to_embed: int, revised: FinishedOutput | None, *, units_before: int = 0) -> RunSummary:
        """Embed `to_embed` tracks, those of `work`, and finish the output: `revised`, if it was there before.

        `units_before`: that an interrupted run has done.
        """
        parts, options = self._parts, self._job.options
        gather_suspects(parts.local_folder)
        for listener in self._listeners if units_before else ():
            listener.resumed(units_before)
        if options.ray is not None:
            job = ClusterJob(
                self._job.output,
                revised is not None,
                self._identity,
                options,
                *self._files,
                self._runner.schema,
            )
            work = self._runner.until_deadline(work)
            embedded = embed_on_ray(options.ray, job, work, parts, to_embed, self._listeners, self._stop)
        elif len(self._devices) > 1 and not revised:
            embedded = embed_on_devices(self._job, self._devices, parts, to_embed, self._listeners, self._stop)
        else:
            embedded = self._runner.embed_all(to_embed, work, revised)
        summary = RunSummary(self._job.output, embedded, embedded, units_before=units_before)
        if self._runner.left_work or not self._all_shards_done(revised):
            return replace(self._at_deadline(summary, revised), at_deadline=True)
        for listener in () if revised else self._listeners:
            listener.all_embedded()
        return replace(summary, counts=parts.finish(self._runner.schema, self._identity | self._facts, revised))

    def _all_shards_done(self, revised: FinishedOutput | None) -> bool:
        is_one = revised is not None or len(self._devices) == 1
        return is_one or not self._runner.is_late or self._runner.is_complete()

    def _at_deadline(self, summary: RunSummary, revised: FinishedOutput | None) -> RunSummary:
        """Leave what is done for the next night; in an update, put it into the output."""
        if not self._job.options.update:
            return summary
        take_in(self._parts, self._identity, self._facts, revised)
        self._parts.discard()
        with self._finished_output() as output:
            return replace(summary, counts=output.counts)


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
