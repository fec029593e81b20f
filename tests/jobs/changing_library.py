"""A library that changes from night to night, and its output."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from singerembed.errors import InterruptedRun
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import RunSummary, run
from singerembed.jobs.units import Listener
from singerembed.output.schema import Counts

GOLDEN = Path(__file__).parents[1] / "golden" / "crops"
CROPS = sorted(GOLDEN.glob("*.wav"))
# Units of two tracks.
OPTIONS = RunOptions(update=True, unit_minutes=8.0, workers=1)


@dataclass
class Library:
    """A folder of recordings, and the output of one night after another."""

    folder: Path
    engine: str
    options: RunOptions

    @property
    def output(self) -> Path:
        return self.folder.parent / ("out" if self.options.partitioned else "out.parquet")

    def add(self, name: str, crop: int) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CROPS[crop], path)
        return path

    def update(self, source: Path | None = None, listeners: Sequence[Listener] = (), **options: Any) -> RunSummary:
        how = replace(self.options, **options)
        place = str(source or self.folder)
        return run(place, str(self.output), engine=self.engine, options=how, listeners=listeners)

    def remove_output(self) -> None:
        if self.options.partitioned:
            shutil.rmtree(self.output)
        else:
            self.output.unlink()

    def stop_after_a_unit(self) -> None:
        """Update, and be told to stop when the first unit is published."""

        class Stop(Listener):
            signal = 0

            def published(self, unit: int, counts: Counts) -> None:
                self.signal = 15

        one = Stop()
        with pytest.raises(InterruptedRun):
            run(
                str(self.folder),
                str(self.output),
                engine=self.engine,
                options=self.options,
                listeners=[one],
                stop=lambda: one.signal,
            )

    def files(self) -> dict[str, tuple[int, bytes]]:
        paths = sorted(self.output.glob("unit-*")) if self.options.partitioned else [self.output]
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    def rows(self) -> pa.Table:
        return ordered(pq.read_table(self.output))

    def full_run(self) -> pa.Table:
        """The rows of a run over today's folder."""
        output = self.folder.parent / "full.parquet"
        how = replace(self.options, update=False, restart=True, partitioned=False)
        run(str(self.folder), str(output), engine=self.engine, options=how)
        return ordered(pq.read_table(output))


class Clock(Listener):
    """A deadline that has passed when so many units are published."""

    def __init__(self, units: int) -> None:
        self._units = units
        self.deadline = Moment(time.time() + (1e6 if units else -1))

    def published(self, unit: int, counts: Counts) -> None:
        self._units -= 1
        if not self._units:
            self.deadline.passed = True


class Moment(float):
    """A time that passes when it is told to."""

    passed = False

    def __le__(self, other: object) -> bool:
        return self.passed or float.__le__(self, other)  # type: ignore[operator]


def is_finished(output: Path) -> bool:
    return (output / "_common_metadata").exists() if output.suffix == "" else output.exists()


def ordered(rows: pa.Table) -> pa.Table:
    return rows.sort_by([("path", "ascending"), ("track_id", "ascending"), ("crop", "ascending")]).combine_chunks()


@pytest.fixture(params=["file", "folder"])
def music(tmp_path: Path, reference_engine: str, request: pytest.FixtureRequest) -> Iterator[Library]:
    music = Library(tmp_path / "music", reference_engine, replace(OPTIONS, partitioned=request.param == "folder"))
    for i in range(5):
        music.add(f"{i}.wav", i)
    music.update()
    yield music
    assert not Path(f"{music.output}.parts").exists()
    assert not [*music.output.parent.rglob(".*.tmp")]


def counted(summary: RunSummary) -> dict[str, int]:
    assert summary.update is not None
    return {name: count for name, count in summary.update.to_dict().items() if count}
