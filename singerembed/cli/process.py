"""What a long command does to its process: it notes signals, and keeps C libraries from printing."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import click

from singerembed.cli.console import note, verbosity

_COPIES_SECONDS = 1.0


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block, what C libraries print to descriptors 1 and 2 is dropped; Python's stderr stays.

    With --verbose only stdout is kept clean, as --json is printed there: what comes for it goes to stderr.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    own, before = [os.dup(1), os.dup(2)], sys.stderr
    if verbosity(click.get_current_context()) > 0:
        os.dup2(2, 1)
    else:
        if before is sys.__stderr__:
            sys.stderr = os.fdopen(os.dup(own[1]), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.close(null)
    try:
        yield
    finally:
        for number, copy in enumerate(own, start=1):
            os.dup2(copy, number)
            os.close(copy)
        if sys.stderr is not before:
            with suppress(OSError):
                sys.stderr.close()
            sys.stderr = before


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Within the block, the first SIGINT, SIGTERM or SIGHUP is noted for the run to stop on; a later one ends at once.

    Signals within a second of the first are copies of it: one that is sent to the whole process group comes directly
    and by way of the supervisor.
    """
    received: list[int] = []
    first = 0.0

    def receive(number: int, _frame: object) -> None:
        nonlocal first
        if received:
            if time.monotonic() - first > _COPIES_SECONDS:
                os._exit(128 + number)
            return
        first = time.monotonic()
        received.append(number)
        note("stopping", "after the tracks that are being embedded; press again to stop now")

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
