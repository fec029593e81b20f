"""Find the tracks of one catalogue in another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

NONE = -1


def keys(name: Any, start: Any, end: Any) -> pa.Array:
    """A text for each track that tells it from others: Arrow arrays of a name, and of its start and end in seconds."""
    parts = [_text(name), _text(start), _text(end)]
    return pc.binary_join_element_wise(*parts, pa.scalar("\0", pa.large_string()))


def matches(known: pa.Array, today: pa.Array) -> NDArray[np.int64]:
    """For each of the keys `known`, where it is in `today`, or NONE; of equal keys the first is found in the first."""
    codes = pa.concat_arrays([known, today]).dictionary_encode().indices.to_numpy().astype(np.int64)
    of_known, of_today = codes[: len(known)], codes[len(known) :]
    apart = len(codes) + 1
    _, i, j = np.intersect1d(
        of_known + apart * _occurrence(of_known),
        of_today + apart * _occurrence(of_today),
        assume_unique=True,
        return_indices=True,
    )
    found = np.full(len(known), NONE, np.int64)
    found[i] = j
    return found


def _text(values: Any) -> pa.Array:
    combined = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return pc.fill_null(combined.cast(pa.large_string()), "")


def _occurrence(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many elements before each one are equal to it."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(codes) else np.empty(0, np.int64)
    rank = np.arange(len(codes)) - np.repeat(first, np.diff(np.r_[first, len(codes)]))
    occurrence = np.empty(len(codes), np.int64)
    occurrence[order] = rank
    return occurrence
