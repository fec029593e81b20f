"""A catalogue that is written to during a run: what is read is what was hashed, or the run says that it is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from singerembed.errors import CatalogError
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import run
from singerembed.jobs.units import Listener
from singerembed.output.schema import Counts

N_ROWS = 3000  # of which a batch of the reader is a third
OPTIONS = RunOptions(unit_minutes=40, crops=1)
CHANGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_text("", encoding="utf-8"),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "grown in front": lambda path: path.write_text(text_of(["new.wav"] * 400 + ["a.wav"] * N_ROWS), encoding="utf-8"),
    "appended to": lambda path: path.write_bytes(path.read_bytes() + b"late,a.wav\n"),
    "replaced": lambda path: shutil.move(other(path), path),
    "removed": lambda path: path.unlink(),
}


def text_of(paths: list[str]) -> str:
    return "track_id,path\n" + "".join(f"{i},{path}\n" for i, path in enumerate(paths))


def other(path: Path) -> Path:
    new = path.with_name("new.csv")
    new.write_text(text_of(["a.wav"] * (N_ROWS + 1)), encoding="utf-8")
    return new


class ChangeAt(Listener):
    """A listener that changes the catalogue once the first unit is published."""

    def __init__(self, change: Callable[[], object]) -> None:
        self._change = change
        self.done = False

    def published(self, unit: int, counts: Counts) -> None:
        if not self.done:
            self.done = True
            self._change()


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(441), 44_100)
    path = tmp_path / "c.csv"
    path.write_text(text_of(["a.wav"] * N_ROWS), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.fakes import InstantEngine

    monkeypatch.setattr("singerembed.jobs.units.open_engine", InstantEngine)


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_changed_catalogue_ends_the_run_and_the_old_one_finishes_it(name: str, catalog: Path, tmp_path: Path) -> None:
    before, output = catalog.read_bytes(), tmp_path / "o.parquet"
    listener = ChangeAt(lambda: CHANGES[name](catalog))
    with pytest.raises(CatalogError, match="Finished units are safe"):
        run(str(catalog), str(output), options=OPTIONS, listeners=[listener])
    assert listener.done
    assert not output.exists()
    catalog.write_bytes(before)
    summary = run(str(catalog), str(output), options=OPTIONS)
    assert summary.units_before > 0
    assert pq.read_table(output)["track_id"].to_pylist() == [str(i) for i in range(N_ROWS)]


def test_a_touched_catalogue_is_still_the_same(catalog: Path, tmp_path: Path) -> None:
    listener = ChangeAt(lambda: os.utime(catalog))
    summary = run(str(catalog), str(tmp_path / "o.parquet"), options=OPTIONS, listeners=[listener])
    assert summary.counts.tracks == N_ROWS
    assert listener.done
