"""Embed units in a worker process of a Ray cluster, and publish their part files."""

from __future__ import annotations

import pickle
import threading
import zlib
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from singerembed.catalog.read import Track, Unit
from singerembed.engine.file import EngineFile, SeparatorFile
from singerembed.errors import ClusterError
from singerembed.jobs.crash_journal import CrashJournal
from singerembed.jobs.options import RunOptions
from singerembed.jobs.units import EngineThreads, Listener, Task, publish_units
from singerembed.model.spec import ModelSpec
from singerembed.output.finished import FinishedOutput
from singerembed.output.parts import PartStore
from singerembed.output.schema import Counts, TrackRows


@dataclass(frozen=True)
class ClusterJob:
    """What every worker of a run needs to know, sent once."""

    output: str
    revising: bool  # `output` is finished, and brought up to date
    identity: dict[str, Any]  # of the run, as its folder of parts has it
    options: RunOptions
    engine_file: EngineFile
    separator_file: SeparatorFile | None
    schema: pa.Schema  # of the parts


class ClusterWorker:
    """Embeds units with one engine and its threads. Several threads may call `embed`."""

    def __init__(self, job: ClusterJob, cores: int) -> None:
        """Start the engine. Raises ClusterError where this machine does not see the output, and EngineError."""
        partitioned = job.options.partitioned
        self._job = job
        self._parts = PartStore(job.output, partitioned=partitioned and not job.revising)
        if self._parts.identity() != job.identity:
            raise ClusterError(
                f"{self._parts.folder} is not there, or belongs to another run. The output and local recordings must "
                "lie on a file system that all nodes share, or on object storage"
            )
        self._previous = FinishedOutput(job.output, partitioned=partitioned) if job.revising else None
        options = replace(job.options, workers=None)  # they decided how many cores this process has
        self._threads = EngineThreads(
            job.engine_file,
            options,
            lambda threads: CrashJournal(None, threads),
            _never,
            device=0,
            cores=cores,
            separator_file=job.separator_file,
        )
        self._feeding = threading.Lock()

    @property
    def started(self) -> tuple[ModelSpec, str]:
        """The engine's spec and description."""
        return self._threads.spec, self._threads.description

    def embed(
        self, unit: Unit, positions: Sequence[int], *, careful: bool, alone: bool
    ) -> tuple[Counts, Counts, bytes]:
        """Embed `positions` of `unit` and publish it; return their counts, the unit's counts, and rows for `unpack`."""
        events = _UnitEvents()
        with closing(self._tasks(unit, positions)) as tasks:
            results = self._threads.embed(tasks, isolated=careful, one_by_one=alone)
            embedded = publish_units(results, self._parts, self._job.schema, [events], self._previous)
        return embedded, events.counts, zlib.compress(pickle.dumps(events.rows), 1)

    def attempt(self, unit: Unit, position: int) -> None:
        """Embed one track with an isolated decoder, and drop the result."""
        for _ in self._threads.embed([Task(unit, position)], isolated=True):
            pass

    def _tasks(self, unit: Unit, positions: Sequence[int]) -> Generator[Task, None, None]:
        # One unit after another: the first is then finished early.
        with self._feeding:
            for position in positions:
                yield Task(unit, position)


def unpack(rows: bytes) -> list[TrackRows]:
    """Decode the rows that `embed` returns: without embeddings and levels."""
    return list(pickle.loads(zlib.decompress(rows)))


def _never() -> int:
    return 0  # the driver ends its workers


class _UnitEvents(Listener):
    """A `Listener` that collects the rows and counts of one unit."""

    def __init__(self) -> None:
        self.rows: list[TrackRows] = []
        self.counts = Counts()

    def embedded(self, track: Track, rows: TrackRows) -> None:
        none = rows.peak[:0].copy()
        self.rows.append(replace(rows, embedding=rows.embedding[:0].copy(), peak=none, rms=none))

    def published(self, unit: int, counts: Counts) -> None:
        self.counts = counts
