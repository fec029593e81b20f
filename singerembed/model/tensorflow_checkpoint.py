"""Read the tensors of a TensorFlow checkpoint, without TensorFlow.

A checkpoint is an index and one or more data shards. `NAME.index` is a table in LevelDB's format (its
doc/table_format.md; TensorFlow does not compress its blocks) whose values are BundleEntryProto messages
(tensorflow/core/protobuf/tensor_bundle.proto): where a tensor lies in the shards, which hold raw little-endian values.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.errors import CheckpointError
from singerembed.model.protobuf import fields, varint

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_BLOCK_TRAILER_BYTES = 5  # a type (0: not compressed) and a checksum
_FLOAT = 1  # DataType.DT_FLOAT
_MAX_INDEX_BYTES = 1 << 26


def read_tensorflow_checkpoint(prefix: str) -> dict[str, NDArray[np.float32]]:
    """Read the float32 tensors of the checkpoint whose index is `prefix`.index, by name; others are left out.

    Raises CheckpointError if a file is missing, damaged or cut.
    """
    try:
        with Path(f"{prefix}.index").open("rb") as file:
            index = file.read(_MAX_INDEX_BYTES)
        entries = {key.decode(): _fields(value) for key, value in _table(index)}
        shards = int(_first(entries.pop(""), 1, 1))
        return {
            name: _tensor(f"{prefix}.data-{int(_first(entry, 3, 0)):05d}-of-{shards:05d}", entry)
            for name, entry in entries.items()
            if _first(entry, 1, 0) == _FLOAT
        }
    except OSError as exc:
        raise CheckpointError(f"cannot read the TensorFlow checkpoint {prefix}: {exc.strerror or exc}") from exc
    except (ValueError, IndexError, KeyError, TypeError, struct.error) as exc:
        raise CheckpointError(f"{prefix}.index is damaged, or no TensorFlow checkpoint ({exc})") from exc


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a LevelDB table. Raises ValueError."""
    footer = data[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise ValueError("its last bytes are not those of a table")
    _, at = _handle(footer, 0)  # of the meta index
    index, _ = _handle(footer, at)
    for _, value in _block(data, *index):
        block, _ = _handle(value, 0)
        yield from _block(data, *block)


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """The offset and size of a block, and where the next field begins."""
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return (offset, size), at


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block; a key shares its beginning with the one before."""
    block = data[offset : offset + size]
    if len(data) < offset + size + _BLOCK_TRAILER_BYTES:
        raise ValueError("it is cut short")
    if data[offset + size] != 0:
        raise ValueError("its blocks are compressed")
    restarts = struct.unpack("<I", block[-4:])[0]
    end = len(block) - 4 * (restarts + 1)
    at, key = 0, b""
    while at < end:
        shared, at = varint(block, at)
        fresh, at = varint(block, at)
        length, at = varint(block, at)
        key = key[:shared] + block[at : at + fresh]
        yield key, block[at + fresh : at + fresh + length]
        at += fresh + length


def _fields(message: bytes) -> dict[int, list[Any]]:
    """The fields of a protocol-buffer message by number: integers, or bytes that are not looked into."""
    found: dict[int, list[Any]] = {}
    for number, value in fields(memoryview(message)):
        found.setdefault(number, []).append(value if isinstance(value, int) else bytes(value))
    return found


def _first(fields: dict[int, list[Any]], number: int, default: Any) -> Any:
    return fields.get(number, [default])[0]


def _tensor(shard: str, entry: dict[int, list[Any]]) -> NDArray[np.float32]:
    """The tensor of a BundleEntryProto: field 2 its shape, 4 its offset, 5 its size in bytes."""
    shape = tuple(int(_first(_fields(dim), 1, 0)) for dim in _fields(_first(entry, 2, b"")).get(2, []))
    offset, size = int(_first(entry, 4, 0)), int(_first(entry, 5, 0))
    with Path(shard).open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size or size != 4 * int(np.prod(shape)):
        raise ValueError(f"{Path(shard).name} is cut short")
    return np.frombuffer(content, "<f4").reshape(shape)
