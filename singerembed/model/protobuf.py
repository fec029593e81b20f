"""Reads protocol-buffer messages without a schema: the wire format, of which ONNX and TensorFlow's files are made."""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field: an integer, or the bytes of a string, message or packed list.

    Raises ValueError or IndexError if the message is damaged.
    """
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = varint(message, at)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            size, at = varint(message, at)
        elif wire in {_FIXED64, _FIXED32}:
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"a field of unknown type {wire}")
        if at + size > len(message):
            raise ValueError("it is cut short")
        yield key >> 3, message[at : at + size]
        at += size


def varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """Return the integer at `at`, in groups of seven bits, and where the next field begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
