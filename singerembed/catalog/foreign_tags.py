"""Ask FFmpeg, in a process of its own, for the tags of containers that few programs write.

The process is this file: `python -m singerembed.catalog.foreign_tags` reads paths as JSON, one a line, and answers with
one JSON object a line. It may crash or hang at any time, and costs the tags of one file then.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from typing import Any

_PATIENCE_SECONDS = 20.0
_LOOK = {"probesize": "65536"}  # bytes: enough for the header; FFmpeg would read 5 MB of PCM


class ForeignTags:
    """Starts the process when it is first needed; may be called from several threads. Must be closed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def read(self, path: str) -> dict[str, Any]:
        """What FFmpeg finds in the local file `path`; empty where it fails.

        "tags" has texts by FFmpeg's names, and "seconds" the duration, where the header gives it.
        """
        with self._lock:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "singerembed.catalog.foreign_tags"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                self._process.stdin.write(json.dumps(path).encode() + b"\n")
                self._process.stdin.flush()
                if select.select([self._process.stdout], [], [], _PATIENCE_SECONDS)[0]:
                    return dict(json.loads(self._process.stdout.readline()))
            except (OSError, ValueError):  # it crashed
                pass
            self._end()
            return {}

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _with_ffmpeg(path: str) -> dict[str, Any]:
    import av

    container: Any
    with open(os.fsencode(path), "rb") as file, av.open(file, metadata_errors="replace", options=_LOOK) as container:  # noqa: PTH123
        stream = container.streams.best("audio")
        if stream is None:
            return {}
        if stream.duration and stream.time_base:
            seconds = float(stream.duration * stream.time_base)
        else:
            seconds = (container.duration or 0) / av.time_base
        return {"seconds": seconds, "tags": {**stream.metadata, **container.metadata}}


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no reply
    for line in sys.stdin.buffer:
        try:
            found = _with_ffmpeg(json.loads(line))
        except Exception:  # whatever FFmpeg makes of a strange file
            found = {}
        replies.write(json.dumps(found).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    _serve()
