"""The teacher's embeddings of windows of recordings: a target for the encoder, written once by `training.teacher`."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from singerembed.errors import UsageError
from singerembed.storage import publishing, writing

Floats = NDArray[np.float32]
_SHRUNK = 0.1
_NEAR_SECONDS = 5.0  # between a crop and a window that stands for it: some longer than windows are
_COLUMNS = ("path", "centre", "embedding")


@dataclass(frozen=True)
class Windows:
    """Embeddings of windows of one file."""

    centres: NDArray[np.float64]  # seconds from the beginning of the file, ascending, [n]
    embeddings: Floats  # [n, dim]


class Targets:
    """Targets of crops: the mean embedding of the windows in a crop, centred, half whitened, of length 1.

    Half whitened: times the covariance of all windows, with a tenth of its mean variance mixed in, to the power -1/4.
    Directions of small variance, in which most of what tells people of a kind apart lies, then weigh more. `mean`,
    [dim], is subtracted before the product with `whitening`, [dim, dim].
    """

    def __init__(self, windows: dict[str, Windows]) -> None:
        """`windows`: by the path of a file relative to the data's folder, or absolute."""
        self._windows = windows
        everything = np.concatenate([each.embeddings for each in windows.values()]).astype(np.float64)
        self.mean = everything.mean(axis=0)
        variance, axes = np.linalg.eigh(np.cov(everything.T, bias=True))
        mixed = (1 - _SHRUNK) * variance.clip(min=0) + _SHRUNK * max(float(variance.mean()), 1e-12)
        self.whitening = (axes * mixed**-0.25) @ axes.T

    @property
    def dim(self) -> int:
        """Dimension of the teacher's embedding."""
        return len(self.mean)

    def __contains__(self, path: str) -> bool:
        return path in self._windows

    def of_crop(self, path: str, start: float, seconds: float) -> Floats:
        """Return the target of a crop, [dim]: of the windows centred in it, or else of the nearest one.

        Raises KeyError if there are no windows of `path`, or none near the crop.
        """
        windows = self._windows[path]
        inside = (windows.centres >= start) & (windows.centres <= start + seconds)
        if not inside.any():
            distance = np.abs(windows.centres - start - seconds / 2)
            if distance.min() > seconds / 2 + _NEAR_SECONDS:
                raise KeyError(f"{path} has no window near {start:g} s")
            inside[distance.argmin()] = True
        target = (windows.embeddings[inside].mean(axis=0) - self.mean) @ self.whitening
        return np.asarray(target / max(float(np.linalg.norm(target)), 1e-9), np.float32)


def relative_path(path: str, source: str) -> str:
    """Return the name of a file in a table of targets: relative to the folder `source`, if it lies in it."""
    return os.path.relpath(path, source) if Path(path).is_relative_to(source) else path


def write_targets(path: Path, windows: dict[str, Windows], teacher: str) -> None:
    """Write a Parquet file with a row for each window, atomically. `teacher`: its name, kept in the metadata."""
    names = [name for name, each in windows.items() for _ in each.centres]
    centres = np.concatenate([each.centres for each in windows.values()])
    embeddings = np.concatenate([each.embeddings for each in windows.values()]).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
    table = pa.table(dict(zip(_COLUMNS, (names, centres, column), strict=True)))
    with writing(str(path)), publishing(str(path)) as temporary:
        pq.write_table(table.replace_schema_metadata({"teacher": teacher}), temporary)


def read_targets(path: str) -> Targets:
    """Read a file written by `write_targets`. Raises UsageError if it is none."""
    try:
        table = pq.read_table(path, columns=list(_COLUMNS))
        embeddings = table["embedding"].combine_chunks().flatten().to_numpy()
    except (OSError, pa.ArrowInvalid, KeyError, AttributeError) as exc:
        raise UsageError(
            f"teacher.targets: {path} is not a table of targets ({str(exc).splitlines()[0]}). Make it: "
            "python -m training.teacher --help"
        ) from exc
    rows: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(table["path"].to_pylist()):
        rows[name].append(row)
    if not rows:
        raise UsageError(f"teacher.targets: {path} holds no windows")
    embeddings = embeddings.reshape(len(table), -1)
    centres = table["centre"].to_numpy()
    return Targets({name: Windows(centres[mine], embeddings[mine]) for name, mine in rows.items()})
