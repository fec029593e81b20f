"""An output that is brought up to date with its catalogue."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import changing_library
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from changing_library import CROPS, Library, counted

from singerembed.audio.recording import open_recording
from singerembed.errors import OutputError, TrackError

music = changing_library.music  # the fixture


def test_the_first_night_is_a_run_of_everything(music: Library) -> None:
    assert music.rows().equals(music.full_run())
    assert music.rows().num_rows == 5


def test_nothing_new_writes_nothing(music: Library) -> None:
    before = music.files()
    summary = music.update()
    assert counted(summary) == {"kept": 5}
    assert summary.already_done
    assert music.files() == before


def test_what_was_changed_and_what_is_new_is_embedded_and_what_went_goes(music: Library) -> None:
    before = music.files()
    music.add("1.wav", 6)
    (music.folder / "4.wav").unlink()
    music.add("00.wav", 5)
    music.add("z/9.wav", 7)
    summary = music.update()
    assert counted(summary) == {"kept": 3, "new": 2, "changed": 1, "gone": 1}
    assert summary.embedded.tracks == 3
    assert summary.counts.tracks == 6
    assert music.rows().equals(music.full_run())
    if music.options.partitioned:
        after = music.files()
        assert [name for name in before if after[name] == before[name]] == ["unit-000001.parquet"]


def test_a_night_of_new_recordings_touches_no_full_unit(music: Library) -> None:
    before = music.files()
    for i in range(3):
        music.add(f"new/{i}.wav", i + 5)
    music.update()
    assert music.rows().equals(music.full_run())
    if music.options.partitioned:
        after = music.files()
        assert sorted(after) == [f"unit-00000{i}.parquet" for i in range(4)]
        assert [name for name in before if after[name] != before[name]] == ["unit-000002.parquet"]


def test_the_same_size_and_another_time_is_a_change_and_so_is_a_clock_set_back(music: Library) -> None:
    path = music.folder / "0.wav"
    content = bytearray(path.read_bytes())
    content[2000:60_000] = CROPS[6].read_bytes()[2000:60_000]
    path.write_bytes(content)
    assert counted(music.update()) == {"kept": 4, "changed": 1}
    os.utime(path, (1, 1))
    assert counted(music.update()) == {"kept": 4, "changed": 1}
    with path.open("ab") as file:
        file.write(b"LIST\4\0\0\0abcd")
    os.utime(path, (1, 1))
    assert counted(music.update()) == {"kept": 4, "changed": 1}
    assert music.rows().equals(music.full_run())


@pytest.mark.parametrize("name", ["catalog.csv", "catalog.jsonl"])
def test_columns_are_those_of_todays_catalogue(music: Library, tmp_path: Path, name: str) -> None:
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

    music.remove_output()
    write(rows)
    music.update(catalog)
    assert counted(music.update(catalog)) == {"kept": 3}
    first = music.files()
    rows[2] = ("2", "Di", 4)
    write(rows)
    summary = music.update(catalog)
    assert (counted(summary), summary.embedded.tracks) == ({"kept": 3}, 0)
    assert music.rows()["singer"].to_pylist() == ["Ada", "Bo", "Di"]
    if music.options.partitioned:
        assert music.files()["unit-000000.parquet"] == first["unit-000000.parquet"]
    write(rows, ",sad")
    assert counted(music.update(catalog)) == {"kept": 3}
    assert music.rows()["mood"].to_pylist() == ["sad" if name.endswith("csv") else '["x", "y"]'] * 3
    assert counted(music.update(catalog)) == {"kept": 3}


def test_a_recording_that_failed_in_passing_is_tried_again_and_another_is_not(
    music: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    music.add("away.wav", 5)
    (music.folder / "bad.wav").write_bytes(b"RIFF" + bytes(100))

    def failing(path: str, *arguments: Any, **options: Any) -> Any:
        if path.endswith("away.wav"):
            raise TrackError("unreadable", "the share is away")
        return open_recording(path, *arguments, **options)

    monkeypatch.setattr("singerembed.jobs.track.open_recording", failing)
    music.update()
    rows = music.rows()
    codes = dict(zip(rows["path"].to_pylist(), rows["error_code"].to_pylist(), strict=True))
    assert codes["music/away.wav"] == "unreadable"
    assert codes["music/bad.wav"] not in {None, "unreadable"}
    assert counted(music.update()) == {"kept": 6, "retried": 1}
    monkeypatch.undo()
    summary = music.update()
    assert counted(summary) == {"kept": 6, "retried": 1}
    assert summary.counts.errors.total() == 1
    assert counted(music.update()) == {"kept": 7}
    assert music.rows().equals(music.full_run())


def test_errors_are_retried_in_the_order_of_the_output(music: Library, tmp_path: Path) -> None:
    catalog, late = tmp_path / "catalog.csv", tmp_path / "late.wav"
    (music.folder / "2.wav").rename(late)
    music.remove_output()
    for names in ("124", "01243"):  # the output keeps its order, and has what is new at its end
        catalog.write_text("path\n" + "".join(f"music/{name}.wav\n" for name in names), encoding="utf-8")
        music.update(catalog)
    late.rename(music.folder / "2.wav")
    summary = music.update(catalog, update=False, retry_errors=True)
    assert (summary.embedded.tracks, summary.counts.tracks, summary.counts.errors.total()) == (1, 5, 0)
    rows = music.rows()
    assert rows["path"].to_pylist() == [f"music/{i}.wav" for i in range(5)]
    assert rows["embedding"].equals(music.full_run()["embedding"])


def test_parts_of_one_recording_stay_apart_where_the_second_failed(music: Library, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.csv"
    catalog.write_text("path,start,end\nmusic/0.wav,0,4\nmusic/0.wav,100,104\n", encoding="utf-8")
    music.remove_output()
    music.update(catalog)
    before = music.rows()
    assert before["track_start"].to_pylist() == [None, 100]
    assert before["status"].to_pylist() == ["ok", "error"]
    assert counted(music.update(catalog)) == {"kept": 2}
    assert music.rows().equals(before)


def test_the_hash_of_the_audio_does_not_keep_an_error(music: Library) -> None:
    path = music.add("damaged.wav", 5)
    good = path.read_bytes()
    path.write_bytes(good[:40] + (2 * (len(good) - 44)).to_bytes(4, "little") + good[44:])
    music.remove_output()
    music.update(identity="audio")
    assert "truncated" in music.rows()["error_code"].to_pylist()
    path.write_bytes(good)
    assert counted(music.update(identity="audio")) == {"kept": 5, "changed": 1}
    assert set(music.rows()["error_code"].to_pylist()) == {None}


def test_a_file_that_is_not_there_tonight_keeps_its_rows(music: Library, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.csv"
    catalog.write_text("path\n" + "".join(f"music/{i}.wav\n" for i in range(5)), encoding="utf-8")
    music.remove_output()
    music.update(catalog)
    before = music.rows()
    (tmp_path / "music").rename(tmp_path / "elsewhere")
    assert counted(music.update(catalog)) == {"kept": 5, "missing": 5}
    assert music.rows().equals(before)
    (tmp_path / "elsewhere").rename(tmp_path / "music")
    assert counted(music.update(catalog)) == {"kept": 5}


def test_more_than_half_gone_is_refused(music: Library) -> None:
    before = music.rows()
    for i in range(3):
        (music.folder / f"{i}.wav").unlink()
    with pytest.raises(OutputError, match=r"3 of the 5 recordings of the output have gone.*--allow-gone"):
        music.update()
    assert music.rows().equals(before)
    summary = music.update(keep_missing=True)
    assert counted(summary) == {"kept": 5, "gone_kept": 3}
    assert music.rows().equals(before)
    assert counted(music.update(allow_gone=True)) == {"kept": 2, "gone": 3}
    assert music.rows().equals(music.full_run())


def test_other_engines_and_options_are_refused(music: Library) -> None:
    with pytest.raises(OutputError, match=r"has other embeddings: options crops \(was None, now 1\)"):
        music.update(crops=1)


def test_nested_columns_and_nan_are_compared(music: Library, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.parquet"
    columns = {"path": ["music/0.wav", "music/1.wav"], "tags": [["a"], None], "bpm": [float("nan"), None]}
    pq.write_table(pa.table(columns), catalog)
    music.remove_output()
    music.update(catalog)
    before = music.files()
    music.update(catalog)
    assert music.files() == before
    pq.write_table(pa.table({**columns, "tags": [["a"], ["b", "c"]]}), catalog)
    assert counted(music.update(catalog)) == {"kept": 2}
    assert music.rows()["tags"].to_pylist() == [["a"], ["b", "c"]]


@pytest.mark.parametrize("twice", [False, True])
def test_a_recording_that_is_listed_twice_has_rows_twice(music: Library, tmp_path: Path, twice: bool) -> None:
    catalog = tmp_path / "catalog.csv"
    catalog.write_text("path,track_id\nmusic/0.wav,a\nmusic/1.wav,b\nmusic/0.wav,c\n", encoding="utf-8")
    music.remove_output()
    music.update(catalog)
    assert counted(music.update(catalog)) == {"kept": 3}
    if twice:
        catalog.write_text("path,track_id\nmusic/0.wav,a\nmusic/1.wav,b\n" + "music/0.wav,d\n" * 2, encoding="utf-8")
        assert counted(music.update(catalog)) == {"kept": 3, "new": 1}
        assert sorted(music.rows()["track_id"].to_pylist()) == ["a", "b", "d", "d"]
