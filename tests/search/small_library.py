"""Fixtures: a small library of made-up singers, and its output."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_library import MadeTrack, made_tracks, write_output


@pytest.fixture
def tracks() -> list[MadeTrack]:
    """Five singers with four tracks of three crops each."""
    return made_tracks(5, 4, 3)


@pytest.fixture
def output(tracks: list[MadeTrack], tmp_path: Path) -> str:
    """An output of `tracks`."""
    return write_output(tmp_path / "out.parquet", tracks)
