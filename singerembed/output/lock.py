"""Lock an output: one run at a time, by a file in its parts folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from singerembed import storage
from singerembed.errors import OutputError

LOCK_NAME = "lock"
# Object stores have no lock that dies with its holder: theirs is renewed while the run lives, and void when it was not.
_RENEW_SECONDS = 20.0
_VOID_SECONDS = 90.0


def take_lock(folder: str, output: str) -> Callable[[], None]:
    """Take the lock of `folder`; return the function that releases it.

    Raises OutputError when another run holds it, and OSError where the folder cannot be written to.
    """
    return _take_remote(folder, output) if storage.is_remote(folder) else _take_local(folder, output)


def _take_local(folder: str, output: str) -> Callable[[], None]:
    path = Path(folder, LOCK_NAME)
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise OutputError(f"another run is writing {output} (process {owner}). Wait for it, or stop it") from None
        except OSError as exc:
            file.close()
            raise OutputError(
                f"cannot lock {output}: {exc.strerror} (flock). The file system of {folder} has no locks: write the "
                "output to another one, and copy it when it is finished"
            ) from exc
        if _is_at(file, path):
            break
        file.close()  # the run that held it has just ended, and has removed it
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file.close


def _is_at(file: TextIO, path: Path) -> bool:
    """Say whether the open `file` is still the one called `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _take_remote(folder: str, output: str) -> Callable[[], None]:
    path = f"{folder}/{LOCK_NAME}"
    me = f"process {os.getpid()} on {socket.gethostname()}"

    def content() -> bytes:
        return json.dumps({"owner": me, "time": time.time()}).encode()

    if not storage.create(path, content()):
        other = json.loads(storage.read(path))
        age = time.time() - other["time"]
        if age < _VOID_SECONDS:
            raise OutputError(
                f"another run is writing {output} ({other['owner']}, last seen {age:.0f} s ago). Wait for it, or stop "
                f"it; if it was killed, its lock is void in {_VOID_SECONDS - age:.0f} s"
            )
        storage.write(path, content())
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(_RENEW_SECONDS):
            storage.write(path, content())

    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()

    def release() -> None:
        ended.set()
        thread.join()
        storage.remove(path)

    return release
