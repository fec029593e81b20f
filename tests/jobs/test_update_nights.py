"""Updates that are cut off, deadlines, moved files, object storage."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import changing_library
import fsspec
import pytest
from changing_library import CROPS, OPTIONS, Clock, Library, counted, is_finished

from singerembed.audio.limits import TimeLimit
from singerembed.audio.process import packet_hash
from singerembed.errors import InterruptedRun, OutputError
from singerembed.jobs import todays_tracks
from singerembed.jobs.run import RunSummary, run
from singerembed.jobs.track import Stopped

music = changing_library.music  # the fixture


def test_an_interrupted_night_is_taken_in_although_the_folder_has_changed_since(music: Library) -> None:
    for i in range(12):
        music.add(f"new/{i}.wav", i % 8)
    music.stop_after_a_unit()
    music.add("another.wav", 7)
    (music.folder / "new" / "11.wav").unlink()
    summary = music.update()
    assert summary.embedded.tracks < 12
    assert music.rows().equals(music.full_run())


def test_a_first_run_that_was_stopped_is_gone_on_with_after_the_catalogue_changed(music: Library) -> None:
    shutil.rmtree(music.output) if music.options.partitioned else music.output.unlink()
    for i in range(12):
        music.add(f"new/{i}.wav", i % 8)
    music.stop_after_a_unit()
    music.add("another.wav", 7)
    summary = music.update()
    assert summary.update is not None
    assert summary.update.kept > 0
    assert music.rows().equals(music.full_run())


def test_at_the_deadline_the_output_holds_what_is_done(music: Library) -> None:
    shutil.rmtree(music.output) if music.options.partitioned else music.output.unlink()
    for i in range(12):
        music.add(f"new/{i}.wav", i % 8)
    clock = Clock(units=2)
    first = music.update(listeners=[clock], deadline=clock.deadline)
    assert first.at_deadline
    assert 0 < first.counts.tracks < 17
    assert music.rows().num_rows == first.counts.tracks
    with pytest.raises(OutputError, match="catalog sha256"):
        music.update(update=False)
    clock = Clock(units=0)
    assert music.update(listeners=[clock], deadline=clock.deadline).at_deadline
    last = music.update(deadline=time.time() + 1e6)
    assert (last.at_deadline, last.counts.tracks) == (False, 17)
    assert last.update is not None
    assert last.update.kept == first.counts.tracks
    assert music.rows().equals(music.full_run())


@pytest.mark.parametrize("update", [False, True])
def test_the_last_unit_is_not_lost_where_the_deadline_comes_before_it(music: Library, update: bool) -> None:
    shutil.rmtree(music.output) if music.options.partitioned else music.output.unlink()
    for i in range(2, 5):
        (music.folder / f"{i}.wav").unlink()
    late = music.update(deadline=time.time() - 1, update=update)
    assert (late.at_deadline, late.counts.tracks) == (True, 0)
    assert not is_finished(music.output)
    assert music.update(update=update).counts.tracks == 2


def test_without_update_a_run_goes_on_after_the_deadline(music: Library) -> None:
    shutil.rmtree(music.output) if music.options.partitioned else music.output.unlink()
    for i in range(12):
        music.add(f"new/{i}.wav", i % 8)
    clock = Clock(units=2)
    first = music.update(listeners=[clock], deadline=clock.deadline, update=False)
    assert first.at_deadline
    assert not is_finished(music.output)
    last = music.update(update=False)
    assert last.units_before >= 2
    assert last.counts.tracks == 17
    assert music.rows().equals(music.full_run())


def test_moved_and_retagged_files_keep_their_rows(music: Library) -> None:
    shutil.rmtree(music.output) if music.options.partitioned else music.output.unlink()
    music.options = replace(music.options, identity="audio")
    music.update()
    embeddings = dict(zip(music.rows()["packet_hash"].to_pylist(), music.rows()["embedding"], strict=True))
    (music.folder / "0.wav").rename(music.folder / "moved.wav")
    for name in ("1.wav", "2.wav"):
        path = music.folder / name
        content = path.read_bytes() + b"LIST" + (12).to_bytes(4, "little") + b"INFOINAM\0\0\0\0"
        path.write_bytes(content[:4] + (len(content) - 8).to_bytes(4, "little") + content[8:])
    (music.folder / "2.wav").rename(music.folder / "both.wav")
    music.add("3.wav", 6)
    summary = music.update()
    assert counted(summary) == {"kept": 4, "changed": 1, "moved": 2, "retagged": 1}
    assert summary.embedded.tracks == 1
    rows = music.rows()
    assert rows.equals(music.full_run())
    for hashed, embedding in zip(rows["packet_hash"].to_pylist(), rows["embedding"], strict=True):
        assert embedding == embeddings.get(hashed, embedding)
    assert counted(music.update()) == {"kept": 5}


def test_the_hashes_of_an_interrupted_night_are_kept(music: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(music.output) if music.options.partitioned else music.output.unlink()
    music.options = replace(music.options, identity="audio")
    music.update()
    (music.folder / "0.wav").rename(music.folder / "moved.wav")
    read: list[str] = []

    def noted(path: str, limit: TimeLimit) -> str:
        read.append(path)
        return packet_hash(path, limit)

    monkeypatch.setattr(todays_tracks, "packet_hash", noted)
    monkeypatch.setattr("singerembed.jobs.run.publish_kept", interrupted)
    with pytest.raises(InterruptedRun):
        music.update()
    with Path(f"{music.output}.parts", "packet_hashes.jsonl").open("a", encoding="utf-8") as file:
        file.write('["killed while it wro')
    monkeypatch.undo()
    monkeypatch.setattr(todays_tracks, "packet_hash", noted)
    assert counted(music.update()) == {"kept": 5, "moved": 1}
    assert len(read) == 1


def interrupted(*_arguments: object) -> None:
    raise Stopped


@pytest.mark.parametrize("partitioned", [False, True])
def test_a_library_and_an_output_on_object_storage(reference_engine: str, partitioned: bool) -> None:
    store = fsspec.filesystem("memory")
    for i in range(5):
        store.pipe(f"/nights/music/{i}.wav", CROPS[i].read_bytes())
    output = "memory://nights/out" if partitioned else "memory://nights/out.parquet"

    def update() -> RunSummary:
        options = replace(OPTIONS, partitioned=partitioned)
        return run("memory://nights/music/", output, engine=reference_engine, options=options)

    try:
        assert update().counts.tracks == 5
        assert counted(update()) == {"kept": 5}
        store.rm("/nights/music/0.wav")
        store.pipe("/nights/music/1.wav", CROPS[6].read_bytes())
        store.pipe("/nights/music/5.wav", CROPS[5].read_bytes())
        summary = update()
        assert counted(summary) == {"kept": 3, "new": 1, "changed": 1, "gone": 1}
        assert summary.counts.tracks == 5
        left = [name for name in store.find("/nights") if "parts" in name or name.endswith(".tmp")]
        assert left == []
    finally:
        store.rm("/nights", recursive=True)
