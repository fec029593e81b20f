"""Threads that can be left behind when a system call on them does not return.

A thread that is blocked in read() on a share that hangs cannot be interrupted. It is abandoned: its call is answered,
another thread takes its place, and it ends by itself if the system call ever returns. Nobody waits for it at the end.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from singerembed.audio.limits import TimeLimit
from singerembed.errors import TooManyErrors

Result = TypeVar("Result")

# A decoder notices the limit by itself when it gets to look at the clock; beyond this it does not.
_GRACE_SECONDS = 5.0
_STOP_SECONDS = 5.0  # that a call may stay in a system call after the run was asked to stop
_POLL_SECONDS = 0.5
_SLOW_SECONDS = 60.0  # in one call of a decoder, after which the log names the recording
MAX_ABANDONED = 64  # threads; a storage that hangs more of them is not there

_log = logging.getLogger(__name__)


class _Call:
    """One call: what runs, its clock, and where its result goes."""

    def __init__(self, function: Callable[[Any, TimeLimit], Any], item: Any, limit: TimeLimit) -> None:
        self.function, self.item, self.limit = function, item, limit
        self.future: Future[Any] = Future()
        self.thread: threading.Thread | None = None  # that runs it
        self.is_named = False  # in the log, as slow


class WorkerThreads:
    """Runs calls on `threads` daemon threads, each call with a time limit on what it decodes. Must be closed."""

    def __init__(
        self,
        threads: int,
        new_limit: Callable[[], TimeLimit],
        overdue: Callable[[Any], Any],
        stop: Callable[[], int],
        stopped: type[Exception],
    ) -> None:
        """`overdue` gives the result of an item whose thread is abandoned; after `stop` it raises `stopped` instead."""
        self._new_limit, self._overdue = new_limit, overdue
        self._stop, self._stopped = stop, stopped
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._running: set[_Call] = set()
        self._lock = threading.Lock()
        self._abandoned = 0
        self._closing = False
        self._closed = threading.Event()  # and no thread is left
        self._stop_seen = 0.0
        self._threads: list[threading.Thread] = []
        for _ in range(threads):
            self._start_thread()
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watchdog.start()

    def submit(self, function: Callable[[Any, TimeLimit], Result], item: Any) -> Future[Result]:
        """Call `function` of `item` and its limit on one of the threads."""
        call = _Call(function, item, self._new_limit())
        if self._abandoned > MAX_ABANDONED:
            call.future.set_exception(_too_many())
        else:
            self._calls.put(call)
        return call.future

    def close(self) -> None:
        """Give up calls that have not begun, and wait for the others, but for abandoned threads."""
        self._closing = True
        for call in self._waiting_calls():
            call.future.cancel()
        for _ in self._threads:
            self._calls.put(None)
        while True:
            with self._lock:
                alive = [thread for thread in self._threads if thread.is_alive()]
            if not alive:
                break
            alive[0].join(_POLL_SECONDS)
        self._closed.set()
        self._watchdog.join()

    def _waiting_calls(self) -> Iterator[_Call]:
        with contextlib.suppress(queue.Empty):
            while (call := self._calls.get_nowait()) is not None:
                yield call

    def _give_up_waiting_calls(self) -> None:
        for call in self._waiting_calls():
            _answer(call.future, None, _too_many())

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name=f"embed-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            with self._lock:
                call.thread = threading.current_thread()
                self._running.add(call)
            result, error = None, None
            try:
                result = call.function(call.item, call.limit)
            except BaseException as exc:
                error = exc
            with self._lock:
                if call not in self._running:
                    return  # abandoned: another thread has this one's place
                self._running.remove(call)
            _answer(call.future, result, error)

    def _watch(self) -> None:
        """Abandon threads whose calls are overdue, until the pool is closed."""
        while not self._closed.wait(_POLL_SECONDS):
            if self._stop() and not self._stop_seen:
                self._stop_seen = time.monotonic()
            stopping = self._stop_seen and time.monotonic() - self._stop_seen > _STOP_SECONDS
            with self._lock:
                slow = [
                    call for call in self._running if not call.is_named and call.limit.running_seconds() > _SLOW_SECONDS
                ]
                stuck = [
                    call
                    for call in self._running
                    if call.limit.overdue_seconds() > _GRACE_SECONDS
                    or (stopping and call.limit.running_seconds() > _STOP_SECONDS)
                ]
                for call in stuck:
                    self._running.remove(call)
                    self._abandoned += 1
                    self._threads = [thread for thread in self._threads if thread is not call.thread]
                    if not self._closing and self._abandoned <= MAX_ABANDONED:
                        self._start_thread()
            for call in slow:
                call.is_named = True
                _log.warning("%s has been waited for for %.0f s", call.item, call.limit.running_seconds())
            for call in stuck:
                if stopping:
                    _answer(call.future, None, self._stopped())
                else:
                    _log.warning("a thread is left behind: %s does not return from its storage", call.item)
                    _answer(call.future, self._overdue(call.item), None)
            if self._abandoned > MAX_ABANDONED:
                self._give_up_waiting_calls()


def _too_many() -> TooManyErrors:
    return TooManyErrors(
        f"more than {MAX_ABANDONED} recordings do not return from their storage. Finished units are safe: see to the "
        "storage and run the same command again"
    )


def _answer(future: Future[Any], result: Any, error: BaseException | None) -> None:
    with contextlib.suppress(InvalidStateError):  # it was cancelled
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
