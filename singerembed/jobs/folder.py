"""Give a run over a folder its catalogue: scanned once, and kept beside the output."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pyarrow.parquet as pq

from singerembed import storage
from singerembed.catalog.scan import DEFAULT_WORKERS, SOURCES_KEY, UNREADABLE_KEY, ScanCounts, scan, sources_text
from singerembed.errors import InterruptedRun, OutputError
from singerembed.jobs.options import RunOptions
from singerembed.output.finished import is_partitioned
from singerembed.output.parts import PartStore


def kept_catalog(output: str) -> str:
    """Where the catalogue of a run over a folder is kept: `library.catalog.parquet` beside `library.parquet`."""
    return f"{output.removesuffix('.parquet')}.catalog.parquet"


def catalog_of(
    source: str,
    output: str,
    options: RunOptions,
    say: Callable[[str, str], None],
    found: Callable[[ScanCounts], None] = lambda _counts: None,
    stop: Callable[[], int] = lambda: 0,
) -> tuple[str, int]:
    """Scan the folder, playlist or cue sheet `source`; return the catalogue, and how many folders could not be read.

    A run that has begun goes on with the catalogue it began with, and so does one that retries errors: what has changed
    in the folder meanwhile does not count. An update always scans. Raises CatalogError and UsageError; OutputError when
    the output was begun with another source, or is finished and the folder has changed; and InterruptedRun once `stop`
    returns a signal's number.
    """

    def going_on(counts: ScanCounts) -> None:
        found(counts)
        if number := stop():
            raise InterruptedRun("stopped while the folder was scanned; the same command begins again", number)

    catalog = kept_catalog(output)
    finished = _is_finished(output, partitioned=options.partitioned) and not options.restart and not options.update
    with PartStore(output, partitioned=options.partitioned) as parts:  # another run may be using the catalogue
        begun = parts.identity() is not None and not options.restart and not options.update
        if storage.exists(catalog) and (begun or (finished and options.retry_errors)):
            with storage.open_input(catalog) as file:
                metadata = pq.read_metadata(file)
            facts = metadata.metadata or {}
            if facts.get(SOURCES_KEY, b"").decode() != sources_text([source]):
                raise OutputError(
                    f"{output} was begun with the recordings in {catalog}, which are not those of {source}. Give "
                    "another output, or --restart to begin again"
                )
            say("catalog", f"{catalog}: the {metadata.num_rows:,} recordings that {source} had when the run began")
            return catalog, int(facts.get(UNREADABLE_KEY, 0))
        storage.remove_temporaries(catalog)  # of a scan that was killed
        try:
            counts = _scan(source, catalog, finished=finished, output=output, say=say, found=going_on)
        finally:
            if parts.identity() is None:
                parts.discard()
    say("scanned", f"{source}: {counts}; kept as {catalog}")
    return catalog, counts.unreadable_folders


def _scan(
    source: str,
    catalog: str,
    *,
    finished: bool,
    output: str,
    say: Callable[[str, str], None],
    found: Callable[[ScanCounts], None],
) -> ScanCounts:
    """Scan `source` to `catalog`, unless that belongs to a finished output and would become another."""

    def unreadable(text: str) -> None:
        say("unreadable", text)

    if not (finished and storage.exists(catalog)):
        return scan([source], catalog, workers=DEFAULT_WORKERS, say=unreadable, found=found)
    now = f"{catalog.removesuffix('.parquet')}.now.parquet"
    try:
        counts = scan([source], now, workers=DEFAULT_WORKERS, say=unreadable, found=found)
        if _digest(now) != _digest(catalog):
            with storage.open_input(catalog) as file:
                before = pq.read_metadata(file).num_rows
            raise OutputError(
                f"{output} was made of {source} as it was then, with {before:,} recordings, and files have changed "
                f"since: it has {counts.recordings:,}. Give another output, or --restart to embed them all again"
            )
    finally:
        storage.remove(now)
    return counts


def _is_finished(output: str, *, partitioned: bool) -> bool:
    return is_partitioned(output) if partitioned else storage.exists(output)


def _digest(path: str) -> str:
    with storage.open_input(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
