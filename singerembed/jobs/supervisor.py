"""Restart a run after a crash of its process, so that one recording does not cost a night."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}
# A crash leaves the rows in flight for the next start (crash_journal.py), so each start gets further; a machine that is
# broken otherwise must not restart for ever.
MAX_RESTARTS = 20
_PR_SET_PDEATHSIG = 1


def run_again_after_crashes() -> None:
    """Fork; return in the child, which does the work. The parent waits, forks again after a crash, and exits alike.

    To be called before anything that does not survive a fork (threads, CUDA) is started.
    """
    for restarts in range(MAX_RESTARTS + 1):
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _die_with(parent)
            return
        status = _wait_for(child)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) not in _CRASHES or restarts == MAX_RESTARTS:
            break
        name = signal.Signals(os.WTERMSIG(status)).name
        print(f"crash       a decoder crashed the process ({name}); starting again", file=sys.stderr)
    sys.exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def _wait_for(child: int) -> int:
    """Wait for the child's end. SIGTERM and SIGHUP are passed on; SIGINT too, unless the terminal sends it to both."""

    def forward(number: int, _frame: FrameType | None) -> None:
        os.kill(child, number)

    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, forward),
        signal.SIGHUP: signal.signal(signal.SIGHUP, forward),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN if os.isatty(0) else forward),
    }
    try:
        _, status = os.waitpid(child, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent is killed; elsewhere than on Linux it lives on and finishes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
