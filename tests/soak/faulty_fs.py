"""A pass-through file system (FUSE) that fails on request: python tests/soak/faulty_fs.py BACKING MOUNT_POINT FAULTS

FAULTS is a text file that names the faults of the moment, a word each. It is read at each call, and may be missing:

    hang     reads do not return until the word is gone
    eio      reads beyond the first 100 KB of a file give EIO
    estale   every call gives ESTALE

Ended by SIGKILL it is a mount whose server died. Needs Linux, FUSE 2 or 3 (Debian: fuse, libfuse2) and the package
mfusepy. Reads bypass the page cache, so that each of them meets the fault of its moment.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mfusepy

EIO_FROM_BYTE = 100_000
_POLL_SECONDS = 0.05
_ATTRIBUTES = ("st_gid", "st_mode", "st_nlink", "st_size", "st_uid")
_TIMES = ("st_atime", "st_ctime", "st_mtime")


class FaultyFileSystem(mfusepy.Operations):  # type: ignore[misc]
    """A read-only view of the folder `backing`."""

    use_ns = True  # times in nanoseconds

    def __init__(self, backing: Path, faults: Path) -> None:
        self._backing, self._faults = backing, faults

    def _has(self, fault: str) -> bool:
        try:
            return fault in self._faults.read_text(encoding="utf-8").split()
        except FileNotFoundError:
            return False

    def _file(self, path: str) -> Path:
        if self._has("estale"):
            raise mfusepy.FuseOSError(errno.ESTALE)
        return self._backing / path.lstrip("/")

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        """Attributes of a file."""
        try:
            status = self._file(path).lstat()
        except FileNotFoundError:
            raise mfusepy.FuseOSError(errno.ENOENT) from None
        times = {name: getattr(status, f"{name}_ns") for name in _TIMES}
        return {name: getattr(status, name) for name in _ATTRIBUTES} | times

    def readdir(self, path: str, fh: int) -> Iterator[str]:
        """Names in a folder."""
        yield from (".", "..")
        yield from (entry.name for entry in self._file(path).iterdir())

    def open(self, path: str, flags: int) -> int:
        """Open a file for reading."""
        return os.open(self._file(path), flags)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Read `size` bytes at `offset`."""
        while self._has("hang"):
            time.sleep(_POLL_SECONDS)
        self._file(path)
        if offset + size > EIO_FROM_BYTE and self._has("eio"):
            raise mfusepy.FuseOSError(errno.EIO)
        return os.pread(fh, size, offset)

    def release(self, path: str, fh: int) -> None:
        """Close a file."""
        os.close(fh)


if __name__ == "__main__":
    backing, mount_point, faults = (Path(argument) for argument in sys.argv[1:])
    mfusepy.FUSE(FaultyFileSystem(backing, faults), str(mount_point), foreground=True, direct_io=True)
