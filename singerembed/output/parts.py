"""The part files of a run: publish them, list which units are done, merge them into the output.

`out.parquet.parts/` holds `run.json` (the identity of the run), `lock`, and `unit-000123.parquet` for each unit that
is done. A part appears under its name when it is whole, so a listing of the folder is the state of the run. Parts of a
partitioned output are written in place from the start; only those of retried units wait in the parts folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from singerembed import storage
from singerembed.errors import InterruptedRun, OutputError
from singerembed.output import finished
from singerembed.output.finished import FinishedOutput, UnitIndex, counts_of
from singerembed.output.lock import LOCK_NAME, take_lock
from singerembed.output.schema import (
    COUNTS_KEY,
    METADATA_KEY,
    ROW_GROUP_ROWS,
    UNITS_KEY,
    Counts,
    PartWriter,
    conformed,
    writer_options,
)

_RUN_FILE = "run.json"
_FOOTERS_AT_ONCE = 16  # requests to an object store take their time
_FOOTERS_A_TURN = 1024


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """List where two nested dictionaries differ: `name (was old, now new)`."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key} ")
        elif a != b:
            found.append(f"{prefix}{key} (was {_short(a)}, now {_short(b)})")
    return found


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


class PartStore:
    """The parts of one output. Use as a context manager: it holds the lock."""

    def __init__(self, output: str, *, partitioned: bool = False) -> None:
        """`partitioned`: the output is the folder of parts itself."""
        self.output = output
        self.folder = f"{output}.parts"
        self._partitioned = partitioned
        self._units_folder = output if partitioned else self.folder
        self._give_back: Callable[[], None] = lambda: None
        self.done: set[int] = set()

    @property
    def local_folder(self) -> str | None:
        """The folder of parts where it is on this machine; None on object storage."""
        return None if storage.is_remote(self.folder) else self.folder

    def __enter__(self) -> PartStore:
        with self._writing():
            storage.make_folder(self.folder)
            self._give_back = take_lock(self.folder, self.output)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._give_back()

    def discard(self) -> None:
        """Remove the parts folder, at the end of a run; the lock goes with it.

        The lock's file is removed while it is held, so that nobody takes it in between, and closed before the folder
        is removed: network and FUSE file systems keep the name of an open file.
        """
        for name in storage.names_in(self.folder):
            if name != LOCK_NAME:
                storage.remove(f"{self.folder}/{name}")
        storage.remove(f"{self.folder}/{LOCK_NAME}")
        self._give_back()
        self._give_back = lambda: None
        storage.remove_empty_folder(self.folder)

    def stage(self) -> None:
        """Keep parts of a partitioned output in the parts folder until all are there: the output is finished."""
        self._units_folder = self.folder
        self.refresh()

    def open(self, identity: dict[str, Any]) -> None:
        """Take over the parts of an earlier run, or begin a new set.

        `identity`: JSON of everything that decides the rows. Raises OutputError when the parts have another.
        """
        before = self.identity()
        if before is not None:
            found = differences(before, identity)
            if found:
                done = len(finished.units_in(self._units_folder))
                raise OutputError(
                    f"{self.folder} belongs to another run: {', '.join(found)}. "
                    f"Give another output, or --restart to throw {done:,} finished units away"
                )
        else:
            if self._units_folder == self.output and storage.names_in(self.output):
                raise OutputError(
                    f"{self.output} exists and holds files of others. Give the name of a new folder, or of an empty one"
                )
            with self._writing():
                storage.make_folder(self._units_folder)
                with storage.publishing(f"{self.folder}/{_RUN_FILE}") as temporary:
                    Path(temporary).write_text(json.dumps(identity, indent=1), encoding="utf-8")
        self.refresh()

    def identity(self) -> dict[str, Any] | None:
        """Identity of the run that wrote these parts; None if there is none, or this machine cannot see the folder."""
        run_file = f"{self.folder}/{_RUN_FILE}"
        if not storage.exists(run_file):
            return None
        with storage.open_input(run_file) as file:
            return dict(json.loads(file.read()))

    def is_of_another(self, identity: dict[str, Any]) -> bool:
        """Say whether there are parts, and of another run than that of `identity`."""
        before = self.identity()
        return before is not None and bool(differences(before, identity))

    @classmethod
    def of_parent(cls, output: str, *, partitioned: bool) -> PartStore:
        """Open the parts of a run whose lock the parent process holds, from a child process."""
        store = cls(output, partitioned=partitioned)
        store.refresh()
        return store

    def refresh(self) -> None:
        """Read again which units are done."""
        self.done = finished.units_in(self._units_folder)

    def interrupted(self, signal_number: int) -> InterruptedRun:
        """Make the exception to raise after a stop."""
        done = f"{len(self.done):,} units are done"
        return InterruptedRun(f"stopped; {done}. The same command goes on from here", signal_number)

    @contextmanager
    def writing(self, unit: int, schema: pa.Schema) -> Iterator[PartWriter]:
        """Yield a writer for unit `unit`; its part is published when the block ends well, else it is removed."""
        try:
            with storage.publishing(finished.part_path(self._units_folder, unit)) as temporary:
                writer = PartWriter(temporary, schema)
                try:
                    yield writer
                except BaseException:
                    writer.abort()
                    raise
                writer.close()
        except OSError as exc:
            raise OutputError(
                f"{exc.strerror or exc} while writing unit {unit + 1:,} to {self._units_folder}; "
                f"{len(self.done):,} units are safe. Mend that and run the same command again"
            ) from exc
        self.done.add(unit)

    def finish(self, schema: pa.Schema, metadata: dict[str, Any], previous: FinishedOutput | None) -> Counts:
        """Turn the parts into the finished output, and remove the parts folder.

        Units without a part are those of `previous`, the finished output that is brought up to date; parts of units
        that it has not are put behind its own.
        """
        total = self._join(schema, metadata, previous)
        self.discard()
        return total

    def take_in(self, metadata: dict[str, Any], previous: FinishedOutput | None) -> None:
        """Finish the output with the units that are done, of a run that was interrupted, and remove their parts.

        Nothing is done twice, even where this was interrupted too: `metadata["update"]` tells whether they are in.
        """
        if self.done and not (previous and previous.metadata.get("update") == metadata["update"]):
            with storage.open_input(self._part(min(self.done))) as file:
                schema = pq.read_schema(file).remove_metadata()
            self._join(schema, metadata, previous)
        for unit in self.done if self._units_folder == self.folder else ():
            storage.remove(self._part(unit))
        storage.remove(f"{self.folder}/{_RUN_FILE}")
        self.done = set()

    def _join(self, schema: pa.Schema, metadata: dict[str, Any], previous: FinishedOutput | None) -> Counts:
        made = self._complete if self._partitioned else self._merge
        try:
            return made(schema, metadata, previous)
        except OSError as exc:
            raise OutputError(
                f"{exc.strerror or exc} while writing {self.output}; "
                f"all {len(self.done):,} units are safe in {self._units_folder}. "
                "Mend that and run the same command again"
            ) from exc

    def _merge(self, schema: pa.Schema, metadata: dict[str, Any], previous: FinishedOutput | None) -> Counts:
        """Join all parts, in order, to one file. Memory holds one row group, and the index of units."""
        storage.remove_temporaries(self.output)  # of the whole output's size, where a merge was killed
        index, total = UnitIndex(), Counts()
        schema = schema.with_metadata({METADATA_KEY: json.dumps(metadata)})
        with (
            storage.publishing(self.output) as temporary,
            pq.ParquetWriter(temporary, schema, **writer_options(schema)) as writer,
        ):
            groups = _RowGroups(writer, schema)
            for unit in sorted(self.done | set(range(previous.n_units if previous else 0))):
                if unit in self.done:
                    with storage.open_parquet(self._part(unit)) as file:
                        part = pq.ParquetFile(file)
                        for group in range(part.num_row_groups):
                            groups.add(part.read_row_group(group))
                        rows, counts = part.metadata.num_rows, counts_of(part.metadata)
                else:
                    assert previous is not None
                    kept = previous.rows(unit)
                    groups.add(kept)
                    rows, counts = kept.num_rows, previous.unit_counts(unit)
                index.add(rows, counts)
                total.merge(counts)
            groups.flush()
            writer.add_key_value_metadata({COUNTS_KEY: json.dumps(total.to_dict()), UNITS_KEY: index.encode()})
        return total

    def _complete(self, schema: pa.Schema, metadata: dict[str, Any], previous: FinishedOutput | None) -> Counts:
        """Move the parts to their places, numbered without a gap, and write the index of all parts.

        A part that takes the place of another does so by one rename: a reader finds a recording's old rows or its new
        ones, and never none or both.
        """
        n_before = previous.n_units if previous else 0
        free = max((unit + 1 for unit in finished.units_in(self.output)), default=0) if previous else 0
        for unit in sorted(self.done):
            number = unit
            if unit >= n_before:
                number, free = free, free + 1
            if (self._units_folder, unit) != (self.output, number):
                storage.rename(self._part(unit), finished.part_path(self.output, number))
        if not previous and not self.done:  # a folder without a file would have no schema
            with self.writing(0, schema):
                pass
        index, total = UnitIndex(), Counts()
        n_units = len(finished.units_in(self.output))
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            for start in range(0, n_units, _FOOTERS_A_TURN):
                units = range(start, min(n_units, start + _FOOTERS_A_TURN))
                for rows, counts in pool.map(self._footer, units):
                    index.add(rows, counts)
                    total.merge(counts)
        finished.remove_temporaries(self.output)
        finished.write_index(self.output, schema, metadata, index, total)
        return total

    def _footer(self, unit: int) -> tuple[int, Counts]:
        with storage.open_input(finished.part_path(self.output, unit)) as file:
            metadata = pq.read_metadata(file)
            return metadata.num_rows, counts_of(metadata)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise OutputError(
                f"cannot write to {self.folder}: {exc.strerror or exc}. Mend that and run the same command again"
            ) from exc

    def remove(self) -> None:
        """Remove all parts, keeping the lock; of a partitioned output the parts are the output itself."""
        if self._partitioned and (self.identity() is not None or finished.is_partitioned(self.output)):
            # What is half removed must not look like a finished output, nor like one of others.
            with self._writing(), storage.publishing(f"{self.folder}/{_RUN_FILE}") as temporary:
                Path(temporary).write_text("{}", encoding="utf-8")
            finished.remove(self.output)
        for name in storage.names_in(self.folder):
            if name != LOCK_NAME:
                storage.remove(f"{self.folder}/{name}")

    def _part(self, unit: int) -> str:
        return finished.part_path(self._units_folder, unit)


class _RowGroups:
    """Collects tables of any size and writes them as row groups of ROW_GROUP_ROWS."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer, self._schema = writer, schema
        self._tables: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        if self._rows + table.num_rows > ROW_GROUP_ROWS:
            self.flush()
        self._tables.append(conformed(table, self._schema))
        self._rows += table.num_rows

    def flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.concat_tables(self._tables))
        self._tables, self._rows = [], 0


def count_parts(output: str) -> int:
    """How many units of an unfinished output are done."""
    return len(finished.units_in(f"{output}.parts") | finished.units_in(output))
