"""An output that is brought up to date with its catalogue."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from singerembed.audio.limits import TimeLimit
from singerembed.audio.process import packet_hash
from singerembed.errors import InterruptedRun, OutputError
from singerembed.jobs import todays_tracks
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import RunSummary, run
from singerembed.jobs.track import Stopped
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
def library(tmp_path: Path, reference_engine: str, request: pytest.FixtureRequest) -> Iterator[Library]:
    library = Library(tmp_path / "music", reference_engine, replace(OPTIONS, partitioned=request.param == "folder"))
    for i in range(5):
        library.add(f"{i}.wav", i)
    library.update()
    yield library
    assert not Path(f"{library.output}.parts").exists()
    assert not [*library.output.parent.rglob(".*.tmp")]


def counted(summary: RunSummary) -> dict[str, int]:
    assert summary.update is not None
    return {name: count for name, count in summary.update.to_dict().items() if count}


def test_the_first_night_is_a_run_of_everything(library: Library) -> None:
    assert library.rows().equals(library.full_run())
    assert library.rows().num_rows == 5


def test_nothing_new_writes_nothing(library: Library) -> None:
    before = library.files()
    summary = library.update()
    assert counted(summary) == {"kept": 5}
    assert summary.already_done
    assert library.files() == before


def test_what_was_changed_and_what_is_new_is_embedded_and_what_went_goes(library: Library) -> None:
    before = library.files()
    library.add("1.wav", 6)
    (library.folder / "4.wav").unlink()
    library.add("00.wav", 5)
    library.add("z/9.wav", 7)
    summary = library.update()
    assert counted(summary) == {"kept": 3, "new": 2, "changed": 1, "gone": 1}
    assert summary.embedded.tracks == 3
    assert summary.counts.tracks == 6
    assert library.rows().equals(library.full_run())
    if library.options.partitioned:
        after = library.files()
        assert [name for name in before if after[name] == before[name]] == ["unit-000001.parquet"]


def test_a_night_of_new_recordings_touches_no_full_unit(library: Library) -> None:
    before = library.files()
    for i in range(3):
        library.add(f"new/{i}.wav", i + 5)
    library.update()
    assert library.rows().equals(library.full_run())
    if library.options.partitioned:
        after = library.files()
        assert sorted(after) == [f"unit-00000{i}.parquet" for i in range(4)]
        assert [name for name in before if after[name] != before[name]] == ["unit-000002.parquet"]


def test_the_same_size_and_another_time_is_a_change_and_so_is_a_clock_set_back(library: Library) -> None:
    path = library.folder / "0.wav"
    content = bytearray(path.read_bytes())
    content[2000:60_000] = CROPS[6].read_bytes()[2000:60_000]
    path.write_bytes(content)
    assert counted(library.update()) == {"kept": 4, "changed": 1}
    os.utime(path, (1, 1))
    assert counted(library.update()) == {"kept": 4, "changed": 1}
    with path.open("ab") as file:
        file.write(b"LIST\4\0\0\0abcd")
    os.utime(path, (1, 1))
    assert counted(library.update()) == {"kept": 4, "changed": 1}
    assert library.rows().equals(library.full_run())


@pytest.mark.parametrize("name", ["catalog.csv", "catalog.jsonl"])
def test_columns_are_those_of_todays_catalogue(library: Library, tmp_path: Path, name: str) -> None:
    catalog, rows = tmp_path / name, [("0", "Ada", 1), ("1", "Bo", None), ("2", "Cy", 3)]

    def write(rows: list[tuple[str, str, int | None]], extra: str = "") -> None:
        lines = [f"music/{n}.wav,{singer},{year or ''}{extra}" for n, singer, year in rows]
        if name.endswith("csv"):
            head = "path,singer,year" + (",mood" if extra else "")
            catalog.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
        else:
            mood = ', "mood": ["x", "y"]' if extra else ""
            catalog.write_text(
                "".join(
                    f'{{"path": "music/{n}.wav", "singer": "{s}", "year": {y or "null"}{mood}}}\n' for n, s, y in rows
                ),
                encoding="utf-8",
            )

    shutil.rmtree(library.output) if library.options.partitioned else library.output.unlink()
    write(rows)
    library.update(catalog)
    assert counted(library.update(catalog)) == {"kept": 3}
    first = library.files()
    rows[2] = ("2", "Di", 4)
    write(rows)
    summary = library.update(catalog)
    assert (counted(summary), summary.embedded.tracks) == ({"kept": 3}, 0)
    assert library.rows()["singer"].to_pylist() == ["Ada", "Bo", "Di"]
    if library.options.partitioned:
        assert library.files()["unit-000000.parquet"] == first["unit-000000.parquet"]
    write(rows, ",sad")
    assert counted(library.update(catalog)) == {"kept": 3}
    assert library.rows()["mood"].to_pylist() == ["sad" if name.endswith("csv") else '["x", "y"]'] * 3
    assert counted(library.update(catalog)) == {"kept": 3}


def test_a_recording_that_failed_in_passing_is_tried_again_and_another_is_not(library: Library) -> None:
    library.add("locked.wav", 5)
    (library.folder / "bad.wav").write_bytes(b"RIFF" + bytes(100))
    library.update()
    rows = library.rows()
    kinds = dict(zip(rows["path"].to_pylist(), rows["error_code"].to_pylist(), strict=True))
    assert kinds["music/bad.wav"] is not None
    assert counted(library.update()) == {"kept": 7}


def test_a_file_that_is_not_there_tonight_keeps_its_rows(library: Library, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.csv"
    catalog.write_text("path\n" + "".join(f"music/{i}.wav\n" for i in range(5)), encoding="utf-8")
    shutil.rmtree(library.output) if library.options.partitioned else library.output.unlink()
    library.update(catalog)
    before = library.rows()
    (tmp_path / "music").rename(tmp_path / "elsewhere")
    assert counted(library.update(catalog)) == {"kept": 5, "missing": 5}
    assert library.rows().equals(before)
    (tmp_path / "elsewhere").rename(tmp_path / "music")
    assert counted(library.update(catalog)) == {"kept": 5}


def test_more_than_half_gone_is_refused(library: Library) -> None:
    before = library.rows()
    for i in range(3):
        (library.folder / f"{i}.wav").unlink()
    with pytest.raises(OutputError, match=r"3 of the 5 recordings of the output have gone.*--allow-gone"):
        library.update()
    assert library.rows().equals(before)
    summary = library.update(keep_missing=True)
    assert counted(summary) == {"kept": 5, "gone_kept": 3}
    assert library.rows().equals(before)
    assert counted(library.update(allow_gone=True)) == {"kept": 2, "gone": 3}
    assert library.rows().equals(library.full_run())


def test_other_engines_and_options_are_refused(library: Library) -> None:
    with pytest.raises(OutputError, match=r"has other embeddings: options crops \(was None, now 1\)"):
        library.update(crops=1)


def test_an_interrupted_night_is_taken_in_although_the_folder_has_changed_since(library: Library) -> None:
    for i in range(12):
        library.add(f"new/{i}.wav", i % 8)
    library.stop_after_a_unit()
    library.add("another.wav", 7)
    (library.folder / "new" / "11.wav").unlink()
    summary = library.update()
    assert summary.embedded.tracks < 12
    assert library.rows().equals(library.full_run())


def test_a_first_run_that_was_stopped_is_gone_on_with_after_the_catalogue_changed(library: Library) -> None:
    shutil.rmtree(library.output) if library.options.partitioned else library.output.unlink()
    for i in range(12):
        library.add(f"new/{i}.wav", i % 8)
    library.stop_after_a_unit()
    library.add("another.wav", 7)
    summary = library.update()
    assert summary.update is not None
    assert summary.update.kept > 0
    assert library.rows().equals(library.full_run())


def test_nested_columns_and_nan_are_compared(library: Library, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.parquet"
    columns = {"path": ["music/0.wav", "music/1.wav"], "tags": [["a"], None], "bpm": [float("nan"), None]}
    pq.write_table(pa.table(columns), catalog)
    shutil.rmtree(library.output) if library.options.partitioned else library.output.unlink()
    library.update(catalog)
    before = library.files()
    library.update(catalog)
    assert library.files() == before
    pq.write_table(pa.table({**columns, "tags": [["a"], ["b", "c"]]}), catalog)
    assert counted(library.update(catalog)) == {"kept": 2}
    assert library.rows()["tags"].to_pylist() == [["a"], ["b", "c"]]


@pytest.mark.parametrize("twice", [False, True])
def test_a_recording_that_is_listed_twice_has_rows_twice(library: Library, tmp_path: Path, twice: bool) -> None:
    catalog = tmp_path / "catalog.csv"
    catalog.write_text("path,track_id\nmusic/0.wav,a\nmusic/1.wav,b\nmusic/0.wav,c\n", encoding="utf-8")
    shutil.rmtree(library.output) if library.options.partitioned else library.output.unlink()
    library.update(catalog)
    assert counted(library.update(catalog)) == {"kept": 3}
    if twice:
        catalog.write_text("path,track_id\nmusic/0.wav,a\nmusic/1.wav,b\n" + "music/0.wav,d\n" * 2, encoding="utf-8")
        assert counted(library.update(catalog)) == {"kept": 3, "new": 1}
        assert sorted(library.rows()["track_id"].to_pylist()) == ["a", "b", "d", "d"]


def test_at_the_deadline_the_output_holds_what_is_done(library: Library) -> None:
    shutil.rmtree(library.output) if library.options.partitioned else library.output.unlink()
    for i in range(12):
        library.add(f"new/{i}.wav", i % 8)
    clock = Clock(units=2)
    first = library.update(listeners=[clock], deadline=clock.deadline)
    assert first.at_deadline
    assert 0 < first.counts.tracks < 17
    assert library.rows().num_rows == first.counts.tracks
    with pytest.raises(OutputError, match="catalog sha256"):
        library.update(update=False)
    clock = Clock(units=0)
    assert library.update(listeners=[clock], deadline=clock.deadline).at_deadline
    last = library.update(deadline=time.time() + 1e6)
    assert (last.at_deadline, last.counts.tracks) == (False, 17)
    assert last.update is not None
    assert last.update.kept == first.counts.tracks
    assert library.rows().equals(library.full_run())


@pytest.mark.parametrize("update", [False, True])
def test_the_last_unit_is_not_lost_where_the_deadline_comes_before_it(library: Library, update: bool) -> None:
    shutil.rmtree(library.output) if library.options.partitioned else library.output.unlink()
    for i in range(2, 5):
        (library.folder / f"{i}.wav").unlink()
    late = library.update(deadline=time.time() - 1, update=update)
    assert (late.at_deadline, late.counts.tracks) == (True, 0)
    assert not is_finished(library.output)
    assert library.update(update=update).counts.tracks == 2


def test_without_update_a_run_goes_on_after_the_deadline(library: Library) -> None:
    shutil.rmtree(library.output) if library.options.partitioned else library.output.unlink()
    for i in range(12):
        library.add(f"new/{i}.wav", i % 8)
    clock = Clock(units=2)
    first = library.update(listeners=[clock], deadline=clock.deadline, update=False)
    assert first.at_deadline
    assert not is_finished(library.output)
    last = library.update(update=False)
    assert last.units_before >= 2
    assert last.counts.tracks == 17
    assert library.rows().equals(library.full_run())


def test_moved_and_retagged_files_keep_their_rows(library: Library) -> None:
    shutil.rmtree(library.output) if library.options.partitioned else library.output.unlink()
    library.options = replace(library.options, identity="audio")
    library.update()
    embeddings = dict(zip(library.rows()["packet_hash"].to_pylist(), library.rows()["embedding"], strict=True))
    (library.folder / "0.wav").rename(library.folder / "moved.wav")
    for name in ("1.wav", "2.wav"):
        path = library.folder / name
        content = path.read_bytes() + b"LIST" + (12).to_bytes(4, "little") + b"INFOINAM\0\0\0\0"
        path.write_bytes(content[:4] + (len(content) - 8).to_bytes(4, "little") + content[8:])
    (library.folder / "2.wav").rename(library.folder / "both.wav")
    library.add("3.wav", 6)
    summary = library.update()
    assert counted(summary) == {"kept": 4, "changed": 1, "moved": 2, "retagged": 1}
    assert summary.embedded.tracks == 1
    rows = library.rows()
    assert rows.equals(library.full_run())
    for hashed, embedding in zip(rows["packet_hash"].to_pylist(), rows["embedding"], strict=True):
        assert embedding == embeddings.get(hashed, embedding)
    assert counted(library.update()) == {"kept": 5}


def test_the_hashes_of_an_interrupted_night_are_kept(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(library.output) if library.options.partitioned else library.output.unlink()
    library.options = replace(library.options, identity="audio")
    library.update()
    (library.folder / "0.wav").rename(library.folder / "moved.wav")
    read: list[str] = []

    def noted(path: str, limit: TimeLimit) -> str:
        read.append(path)
        return packet_hash(path, limit)

    monkeypatch.setattr(todays_tracks, "packet_hash", noted)
    monkeypatch.setattr("singerembed.jobs.run.publish_kept", interrupted)
    with pytest.raises(InterruptedRun):
        library.update()
    monkeypatch.undo()
    monkeypatch.setattr(todays_tracks, "packet_hash", noted)
    assert counted(library.update()) == {"kept": 5, "moved": 1}
    assert len(read) == 1


def interrupted(*_arguments: object) -> None:
    raise Stopped


@pytest.mark.parametrize("partitioned", [False, True])
def test_a_library_and_an_output_on_object_storage(reference_engine: str, partitioned: bool) -> None:
    store = fsspec.filesystem("memory")
    for i in range(5):
        store.pipe(f"/nights/library/{i}.wav", CROPS[i].read_bytes())
    output = "memory://nights/out" if partitioned else "memory://nights/out.parquet"

    def update() -> RunSummary:
        options = replace(OPTIONS, partitioned=partitioned)
        return run("memory://nights/library/", output, engine=reference_engine, options=options)

    try:
        assert update().counts.tracks == 5
        assert counted(update()) == {"kept": 5}
        store.rm("/nights/library/0.wav")
        store.pipe("/nights/library/1.wav", CROPS[6].read_bytes())
        store.pipe("/nights/library/5.wav", CROPS[5].read_bytes())
        summary = update()
        assert counted(summary) == {"kept": 3, "new": 1, "changed": 1, "gone": 1}
        assert summary.counts.tracks == 5
        left = [name for name in store.find("/nights") if "parts" in name or name.endswith(".tmp")]
        assert left == []
    finally:
        store.rm("/nights", recursive=True)
