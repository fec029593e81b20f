"""What a run that died leaves for the next one."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from singerembed.jobs.crash_journal import CrashJournal, gather_suspects


def test_nothing_is_suspected_after_an_orderly_end(tmp_path: Path) -> None:
    journal = CrashJournal(str(tmp_path), 2)
    assert journal.suspects == frozenset()

    def decode(row: int) -> None:
        with journal.decoding(row):
            pass

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(decode, range(1, 100)))
    journal.close()
    gather_suspects(str(tmp_path))
    assert CrashJournal(str(tmp_path), 2).suspects == frozenset()


def test_rows_in_flight_at_a_kill_are_suspected_from_then_on(tmp_path: Path) -> None:
    code = (
        "import os, sys, threading, time\n"
        "from singerembed.jobs.crash_journal import CrashJournal\n"
        f"journal = CrashJournal({str(tmp_path)!r}, 2)\n"
        "def decode(row):\n"
        "    with journal.decoding(row):\n"
        "        time.sleep(60)\n"
        "for row in (41, 7):\n"
        "    threading.Thread(target=decode, args=(row,), daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    for _ in range(2):  # a second kill before they were decoded again must not clear them
        gather_suspects(str(tmp_path))
        journal = CrashJournal(str(tmp_path), 1)
        assert journal.suspects == {7, 41}
        journal.close()


def test_a_torn_file_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "in-flight-0").write_bytes(os.urandom(3))
    gather_suspects(str(tmp_path))
    assert CrashJournal(str(tmp_path), 1).suspects == frozenset()


def test_without_a_folder_nothing_is_remembered() -> None:
    journal = CrashJournal(None, 3)
    with journal.decoding(1):
        assert journal.suspects == frozenset()
