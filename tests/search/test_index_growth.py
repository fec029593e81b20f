"""An index that grows, follows its outputs, and is asked meanwhile; and what a kill leaves."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_library import MadeTrack, made_tracks, write_output

from singerembed.errors import OutputError, UsageError
from singerembed.search import build as build_module
from singerembed.search import nearest as nearest_module
from singerembed.search.build import build_index
from singerembed.search.query import open_index
from singerembed.search.store import StoredIndex

pytest_plugins = ["small_library"]


def test_the_next_nights_output_is_added(tracks: list[MadeTrack], tmp_path: Path) -> None:
    path = str(tmp_path / "i.index")
    build_index([write_output(tmp_path / "one.parquet", tracks[:15])], path)
    mean = StoredIndex(path).scoring.mean
    changed = dataclasses.replace(tracks[3], crops=tracks[3].crops[:2])
    whole_library = [*tracks[:3], changed, *tracks[4:]]
    done = build_index([write_output(tmp_path / "two.parquet", whole_library)], path)
    assert (done.known, done.replaced, done.added_tracks, done.n_tracks) == (14, 1, 6, 20)
    stored = StoredIndex(path)
    assert np.array_equal(stored.scoring.mean, mean)
    assert stored.profiles.n_tracks.tolist() == [4] * 5
    answer = open_index(path).search_track("s4-3", top=3)
    assert {found.singer for found in answer.tracks} == {"singer 4"}
    again = build_index([str(tmp_path / "two.parquet")], path)
    assert (again.known, again.added_tracks) == (20, 0)
    assert open_index(path).search_track("s4-3", top=3) == answer


def test_a_copy_outlives_the_first_of_its_recording(tracks: list[MadeTrack], tmp_path: Path) -> None:
    path = str(tmp_path / "i.index")
    copy = dataclasses.replace(tracks[0], track_id="copy")
    build_index([write_output(tmp_path / "one.parquet", [*tracks, copy])], path)
    changed = dataclasses.replace(tracks[0], crops=made_tracks(1, 1, 3, seed=3)[0].crops)
    done = build_index([write_output(tmp_path / "two.parquet", [changed, *tracks[1:], copy])], path)
    assert (done.replaced, done.added_tracks, done.n_doubled, done.n_tracks) == (1, 1, 0, 21)
    index = open_index(path)
    assert index.search_track("copy").tracks[0].track_id in {"s0-1", "s0-2", "s0-3"}
    assert "copy" in [found.track_id for found in index.search_track("s0-1").tracks]
    again = build_index([str(tmp_path / "two.parquet")], path)
    assert (again.known, again.added_tracks) == (21, 0)


def test_an_update_takes_out_what_the_outputs_have_lost(tracks: list[MadeTrack], tmp_path: Path) -> None:
    """One track went with its only copy left, one moved, one fell silent, and all of a singer's are gone."""
    path = str(tmp_path / "i.index")
    copy = dataclasses.replace(tracks[1], track_id="copy")
    build_index([write_output(tmp_path / "one.parquet", [*tracks, copy])], path)
    moved = dataclasses.replace(tracks[2], track_id="moved")
    silent = dataclasses.replace(tracks[4], crops=[None])
    left = [tracks[0], moved, tracks[3], silent, *tracks[5:16], copy]
    two = write_output(tmp_path / "two.parquet", left)
    stays = build_index([two], path)
    assert (stays.gone, stays.added_tracks, stays.n_doubled, stays.n_tracks) == (0, 1, 1, 20)
    done = build_index([two], path, update=True)
    assert (done.gone, done.known, done.added_tracks, done.n_tracks) == (7, 15, 0, 15)
    index = open_index(path)
    for name in ("s0-1", "s0-2", "s1-0", "s4-1"):
        with pytest.raises(UsageError, match=f'no track of the id or path "{name}"'):
            index.search_track(name)
    assert index.stored.profiles.names == [f"singer {i}" for i in range(4)]
    assert index.stored.profiles.n_tracks.tolist() == [4, 3, 4, 4]
    found = {each.track_id: each.also for each in index.search_track("s0-0", top=20).tracks}
    assert len(found) == 14
    assert found["copy"] == found["moved"] == []
    fresh = str(tmp_path / "fresh.index")
    build_index([two], fresh)
    assert {each.track_id for each in open_index(fresh).search_track("s0-0", top=20).tracks} == set(found)
    again = build_index([two], path, update=True)
    assert (again.gone, again.known, again.added_tracks, again.n_tracks) == (0, 15, 0, 15)


def test_an_update_that_would_take_out_most_of_an_index_asks(tracks: list[MadeTrack], tmp_path: Path) -> None:
    path = str(tmp_path / "i.index")
    build_index([write_output(tmp_path / "one.parquet", tracks)], path)
    tonight = write_output(tmp_path / "tonight.parquet", tracks[:9])
    with pytest.raises(OutputError, match=r"11 of the 20 tracks of the index are not in .*--allow-gone"):
        build_index([tonight], path, update=True)
    assert StoredIndex(path).active.all()
    other = write_output(tmp_path / "other.parquet", tracks[9:])
    assert build_index([tonight, other], path, update=True).gone == 0
    assert build_index([tonight], path, update=True, allow_gone=True).n_tracks == 9
    silent = dataclasses.replace(tracks[0], crops=[None])
    nothing = write_output(tmp_path / "nothing.parquet", [silent])
    assert build_index([nothing], path, update=True, allow_gone=True).n_tracks == 0
    with pytest.raises(UsageError, match="no track of the id"):
        open_index(path).search_track("s0-0")
    assert build_index([str(tmp_path / "one.parquet")], path, update=True).n_tracks == 20
    assert open_index(path).search_track("s0-0", top=1).tracks[0].singer == "singer 0"


def test_an_index_killed_while_it_grows_stays_as_it_was(output: str, tmp_path: Path) -> None:
    path = tmp_path / "i.index"
    build_index([output], str(path))
    answer = open_index(str(path)).search_track("s0-0")
    more = write_output(tmp_path / "more.parquet", made_tracks(5, 4, 3, seed=1, first=10))

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    with pytest.raises(Killed):
        build_index([more], str(path), advance=kill)
    assert open_index(str(path)).search_track("s0-0") == answer
    assert build_index([more], str(path)).n_tracks == 40
    assert {p.name[:6] for p in path.iterdir()} == {"000000", "000001", "index.", "lock", "scorin"}


def test_who_has_opened_an_index_may_ask_it_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "EXACT_ROWS", 130)
    monkeypatch.setattr(nearest_module, "EXACT_ROWS", 130)
    nights = [
        write_output(tmp_path / f"{night}.parquet", made_tracks(20, 10, 1, seed=night, first=10 * night))
        for night in range(3)
    ]
    path = tmp_path / "i.index"
    build_index([nights[0]], str(path))
    notes = path / "123456 notes of mine.txt"
    notes.touch()
    opened = open_index(str(path))
    build_index([nights[1]], str(path))
    found = opened.search_track("s0-0", top=200).tracks
    assert {track.track_id.partition("-")[2] for track in found} == {str(number) for number in range(10)}
    assert opened.search_track("s0-0").singers
    build_index([nights[2]], str(path))
    build_index([nights[2]], str(path))
    assert sorted(p.name for p in path.glob("*.faiss")) == ["000002.crops.faiss", "000002.tracks.faiss"]
    assert sorted(p.name for p in path.glob("*.f16"))[-1] == "000002.tracks.f16"
    assert notes.exists()


def test_one_process_adds_to_an_index_at_a_time(output: str, tmp_path: Path) -> None:
    path = tmp_path / "i.index"
    build_index([output], str(path))
    more = write_output(tmp_path / "more.parquet", made_tracks(5, 4, 3, seed=1, first=10))
    refused = list[str]()

    def add_too() -> None:
        with pytest.raises(OutputError) as raised:
            build_index([more], str(path))
        refused.append(str(raised.value))

    build_index([more], str(path), advance=add_too)
    assert len(refused) == 20
    assert f"another run is writing {path} (process {os.getpid()})" in refused[0]
    assert open_index(str(path)).stored.active.sum() == 40
    new = str(tmp_path / "new.index")
    with pytest.raises(OutputError, match=r"cannot write the index .*new\.index"):  # two make it: the first one counts
        build_index([more], new, advance=lambda: Path(new).exists() or build_index([output], new))
    assert [found.track_id[:2] for found in open_index(new).search_track("s0-0", top=3).tracks] == ["s0"] * 3
    assert not list(tmp_path.glob(".new.index.*"))


def test_a_credit_that_was_put_right_is_right_in_the_index(tracks: list[MadeTrack], tmp_path: Path) -> None:
    path = str(tmp_path / "i.index")
    wrong = dataclasses.replace(tracks[0], singer="singer O")
    build_index([write_output(tmp_path / "one.parquet", [wrong, *tracks[1:]])], path)
    for replaced in (1, 0):
        done = build_index([write_output(tmp_path / "two.parquet", tracks)], path)
        assert (done.known, done.replaced, done.n_tracks) == (20 - replaced, replaced, 20)
    assert StoredIndex(path).profiles.names == [f"singer {number}" for number in range(5)]
    assert StoredIndex(path).profiles.n_tracks.tolist() == [4] * 5
    assert {found.singer for found in open_index(path).search_track("s0-1", top=3).tracks} == {"singer 0"}
    without = pq.read_table(tmp_path / "two.parquet").drop_columns(["singer"])
    pq.write_table(without, tmp_path / "three.parquet")
    assert build_index([str(tmp_path / "three.parquet")], path).known == 20
