"""Reading catalogues, and cutting them into units."""

from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from singerembed import storage
from singerembed.catalog.layout import TextOptions
from singerembed.catalog.read import Catalog, Columns, Track
from singerembed.errors import CatalogError, UsageError
from singerembed.output.schema import RESERVED_COLUMNS
from singerembed.storage import printable

cells = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\r\n"), max_size=12)
multiline_cells = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\r"), max_size=12)


QUOTED = Columns(text=TextOptions(quoting="csv"))


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def tracks(catalog: Catalog, minutes: float = 60.0) -> list[Track]:
    return [track for unit in catalog.units(minutes) for track in unit.tracks]


def extra(catalog: Catalog) -> list[dict[str, object]]:
    return [row for unit in catalog.units() for row in unit.extra.to_pylist()]


def test_the_columns_that_mean_something(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", "track_id,path,start,end,artist\nx,a.wav,1.5,,Ann\n,b.wav,,30,Bob\n")
    one, two = tracks(Catalog(path))
    assert (one.track_id, one.path, one.start, one.end) == ("x", "a.wav", 1.5, None)
    assert (two.track_id, two.path, two.start, two.end) == ("b.wav", "b.wav", 0.0, 30.0)
    assert extra(Catalog(path)) == [{"artist": "Ann"}, {"artist": "Bob"}]


def test_a_column_without_a_name_is_no_stem(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", ",path\n0,a.wav\n")  # as pandas writes it
    (track,) = tracks(Catalog(path))
    assert (track.source, track.vocals) == (str(tmp_path / "a.wav"), "")
    assert extra(Catalog(path)) == [{"": "0"}]


def test_paths_resolve_against_the_catalogues_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", "path\nsub/a.wav\n/abs/b.wav\ns3://bucket/c.wav\n")
    assert [track.location for track in tracks(Catalog(path))] == [
        str(tmp_path / "sub/a.wav"), "/abs/b.wav", "s3://bucket/c.wav",
    ]  # fmt: skip


def test_bom_crlf_quoted_newlines_and_other_scripts(tmp_path: Path) -> None:
    content = 'path,note\r\n"a,b.wav","two\r\nlines ""quoted"""\r\nПесня.wav,歌\r\n'
    path = write(tmp_path / "c.csv", content.encode("utf-8-sig"))
    catalog = Catalog(path)
    assert [track.path for track in tracks(catalog)] == ["a,b.wav", "Песня.wav"]
    assert [row["note"] for row in extra(catalog)] == ['two\r\nlines "quoted"', "歌"]
    assert catalog.fingerprint().rows == 2


def test_names_that_are_not_utf8_still_name_their_file(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", b"path\ncaf\xe9.wav\n")
    (track,) = tracks(Catalog(path))
    assert os.fsencode(track.location).endswith(b"caf\xe9.wav")
    assert printable(track.path) == "caf\\xe9.wav"


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(cells.filter(bool), multiline_cells, cells), max_size=20),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_csv_and_tsv_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], newline: str
) -> None:
    folder = tmp_path_factory.mktemp("csv")
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        path = folder / f"c{suffix}"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=delimiter, lineterminator=newline)
            writer.writerows([("path", "a", "b"), *rows])
        catalog = Catalog(str(path), QUOTED)
        assert [(t.path, e["a"], e["b"]) for t, e in zip(tracks(catalog), extra(catalog), strict=True)] == rows
        assert all(track.problem is None for track in tracks(catalog))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries({"path": cells.filter(bool)}, optional={"a": cells, "n": st.integers()}), max_size=20
    )
)
def test_json_lines_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]) -> None:
    path = tmp_path_factory.mktemp("json") / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) or json.dumps({"path": "x"}), encoding="utf-8")
    catalog = Catalog(str(path))
    for row, found in zip(rows, extra(catalog), strict=False):
        assert found.get("a") == row.get("a")
        assert found.get("n") == (str(row["n"]) if "n" in row else None)
    assert catalog.fingerprint().rows == max(1, len(rows))


def test_parquet_columns_keep_their_types(tmp_path: Path) -> None:
    table = pa.table({
        "path": ["a.wav", "b.wav"], "start": [0.5, None], "year": pa.array([1999, None], pa.int16()),
        "when": pa.array([1, 2], pa.timestamp("ns")), "tags": [["x"], []],
    })  # fmt: skip
    path = str(tmp_path / "c.parquet")
    pq.write_table(table, path)
    catalog = Catalog(path)
    assert [track.start for track in tracks(catalog)] == [0.5, 0.0]
    (unit,) = catalog.units()
    assert unit.extra.equals(table.select(["year", "when", "tags"]))
    assert catalog.fingerprint().rows == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a.wav,x,", "start 'x' is not a number"),
        ("a.wav,-1,", "start '-1'"),
        ("a.wav,inf,", "start 'inf'"),
        ("a.wav,3,2", "end 2 s is not after start 3 s"),
        ("a.wav,1", "2 fields, but the header names 3"),
        ("a.wav,1,2,3", "4 fields"),
        (",1,2", "empty"),
    ],
)
def test_bad_rows_become_problems_of_their_own(tmp_path: Path, row: str, reason: str) -> None:
    path = write(tmp_path / "c.csv", f"path,start,end\ngood.wav,,\n{row}\nalso.wav,,\n")
    one, bad, three = tracks(Catalog(path))
    assert one.problem is None
    assert three.problem is None
    assert bad.problem is not None
    assert bad.problem.code == "bad_row"
    assert reason in str(bad.problem)
    assert "row 2" in str(bad.problem)


@pytest.mark.parametrize("missing", ["", " ", "nan", "NaN", "null", "NULL", "None", "NA", "N/A", "<NA>", "\\N"])
def test_a_missing_number_is_missing_however_it_is_written(tmp_path: Path, missing: str) -> None:
    (track,) = tracks(Catalog(write(tmp_path / "c.csv", f"path,start,end\na.wav,{missing},{missing}\n")))
    assert (track.problem, track.start, track.end) == (None, 0.0, None)


def test_missing_values_of_json(tmp_path: Path) -> None:
    lines = '{"path": "a.wav", "track_id": NaN, "start": NaN, "end": null}\n{"path": NaN}\n'
    one, two = tracks(Catalog(write(tmp_path / "c.jsonl", lines)))
    assert (one.problem, one.track_id, one.start, one.end) == (None, "a.wav", 0.0, None)
    assert two.problem is not None
    assert "empty" in str(two.problem)


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
        pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.large_string()),
    ],
    ids=str,
)  # fmt: skip
def test_what_any_engine_calls_text_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    path = str(tmp_path / "c.parquet")
    column = pa.array(["\u00dc.wav", "b.wav", None]).cast(kind)
    pq.write_table(pa.table({"track_id": column, "path": column, "title": column}), path)
    catalog = Catalog(path)
    assert catalog.check(catalog.fingerprint()).notes == []
    one, two, three = tracks(catalog)
    assert (one.path, one.track_id, two.path) == ("\u00dc.wav", "\u00dc.wav", "b.wav")
    assert three.problem is not None
    titles = [row["title"] for row in extra(catalog)]
    assert [title.decode() if isinstance(title, bytes) else title for title in titles] == ["\u00dc.wav", "b.wav", None]


def test_views_in_nested_columns_become_plain(tmp_path: Path) -> None:
    path = str(tmp_path / "c.parquet")
    views = pa.array([["x"], None], pa.list_(pa.string_view()))
    people = pa.array([{"name": "Ann"}, None], pa.struct([("name", pa.string_view())]))
    marks = pa.array([[("a", b"1")], None], pa.map_(pa.string_view(), pa.binary_view()))
    pq.write_table(pa.table({"path": ["a.wav", "b.wav"], "tags": views, "people": people, "marks": marks}), path)
    (unit,) = Catalog(path).units()
    assert "view" not in str(unit.extra.schema)
    assert unit.extra["tags"].to_pylist() == [["x"], None]
    assert unit.extra["people"].to_pylist() == [{"name": "Ann"}, None]
    assert unit.extra["marks"].to_pylist() == [[("a", b"1")], None]


def test_a_used_column_of_another_type_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "c.parquet")
    pq.write_table(pa.table({"path": ["a.wav"], "start": pa.array([1], pa.duration("s"))}), path)
    with pytest.raises(CatalogError, match='the column "start" holds duration'):
        Catalog(path)


def test_a_catalogue_on_storage_that_fails_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c.csv", "path\n" + "".join(f"{i}.wav\n" for i in range(3000)))
    catalog = Catalog(path)
    before = catalog.fingerprint()
    pauses: list[float] = []
    real_state, calls = storage.state_of, []

    def state_of(of: str) -> tuple[int | str, ...]:
        calls.append(of)
        if len(calls) in {3, 4}:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real_state(of)

    monkeypatch.setattr("singerembed.storage.state_of", state_of)
    monkeypatch.setattr("singerembed.catalog.read.time.sleep", pauses.append)
    units = list(catalog.units(60, before))
    assert [track.path for unit in units for track in unit.tracks] == [f"{i}.wav" for i in range(3000)]
    assert len(pauses) == 2
    monkeypatch.setattr("singerembed.storage.state_of", lambda _path: (tmp_path / "gone").stat())
    with pytest.raises(CatalogError, match="cannot be read any more"):
        list(catalog.units(60, before))
    assert len(pauses) == 2


def test_bad_json_lines_become_problems(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", '{"path": "a.wav"}\n{oops\n[1]\n\n{"path": "b.wav"}\n')
    found = tracks(Catalog(path))
    assert [track.problem is None for track in found] == [True, False, False, True]


def test_half_characters_and_lists_cost_one_row(tmp_path: Path) -> None:
    lines = [
        r'{"path": "a.wav", "title": "smile \ud83d", "x\udfff": ["\ud83d"], "track_id": 1}',
        r'{"path": "\ud83d.wav"}',
        r'{"path": "b.wav", "track_id": "\ud83d"}',
        r'{"path": "b.wav", "track_id": ["b"]}',
        r'{"path": ["b.wav"], "track_id": ["b"]}',
        r'{"path": "b.wav", "start": 1' + 400 * "0" + "}",
    ]
    catalog = Catalog(write(tmp_path / "c.jsonl", "\n".join(lines)))
    assert catalog.check(catalog.fingerprint()).notes == []
    found = tracks(catalog)
    reasons = ["", "half a character", "half a character", "neither text nor", "neither text nor", "not a number"]
    for track, reason in zip(found, reasons, strict=True):
        assert reason in str(track.problem or "")
        assert (track.problem is None) == (reason == "")
        (track.path + track.track_id + track.location + str(track.problem)).encode()
    assert extra(catalog)[0] == {"title": r"smile \ud83d", r"x\udfff": r'["\ud83d"]'}


def test_different_ids_with_one_hash_are_not_doubled(tmp_path: Path) -> None:
    assert hash(-1) == hash(-2)
    table = pa.table({"track_id": [-1, -2, 3, 3], "path": ["a.wav", "b.wav", "c.wav", "c.wav"]})
    pq.write_table(table, tmp_path / "c.parquet")
    catalog = Catalog(str(tmp_path / "c.parquet"))
    assert catalog.check(catalog.fingerprint()).doubled_ids == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", b"path,caf\xe9\nx,1\n", "not UTF-8 (path, caf.*Name the encoding"),
        ("c.csv", "id,file\nx,y\n", 'has no column "path"; it has: id, file. Name it with --path-column'),
        ("c.csv", "", "is empty"),
        ("c.csv", "path,a,a\nx,1,2\n", "'a' more than once"),
        ("c.csv", "path,status\nx,1\n", "--rename status=catalog_status"),
        ("c.csv", "path,Start\nx,1\n", '"start", and "Start" differs in case only'),
        ("c.csv", "path,Title,title\nx,1,2\n", "--rename title=catalog_title"),
        ("c.xlsx", "PK", "must end in .csv, .tsv, .jsonl or .parquet"),
        ("c.parquet", "not parquet", "cannot read the catalogue"),
    ],
)
def test_catalogues_that_cannot_be_used(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(CatalogError, match=message.replace("(", r"\(")):
        Catalog(write(tmp_path / name, content), reserved=RESERVED_COLUMNS)


def test_a_missing_catalogue_is_said(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="No such file"):
        Catalog(str(tmp_path / "none.csv"))


def test_an_open_quote_is_said_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", 'path\na.wav\n"b.wav\n' + "x\n" * 100_000)
    with pytest.raises(CatalogError, match="quote left open"):
        tracks(Catalog(path))


def test_columns_can_be_named_and_renamed(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", "id,file,status\n7,a.wav,fine\n")
    columns = Columns("file", "id", {"status": "label_status"})
    catalog = Catalog(path, columns, RESERVED_COLUMNS)
    (track,) = tracks(catalog)
    assert (track.track_id, track.path) == ("7", "a.wav")
    assert extra(catalog) == [{"label_status": "fine"}]
    with pytest.raises(CatalogError, match="--id-column"):
        Catalog(path, Columns("file", "nope"))
    with pytest.raises(CatalogError, match="--rename"):
        Catalog(path, Columns("file", "id", {"nope": "x"}))


@settings(max_examples=40, deadline=None)
@given(
    ends=st.lists(st.one_of(st.none(), st.integers(1, 3000)), max_size=3000 // 20),
    minutes=st.floats(0.1, 50),
    repeat=st.integers(1, 20),
)
def test_units_are_a_partition_and_always_the_same(
    tmp_path_factory: pytest.TempPathFactory, ends: list[int | None], minutes: float, repeat: int
) -> None:
    ends = ends * repeat
    path = tmp_path_factory.mktemp("units") / "c.csv"
    path.write_text("path,end,n\n" + "".join(f"{i}.wav,{e or ''},{i}\n" for i, e in enumerate(ends)), encoding="utf-8")
    catalog = Catalog(str(path))
    units = list(catalog.units(minutes))
    assert [unit.index for unit in units] == list(range(len(units)))
    assert [track.path for unit in units for track in unit.tracks] == [f"{i}.wav" for i in range(len(ends))]
    assert [n for unit in units for n in unit.extra["n"].to_pylist()] == [str(i) for i in range(len(ends))]
    assert [[t.row for t in unit.tracks] for unit in units] == [
        [t.row for t in unit.tracks] for unit in catalog.units(minutes)
    ]
    for unit in units[:-1]:
        gathered = sum(track.minutes for track in unit.tracks)
        assert gathered >= minutes or len(unit.tracks) == 1024
        assert gathered - unit.tracks[-1].minutes < minutes


def test_an_empty_catalogue_has_no_units(tmp_path: Path) -> None:
    catalog = Catalog(write(tmp_path / "c.csv", "path,artist\n"))
    assert list(catalog.units()) == []
    assert catalog.extra_schema().names == ["artist"]
    assert catalog.fingerprint().rows == 0


def test_usage_errors_are_not_catalog_errors() -> None:
    assert not issubclass(UsageError, CatalogError)
