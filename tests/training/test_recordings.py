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

from singerembed.errors import CatalogError, UsageError
from singerembed.output.schema import METADATA_KEY
from training import train
from training.data import PairDataset
from training.recordings import TRAIN, VALIDATION, build_index, is_index_of, read_index, write_index
from training.validation import CropDataset


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
    assert [each.singer for each in recordings] == ["Ann", "Ann", "(nobody named) c.wav"]
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


def test_validation_on_what_is_trained_on_is_refused(corpus: Path, tmp_path: Path) -> None:
    """Also by way of a link."""
    (tmp_path / "link").symlink_to(corpus)
    for validation in (corpus, tmp_path / "link"):
        with pytest.raises(UsageError, match=rf"data.validation: 12 of its 12 recordings are in {corpus} too"):
            build_index(small_config(corpus, data={"validation": str(validation)}))


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
        assert first == second != last == "(nobody named) d.wav"
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


# --- what a run found out -------------------------------------------------------------------------------------------


def output_of_run(folder: Path, rows: list[tuple[Any, ...]], name: str = "out.parquet") -> Path:
    """An output with the columns that training reads: (track_id, path, start, end, status, artist)."""
    names = ("track_id", "path", "start", "end", "status", "artist")
    table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)})
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: "{}"}), folder / name)
    return folder / name


ROWS = [
    ("a", "a.wav", 0.0, 4.0, "ok", "Ann"),
    ("a", "a.wav", 4.0, 8.0, "ok", "Ann"),
    ("a", "a.wav", 8.0, 12.0, "silent", "Ann"),
    ("a", "a.wav", 12.0, 16.0, "ok", "Ann"),
    ("b", "sub/b.wav", 0.0, 4.0, "ok", None),
    ("c", "c.wav", None, None, "error", "Ann"),
    ("d", "/all/d.wav", 30.0, 34.0, "ok", "Bob"),
]


def test_the_output_of_a_run_says_which_stretches_hold_a_voice(tmp_path: Path) -> None:
    data = {"singer_column": "artist", "validation_fraction": 0}
    found = build_index(small_config(output_of_run(tmp_path, ROWS), data=data))
    assert [(each.singer, each.start, each.seconds, each.recording) for each in found] == [
        ("Ann", 0.0, 8.0, "a"), ("Ann", 12.0, 4.0, "a"), ("(nobody named) b", 0.0, 4.0, "b"), ("Bob", 30.0, 4.0, "d"),
    ]  # fmt: skip
    assert [each.path for each in found[1:]] == [
        str(tmp_path / "a.wav"), str(tmp_path / "sub" / "b.wav"), "/all/d.wav",
    ]  # fmt: skip
    elsewhere = build_index(small_config(tmp_path / "out.parquet", data={**data, "audio_root": "/music"}))
    assert elsewhere[0].path == "/music/a.wav"


@pytest.mark.parametrize(
    ("credits", "singers"),
    [
        ([0, 0, 7, None], ["0", "0", "7", "(nobody named) 7"]),
        ([1.0, float("nan"), float("nan"), None], ["1.0", "(nobody named) b", "(nobody named) c", "(nobody named) 7"]),
        (["", "Ann", "Ann", None], ["(nobody named) a", "Ann", "Ann", "(nobody named) 7"]),
    ],
)
def test_tracks_without_a_credit_are_nobody_elses(tmp_path: Path, credits: list[Any], singers: list[str]) -> None:
    """Singer 0 is one; NaN is none; a track called as an artist is not by that artist. In outputs and catalogues."""
    names = ["a", "b", "c", "7"]
    rows = [(name, f"{name}.wav", 0.0, 4.0, "ok", credit) for name, credit in zip(names, credits, strict=True)]
    config = {"singer_column": "artist", "validation_fraction": 0}
    found = build_index(small_config(output_of_run(tmp_path, rows), data=config))
    assert [each.singer for each in found] == singers
    for name in names:
        write(tmp_path / f"{name}.wav", tone(4))
    table = pa.table({"track_id": names, "path": [f"{name}.wav" for name in names], "artist": credits})
    pq.write_table(table, tmp_path / "catalog.parquet")
    found = build_index(small_config(tmp_path / "catalog.parquet", data=config))
    assert [each.singer for each in found] == singers


def test_without_credits_each_track_is_its_own_singer_and_its_stretches_are_one_group(tmp_path: Path) -> None:
    config = small_config(output_of_run(tmp_path, ROWS), data={"validation_fraction": 0})
    found = build_index(config)
    assert [each.singer for each in found] == ["a", "a", "b", "d"]
    assert PairDataset(found, config).groups == [[0, 1], [2], [3]]
    # Two disjoint crops of the stretch of 8 s, one of the second stretch, and of the others there are no two.
    assert CropDataset(found, config).labels.recordings.tolist() == [0, 0, 0]


def test_an_output_of_nothing_but_errors_and_a_column_that_is_not_there_are_said(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="nothing to train on"):
        build_index(small_config(output_of_run(tmp_path, [ROWS[5]])))
    with pytest.raises(CatalogError, match='no column "who"'):
        build_index(small_config(output_of_run(tmp_path, ROWS), data={"singer_column": "who"}))


def test_a_training_takes_the_output_of_a_run_as_it_is(tmp_path: Path) -> None:
    rows = []
    for name in "abcdef":
        write(tmp_path / f"{name}.wav", tone(6))
        rows += [(name, f"{name}.wav", start, start + 2.0, "ok", name) for start in (0.0, 2.0)]
    source = output_of_run(tmp_path, rows)
    data = {"validation_fraction": 0, "batch_size": 3}
    train.train(small_config(source, data=data, trainer={"log_every_steps": 1}), tmp_path / "run")
    assert (tmp_path / "run" / "last.ckpt").exists()
    assert [each.seconds for each in read_index(tmp_path / "run" / "recordings.parquet")] == [4.0] * 6
