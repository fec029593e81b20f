"""A short turn of tests/soak/bad_storage.py: storage that fails, and a catalogue that others write to, at random."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "soak" / "bad_storage.py"


def test_every_track_is_accounted_for_and_rows_are_those_of_an_undisturbed_run() -> None:
    try:
        importlib.import_module("mfusepy")
    except (ImportError, OSError) as exc:
        pytest.skip(f"needs mfusepy and libfuse2 or libfuse3: {exc}")
    if shutil.which("fusermount") is None or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs fusermount (Debian: fuse) and leave to open /dev/fuse")
    size = ["--minutes", "4", "--faults", "2", "--rounds", "5", "--seed", "2"]
    command = [sys.executable, str(SCRIPT), *size]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("equal to the undisturbed run") == 2
