"""The folder of part files beside an output: what is done, what belongs together, and the merge into one file.

`out.parquet.parts/` holds `run.json` (what the run was asked for), `lock`, and `unit-000123.parquet` for each unit that
is done. A part appears under its name when it is whole, so a listing is the state of the run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from singerembed import storage
from singerembed.errors import OutputError
from singerembed.parquet import COUNTS_KEY, METADATA_KEY, Counts, PartWriter, writer_options

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

    def __init__(self, output: str, identity: dict[str, Any]) -> None:
        """`identity`: JSON of everything that decides the rows; a resumed run must have the same."""
        self.output = output
        self.folder = f"{output}.parts"
        self._identity = identity
        self._lock: IO[str] | None = None
        self.done: set[int] = set()

    def __enter__(self) -> PartStore:
        try:
            storage.make_folder(self.folder)
            self._take_lock()
        except OSError as exc:
            raise OutputError(f"cannot write to {self.folder}: {exc.strerror or exc}") from exc
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    def open(self) -> None:
        """Adopt the parts that are there, or start afresh. Raises OutputError when they belong to another run."""
        run_file = f"{self.folder}/{_RUN_FILE}"
        if storage.exists(run_file):
            with storage.open_input(run_file) as file:
                before = json.loads(file.read())
            found = differences(before, self._identity)
            if found:
                done = count_parts(self.folder)
                raise OutputError(
                    f"{self.folder} belongs to another run: {', '.join(found)}. "
                    f"Give another output, or --restart to throw {done:,} finished units away"
                )
        else:
            with storage.publishing(run_file) as temporary:
                Path(temporary).write_text(json.dumps(self._identity, indent=1), encoding="utf-8")
        matches = map(_UNIT_NAME.fullmatch, storage.names_in(self.folder))
        self.done = {int(match[1]) for match in matches if match}

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
            return Counts.from_json(pq.read_metadata(file).metadata[COUNTS_KEY])

    def merge(self, schema: pa.Schema, metadata: dict[str, Any]) -> Counts:
        """Join all parts, in order, to the output, and remove them. Memory holds one row group."""
        total = Counts()
        schema = schema.with_metadata({METADATA_KEY: json.dumps(metadata)})
        try:
            with (
                storage.publishing(self.output) as temporary,
                pq.ParquetWriter(temporary, schema, **writer_options(schema)) as writer,
            ):
                for unit in sorted(self.done):
                    with storage.open_input(self._part(unit)) as file:
                        part = pq.ParquetFile(file)
                        for group in range(part.num_row_groups):
                            writer.write_table(part.read_row_group(group).cast(schema))
                        total.merge(Counts.from_json(part.metadata.metadata[COUNTS_KEY]))
                writer.add_key_value_metadata({COUNTS_KEY: total.to_json()})
        except OSError as exc:
            raise OutputError(
                f"{exc.strerror or exc} while writing {self.output}; "
                f"all {len(self.done):,} units are safe in {self.folder}. Mend that and run the same command again"
            ) from exc
        storage.remove_folder(self.folder)
        return total

    def remove(self) -> None:
        """Throw all parts away, keeping the lock."""
        for name in storage.names_in(self.folder):
            if name != "lock":
                storage.remove(f"{self.folder}/{name}")

    def _part(self, unit: int) -> str:
        return f"{self.folder}/unit-{unit:06d}.parquet"

    def _take_lock(self) -> None:
        if storage.is_remote(self.folder):
            return
        import fcntl

        self._lock = Path(self.folder, "lock").open("a+", encoding="utf-8")  # noqa: SIM115  (held for the run)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip()
            self._lock.close()
            raise OutputError(
                f"another run is writing {self.output} (process {owner}). Wait for it, or stop it"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()


def count_parts(folder: str) -> int:
    """How many units are done in a folder of parts."""
    return sum(bool(_UNIT_NAME.fullmatch(name)) for name in storage.names_in(folder))


def read_output(output: str) -> tuple[dict[str, Any], Counts] | None:
    """What a finished output says of its run; None if there is none. Raises OutputError if it is not one of ours."""
    if not storage.exists(output):
        return None
    try:
        with storage.open_input(output) as file:
            metadata = pq.read_metadata(file).metadata or {}
    except (pa.ArrowException, OSError) as exc:
        raise OutputError(
            f"{output} exists and is not a Parquet file ({exc}). Give another name, or remove it"
        ) from exc
    if METADATA_KEY not in metadata:
        raise OutputError(f"{output} exists and was not written by singerembed. Give another name, or remove it")
    return json.loads(metadata[METADATA_KEY]), Counts.from_json(metadata[COUNTS_KEY])
