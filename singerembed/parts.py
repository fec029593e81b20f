"""The folder of part files beside an output: what is done, what belongs together, and the merge into one file.

`out.parquet.parts/` holds `run.json` (what the run was asked for), `lock`, and `unit-000123.parquet` for each unit that
is done. A part appears under its name when it is whole, so a listing is the state of the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from singerembed import storage
from singerembed.errors import OutputError
from singerembed.journal import CrashJournal, gather_suspects
from singerembed.lock import take_lock
from singerembed.parquet import COUNTS_KEY, METADATA_KEY, UNITS_KEY, Counts, PartWriter, writer_options
from singerembed.previous import PreviousOutput, counts_of

_UNIT_NAME = re.compile(r"unit-(\d{6,})\.parquet")
_RUN_FILE = "run.json"


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Where two nested dictionaries differ: `name (was old, now new)`."""
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

    def __init__(self, output: str) -> None:
        self.output = output
        self.folder = f"{output}.parts"
        self._give_back: Callable[[], None] = lambda: None
        self.done: set[int] = set()

    def __enter__(self) -> PartStore:
        with self._writing():
            storage.make_folder(self.folder)
            self._give_back = take_lock(self.folder, self.output)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._give_back()

    def open(self, identity: dict[str, Any]) -> None:
        """Adopt the parts that are there, or start afresh.

        `identity`: JSON of everything that decides the rows. Raises OutputError when the parts have another.
        """
        run_file = f"{self.folder}/{_RUN_FILE}"
        if storage.exists(run_file):
            with storage.open_input(run_file) as file:
                before = json.loads(file.read())
            found = differences(before, identity)
            if found:
                done = count_parts(self.folder)
                raise OutputError(
                    f"{self.folder} belongs to another run: {', '.join(found)}. "
                    f"Give another output, or --restart to throw {done:,} finished units away"
                )
        else:
            with self._writing(), storage.publishing(run_file) as temporary:
                Path(temporary).write_text(json.dumps(identity, indent=1), encoding="utf-8")
        self.refresh()
        self.gather_suspects()

    @classmethod
    def of_parent(cls, output: str) -> PartStore:
        """The parts that another process has opened and holds the lock of, as that process's helper sees them."""
        store = cls(output)
        store.refresh()
        return store

    def refresh(self) -> None:
        """See which units are done."""
        matches = map(_UNIT_NAME.fullmatch, storage.names_in(self.folder))
        self.done = {int(match[1]) for match in matches if match}

    def gather_suspects(self) -> None:
        """Note the rows at which processes of this run have died."""
        if not storage.is_remote(self.folder):
            gather_suspects(self.folder)

    @contextmanager
    def writing(self, unit: int, schema: pa.Schema) -> Iterator[PartWriter]:
        """A writer for unit `unit`; its part is published when the block ends well, else nothing is left of it."""
        try:
            with storage.publishing(self._part(unit)) as temporary:
                writer = PartWriter(temporary, schema)
                try:
                    yield writer
                except BaseException:
                    writer.abort()
                    raise
                writer.close()
        except OSError as exc:
            raise OutputError(
                f"{exc.strerror or exc} while writing unit {unit + 1:,} to {self.folder}; "
                f"{len(self.done):,} units are safe. Mend that and run the same command again"
            ) from exc
        self.done.add(unit)

    def counts(self, unit: int) -> Counts:
        """What unit `unit` holds, from its part's metadata."""
        with storage.open_input(self._part(unit)) as file:
            return counts_of(pq.read_metadata(file))

    def merge(self, schema: pa.Schema, metadata: dict[str, Any], previous: PreviousOutput | None) -> Counts:
        """Join all parts, in order, to the output, and remove them. Memory holds one row group.

        Units without a part are taken from `previous`, the finished output whose errors were retried.
        """
        units: list[tuple[int, Counts]] = []
        n_units = previous.n_units if previous else len(self.done)
        schema = schema.with_metadata({METADATA_KEY: json.dumps(metadata)})
        try:
            with (
                storage.publishing(self.output) as temporary,
                pq.ParquetWriter(temporary, schema, **writer_options(schema)) as writer,
            ):
                for unit in range(n_units):
                    if unit in self.done:
                        with storage.open_input(self._part(unit)) as file:
                            part = pq.ParquetFile(file)
                            for group in range(part.num_row_groups):
                                writer.write_table(part.read_row_group(group).cast(schema))
                            units.append((part.metadata.num_rows, counts_of(part.metadata)))
                    else:
                        assert previous is not None
                        rows = previous.rows(unit)
                        writer.write_table(rows.cast(schema))
                        units.append((rows.num_rows, previous.unit_counts(unit)))
                total = Counts()
                for _, counts in units:
                    total.merge(counts)
                encoded = json.dumps([[rows, counts.to_dict()] for rows, counts in units])
                writer.add_key_value_metadata({COUNTS_KEY: json.dumps(total.to_dict()), UNITS_KEY: encoded})
        except OSError as exc:
            raise OutputError(
                f"{exc.strerror or exc} while writing {self.output}; "
                f"all {len(self.done):,} units are safe in {self.folder}. Mend that and run the same command again"
            ) from exc
        storage.remove_folder(self.folder)
        return total

    def journal(self, threads: int, shard: int) -> CrashJournal:
        """The journal of one process; of no use to the next run where the parts are not on this machine."""
        with self._writing():
            return CrashJournal(None if storage.is_remote(self.folder) else self.folder, threads, shard)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise OutputError(
                f"cannot write to {self.folder}: {exc.strerror or exc}. Mend that and run the same command again"
            ) from exc

    def remove(self) -> None:
        """Throw all parts away, keeping the lock."""
        for name in storage.names_in(self.folder):
            if name != "lock":
                storage.remove(f"{self.folder}/{name}")

    def _part(self, unit: int) -> str:
        return f"{self.folder}/unit-{unit:06d}.parquet"


def count_parts(folder: str) -> int:
    """How many units are done in a folder of parts."""
    return sum(bool(_UNIT_NAME.fullmatch(name)) for name in storage.names_in(folder))
