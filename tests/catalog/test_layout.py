"""Catalogues as spreadsheets and databases write them: compression, encoding, delimiter, quoting, and what is odd."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from singerembed import storage
from singerembed.catalog.layout import TextOptions
from singerembed.catalog.read import Catalog, Columns
from singerembed.errors import CatalogError, UsageError
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import run

DATA = Path(__file__).parent / "data"


def rows(path: Path | str, **text: str) -> list[dict[str, object]]:
    catalog = Catalog(str(path), Columns(text=TextOptions(**text)))
    catalog.check(catalog.fingerprint())
    return [
        {"path": track.path, **row}
        for unit in catalog.units()
        for track, row in zip(unit.tracks, unit.extra.to_pylist(), strict=True)
    ]


def doubled_ids(path: Path) -> str:
    catalog = Catalog(str(path))
    return catalog.check(catalog.fingerprint()).doubled_ids


def remarks(path: Path | str) -> list[str]:
    return Catalog(str(path)).remarks


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("semicolons.csv", {"artist": "A; B", "year": "1999"}, ["separated by semicolons"]),
        ("tabs.csv", {"artist": "A, B"}, ["separated by tabs"]),
        ("utf16.csv", {"artist": "\u00dcn\u00ef"}, ["utf-16"]),
        ("gzipped.csv.gz", {"artist": "A"}, ["gzip-compressed"]),
    ],
)
def test_reported_files(name: str, row: dict[str, str], said: list[str]) -> None:
    assert rows(DATA / name) == [{"path": "vbr_without_xing.mp3", **row}]
    assert remarks(DATA / name) == said


def test_a_compressed_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes((DATA / "gzipped.csv.gz").read_bytes())
    assert rows(tmp_path / "c.csv") == rows(DATA / "gzipped.csv.gz")
    assert remarks(tmp_path / "c.csv") == ["gzip-compressed"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_zstandard_and_many_gzip_members(tmp_path: Path, suffix: str) -> None:
    lines = [b'{"path": "%d.wav"}' % i if suffix == "jsonl" else b"%d.wav" % i for i in range(5000)]
    content = b"\n".join(lines if suffix == "jsonl" else [b"path", *lines]) + b"\n"
    (tmp_path / f"c.{suffix}.zst").write_bytes(pa.Codec("zstd").compress(content, asbytes=True))
    half = len(content) // 2
    (tmp_path / f"c.{suffix}.gz").write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    for compressed in ("zst", "gz"):
        path = tmp_path / f"c.{suffix}.{compressed}"
        paths = [track.path for unit in Catalog(str(path)).units() for track in unit.tracks]
        assert paths == [f"{i}.wav" for i in range(5000)]
        assert Catalog(str(path)).fingerprint().rows == 5000


def test_a_compressed_file_that_is_cut_is_said(tmp_path: Path) -> None:
    content = gzip.compress(b"path\n" + b"\n".join(os.urandom(8).hex().encode() for _ in range(20_000)))
    (tmp_path / "c.csv.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(CatalogError, match="cannot read the catalogue"):
        rows(tmp_path / "c.csv.gz")


def test_text_in_another_encoding_is_named_with_its_row_and_the_option(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r'row 1: "artist" is not UTF-8.*--encoding cp1252'):
        rows(DATA / "windows1252.csv")
    assert rows(DATA / "windows1252.csv", encoding="cp1252")[0]["artist"] == "Bj\u00f8rk"
    (tmp_path / "c.csv").write_bytes("path,a\nx.wav,\u00e9\n".encode("utf-16-le"))  # no byte-order mark
    assert rows(tmp_path / "c.csv", encoding="utf-16-le") == [{"path": "x.wav", "a": "\u00e9"}]


def test_the_delimiter_can_be_forced(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("path;a,b\nx.wav;1,2\n", encoding="utf-8")
    assert rows(path) == [{"path": "x.wav", "a,b": "1,2"}]
    with pytest.raises(CatalogError, match="path;a, b"):
        rows(path, delimiter=",")
    with pytest.raises(UsageError, match="--delimiter"):
        TextOptions(delimiter="ab")


def test_quotes_of_a_database_export_are_text(tmp_path: Path) -> None:
    content = 'path\ttitle\nx.wav\t"Heroes" (2017 Remaster)\ny.wav\t"open\n'
    (tmp_path / "c.tsv").write_text(content, encoding="utf-8")
    (tmp_path / "c.csv").write_text(content, encoding="utf-8")
    assert [row["title"] for row in rows(tmp_path / "c.tsv")] == ['"Heroes" (2017 Remaster)', '"open']
    assert rows(tmp_path / "c.csv", quoting="none") == rows(tmp_path / "c.tsv")


def test_a_quote_out_of_place_costs_its_row(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text('path,title\na.wav,x\nb.wav,"Heroes" (2017)\nc.wav,y\n', encoding="utf-8")
    catalog = Catalog(str(tmp_path / "c.csv"))
    catalog.check(catalog.fingerprint())
    found = [track for unit in catalog.units() for track in unit.tracks]
    assert [track.problem is None for track in found] == [True, False, True]
    assert "--quoting none" in str(found[1].problem)


def test_a_string_view_is_a_string(tmp_path: Path) -> None:
    table = pa.table({"path": pa.array(["a.wav"], pa.string_view()), "artist": pa.array(["Ann"], pa.string_view())})
    pq.write_table(table, tmp_path / "c.parquet")
    assert rows(tmp_path / "c.parquet") == [{"path": "a.wav", "artist": "Ann"}]


def test_a_path_that_is_not_utf8_is_embedded_and_its_stored_form_names_the_file(tmp_path: Path) -> None:
    name = b"lat\xe9.wav"
    audio = tmp_path / os.fsdecode(name)
    with audio.open("wb") as file:
        soundfile.write(file, 0.1 * np.random.default_rng(0).standard_normal(44_100), 44_100, format="WAV")
    (tmp_path / "c.csv").write_bytes(b"path\n" + name + b"\n")
    said: list[str] = []
    run(str(tmp_path / "c.csv"), str(tmp_path / "o.parquet"), say=lambda _what, text: said.append(text))
    (row,) = pq.read_table(tmp_path / "o.parquet").drop_columns("embedding").to_pylist()
    assert row["status"] == "ok"
    assert row["path"] == row["track_id"] == "file:lat%E9.wav"
    assert storage.resolve(str(tmp_path / "c.csv"), row["path"]) == str(audio)
    assert "1 paths are not UTF-8" in said[0]


@pytest.mark.parametrize(
    ("path", "location"),
    [("file:///a%20b/c.wav", "/a b/c.wav"), ("file://localhost/x.wav", "/x.wav"), ("file:x%25.wav", "/base/x%.wav"),
     ("a%20b.wav", "/base/a%20b.wav")],
)  # fmt: skip
def test_file_uris(path: str, location: str) -> None:
    assert storage.resolve("/base/c.csv", path) == location


def test_two_recordings_with_one_id_are_said_and_refused_where_it_matters(tmp_path: Path) -> None:
    lines = ["track_id,path", "1,a.wav", "2,b.wav", "1,c.wav", "2,b.wav", "2,d.wav"]
    (tmp_path / "c.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert doubled_ids(tmp_path / "c.csv") == "rows 1 and 3 are different recordings with one track id, '1'"
    with pytest.raises(UsageError, match="rows 1 and 3"):
        run(str(tmp_path / "c.csv"), str(tmp_path / "o.parquet"), options=RunOptions(pool="mean"))
    (tmp_path / "c.csv").write_text("track_id,path,start\n1,a.wav,0\n1,a.wav,4\n,x.wav,\n,y.wav,\n", encoding="utf-8")
    assert doubled_ids(tmp_path / "c.csv") == ""


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_doubled_ids_in_other_formats(tmp_path: Path, suffix: str) -> None:
    rows = [{"track_id": i % 3, "path": f"{i}.wav"} for i in range(4)]
    path = tmp_path / f"c.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert doubled_ids(path).startswith("rows 1 and 4 are different recordings with one track id")
