"""A partitioned output: a folder of part files that readers take for one table, and what stands beside them.

`out/unit-000123.parquet` are the rows. `out/_common_metadata` is a Parquet file without rows, by which the output is
finished: the schema, what was run, and what it came to. `out/_index` is a Parquet file with a row a part. Their names
have no suffix and begin with an underscore, so that `out/*.parquet` and readers of folders pass them over.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from singerembed import storage
from singerembed.index import UnitIndex
from singerembed.parquet import COUNTS_KEY, METADATA_KEY, Counts

_UNIT_NAME = re.compile(r"unit-(\d{6,})\.parquet")
_METADATA, _INDEX = "_common_metadata", "_index"


def part_path(folder: str, unit: int) -> str:
    """Where the part of unit `unit` lies."""
    return f"{folder}/unit-{unit:06d}.parquet"


def units_in(folder: str) -> set[int]:
    """The units whose parts lie in `folder`."""
    matches = map(_UNIT_NAME.fullmatch, storage.names_in(folder))
    return {int(match[1]) for match in matches if match}


def is_partitioned(output: str) -> bool:
    """Say whether `output` is the folder of a finished partitioned output."""
    return storage.exists(f"{output}/{_METADATA}")


def finish(output: str, schema: pa.Schema, metadata: dict[str, Any], index: UnitIndex, total: Counts) -> None:
    """Write what makes the parts in `output` a finished one."""
    names = pa.array([part_path("", unit)[1:] for unit in range(len(index.table))], pa.string())
    with storage.publishing(f"{output}/{_INDEX}") as temporary:
        pq.write_table(index.table.add_column(0, "file", names), temporary, compression="zstd")
    facts = {METADATA_KEY: json.dumps(metadata), COUNTS_KEY: json.dumps(total.to_dict())}
    with storage.publishing(f"{output}/{_METADATA}") as temporary:
        pq.write_metadata(schema.with_metadata(facts), temporary)


def read_schema(output: str) -> pa.Schema:
    """The schema of a finished partitioned output, and in its metadata what was run. Raises OSError, ArrowException."""
    with storage.open_input(f"{output}/{_METADATA}") as file:
        return pq.read_schema(file)


def read_index(output: str) -> UnitIndex:
    """What the units of a finished partitioned output come to."""
    with storage.open_input(f"{output}/{_INDEX}") as file:
        return UnitIndex(pq.read_table(file))


def remove(output: str) -> None:
    """Remove a partitioned output, finished or not, and nothing else of what may lie in its folder."""
    storage.remove(f"{output}/{_METADATA}")
    for name in storage.names_in(output):
        if name == _INDEX or _UNIT_NAME.fullmatch(name):
            storage.remove(f"{output}/{name}")
    remove_temporaries(output)


def remove_temporaries(folder: str) -> None:
    """Remove what killed processes were writing."""
    for name in storage.names_in(folder):
        if name.startswith(".") and name.endswith(".tmp"):
            storage.remove(f"{folder}/{name}")
