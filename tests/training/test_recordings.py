"""What is found to train on: folders, catalogues, the index of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from training_audio import tone, write
from training_config import small_config

from singerembed.errors import CatalogError
from training import train
from training.recordings import TRAIN, VALIDATION, build_index, is_index_of, read_index, write_index


def test_a_folder_of_singers_is_split_by_singer(corpus: Path) -> None:
    recordings = build_index(small_config(corpus))
    singers = {split: {each.singer for each in recordings if each.split == split} for split in (TRAIN, VALIDATION)}
    assert len(recordings) == 12
    assert not singers[TRAIN] & singers[VALIDATION]
    assert (len(singers[TRAIN]), len(singers[VALIDATION])) == (4, 2)
    assert all(each.seconds == pytest.approx(5.0) for each in recordings)


def test_unlabelled_files_are_singers_of_their_own(tmp_path: Path) -> None:
    for name in ("a.wav", "b.flac", "c.ogg"):
        write(tmp_path / name, tone(1))
    write(tmp_path / "voice" / "deep" / "d.wav", tone(1))
    (tmp_path / "notes.txt").write_text("no audio")
    config = small_config(tmp_path, data={"validation_fraction": 0})
    assert [each.singer for each in build_index(config)] == ["a.wav", "b.flac", "c.ogg", "voice"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_catalogue_with_a_singer_column(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.wav", tone(4))
    catalogue = tmp_path / f"catalog.{suffix}"
    rows = {
        "csv": ["file,who,start,end", "a.wav,Ann,1,3.5", "b.wav,Ann,,", "c.wav,,,"],
        "jsonl": [
            '{"file": "a.wav", "who": "Ann", "start": 1, "end": 3.5}',
            '{"file": "b.wav", "who": "Ann"}',
            '{"file": "c.wav"}',
        ],
    }
    catalogue.write_text("\n".join(rows[suffix]))
    columns = {"path_column": "file", "singer_column": "who", "validation_fraction": 0}
    recordings = build_index(small_config(catalogue, data=columns))
    assert [each.singer for each in recordings] == ["Ann", "Ann", "c.wav"]
    assert (recordings[0].start, recordings[0].seconds) == (1.0, 2.5)
    assert recordings[1].seconds == pytest.approx(4.0)


def test_short_and_broken_recordings_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "s" / "good.wav", tone(0.5))
    write(tmp_path / "s" / "short.wav", tone(0.499))
    (tmp_path / "s" / "broken.wav").write_bytes(b"not audio")
    recordings = build_index(small_config(tmp_path, data={"validation_fraction": 0}))
    assert [Path(each.path).name for each in recordings] == ["good.wav"]
    assert "1 recordings that cannot be opened, 1 shorter than 0.5 s; 1 of 3" in capsys.readouterr().out


def test_links_to_singers_are_followed_and_those_in_circles_are_not(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    write(home / "c" / "0.wav", tone(1))
    for name in ("Ann/deep/1.wav", "Bob/2.wav"):
        write(elsewhere / name, tone(1))
    for link, target in {"home/a": "Ann", "home/b": "Bob", "elsewhere/Ann/b": "Bob", "elsewhere/Bob/a": "Ann"}.items():
        (tmp_path / link).symlink_to(elsewhere / target)
    (home / "c" / "self").symlink_to(home)
    found = build_index(small_config(home, data={"validation_fraction": 0}))
    expected = {"a/b/2.wav": "a", "a/deep/1.wav": "a", "b/2.wav": "b", "b/a/deep/1.wav": "b", "c/0.wav": "c"}
    assert {str(Path(each.path).relative_to(home)): each.singer for each in found} == expected
    assert [each.path for each in found] == sorted(each.path for each in found)


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="no recordings"):
        build_index(small_config(tmp_path))
    write(tmp_path / "s" / "short.wav", tone(0.1))
    with pytest.raises(CatalogError, match=r"no recording of 0\.5 s or more"):
        build_index(small_config(tmp_path))
    for name in ("missing", "missing.csv"):
        with pytest.raises(CatalogError, match=rf"{name}: there is no such folder or catalogue"):
            build_index(small_config(tmp_path / name))


def test_validation_may_be_other_data(corpus: Path, tmp_path: Path) -> None:
    write(tmp_path / "x" / "0.wav", tone(4))
    recordings = build_index(small_config(corpus, data={"validation": str(tmp_path)}))
    assert [each.singer for each in recordings if each.split == VALIDATION] == ["x"]
    assert len(recordings) == 13


def test_the_index_is_read_back_as_it_was_written(corpus: Path, tmp_path: Path) -> None:
    recordings = build_index(small_config(corpus))
    path, config = tmp_path / "index.parquet", small_config(corpus)
    assert not is_index_of(path, config)
    write_index(path, recordings, config)
    assert read_index(path) == recordings
    assert is_index_of(path, small_config(corpus, data={"workers": 3, "batch_size": 2}))
    for other in ({"source": "elsewhere"}, {"validation_fraction": 0.1}, {"crop_seconds": 1.0}):
        assert not is_index_of(path, small_config(corpus, data=other))


def test_an_index_that_got_to_no_checkpoint_gives_way_to_other_data(corpus: Path, tmp_path: Path) -> None:
    write(tmp_path / "other" / "x" / "0.wav", tone(1))
    whole, other = (small_config(each, data={"validation_fraction": 0}) for each in (corpus, tmp_path / "other"))
    index = tmp_path / "recordings.parquet"
    assert len(train._recordings(whole, index, going_on=False)) == 12
    assert [each.singer for each in train._recordings(other, index, going_on=False)] == ["x"]
    write(tmp_path / "other" / "y" / "0.wav", tone(1))
    assert [each.singer for each in train._recordings(other, index, going_on=True)] == ["x"]


def test_catalogue_rows_that_are_wrong_are_left_out_and_singers_may_be_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcd":
        write(tmp_path / f"{name}.wav", tone(1))
    rows: list[dict[str, Any]] = [
        {"path": "a.wav", "singer": 0, "start": None, "end": None},
        {"path": "b.wav", "singer": 0, "start": None, "end": None},
        {"path": "c.wav", "singer": 1, "start": 0.9, "end": 0.2},
        {"path": "d.wav", "singer": None, "start": None, "end": None},
    ]
    for name, kind in (("integers", pa.int64()), ("floats", pa.float64())):
        table = pa.Table.from_pylist(rows)
        singers = [math.nan if row["singer"] is None and kind == pa.float64() else row["singer"] for row in rows]
        table = table.set_column(table.schema.get_field_index("singer"), "singer", pa.array(singers, kind))
        pq.write_table(table, tmp_path / f"{name}.parquet")
        config = small_config(tmp_path / f"{name}.parquet", data={"validation_fraction": 0})
        first, second, last = (each.singer for each in build_index(config))
        assert first == second != last == "d.wav"
        assert "1 invalid rows" in (written := capsys.readouterr().out)
        assert "end 0.2 s is not after start 0.9 s" in written


def test_a_singer_column_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("path,artist\na.wav,Ann\n")
    with pytest.raises(CatalogError, match='no column "artst"; its other columns: artist'):
        build_index(small_config(tmp_path / "c.csv", data={"singer_column": "artst"}))


def test_a_validation_that_takes_every_singer_is_an_error(tmp_path: Path) -> None:
    for singer in "ab":
        write(tmp_path / singer / "0.wav", tone(1))
    with pytest.raises(CatalogError, match=r"all of its 2 singers.*data\.validation_fraction=0"):
        build_index(small_config(tmp_path))
