"""The run: rows that say what happened, order, resume, refusals, stopping."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import Golden, embed_lines
from numpy.typing import NDArray

from singerembed.catalog.read import Columns
from singerembed.engine.build import compare
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import RunSummary, run
from singerembed.output.schema import METADATA_KEY

Voice = Callable[..., NDArray[np.float32]]
RATE = 44_100


def rows_of(output: Path, track: str) -> list[dict[str, Any]]:
    table = pq.read_table(output)
    return [row for row in table.to_pylist() if row["track_id"] == track]


# --- rows -----------------------------------------------------------------------------------------------------------


def test_golden_crops_come_out_as_the_official_embeddings(finished: tuple[Path, RunSummary], golden: Golden) -> None:
    for name, expected in zip(golden.names, golden.embedding, strict=True):
        (row,) = rows_of(finished[0], f"{name}.wav")
        reached = compare(np.array([row["embedding"]], np.float32), expected[np.newaxis])
        assert reached.cosine >= 0.999999
        assert reached.difference <= 1e-3
        assert (row["crop"], row["start"], row["end"], row["status"]) == (0, 0.0, 4.0, "ok")


@pytest.mark.parametrize(
    ("track", "statuses", "code", "text"),
    [
        ("zero.wav", ["silent", "silent"], None, None),
        ("short.wav", ["ok"], None, None),
        ("8bit.wav", ["ok", "ok"], None, None),
        ("24bit.wav", ["ok", "ok"], None, None),
        ("float.wav", ["ok", "ok"], None, None),
        ("six.wav", ["ok", "ok"], None, None),
        ("8k.wav", ["ok", "ok"], None, None),
        ("192k.flac", ["ok"], None, None),
        ("nan.wav", ["ok", "error"], "invalid_samples", "NaN"),
        ("half.wav", ["ok", "error"], "truncated", "cut"),
        ("empty.wav", ["error"], "no_audio", "empty"),
        ("text.wav", ["error"], "decode_failed", "cannot decode"),
        ("folder.wav", ["error"], "unreadable", "folder"),
        ("missing", ["error"], "not_found", "file not found"),
        ("part", ["ok"], None, None),
        ("late", ["error"], "no_audio", "after its start"),
        ("bad", ["error"], "bad_row", "start 'x' is not a number"),
    ],
)
def test_each_track_says_what_happened(
    finished: tuple[Path, RunSummary], track: str, statuses: list[str], code: str | None, text: str | None
) -> None:
    rows = rows_of(finished[0], track)
    assert [row["status"] for row in rows] == statuses
    assert rows[-1]["error_code"] == code
    assert (rows[-1]["error"] is None) == (text is None)
    assert text is None or text in rows[-1]["error"]
    for row in rows:
        assert (row["embedding"] is not None) == (row["status"] == "ok")
        assert row["kind"] == "made"


def test_times_and_levels(finished: tuple[Path, RunSummary]) -> None:
    (short,) = rows_of(finished[0], "short.wav")
    assert (short["start"], short["end"]) == (0.0, 0.01)
    (part,) = rows_of(finished[0], "part")
    assert (part["crop"], part["start"], part["end"]) == (0, 1.0, 5.0)
    zero = rows_of(finished[0], "zero.wav")[0]
    assert zero["peak_dbfs"] == zero["rms_dbfs"] == -np.inf
    loud = rows_of(finished[0], "float.wav")[0]
    assert loud["rms_dbfs"] == pytest.approx(-20, abs=0.1)
    (missing,) = rows_of(finished[0], "missing")
    assert missing["peak_dbfs"] is None
    assert missing["crop"] is None


def test_the_summary_adds_up(finished: tuple[Path, RunSummary], library: Path) -> None:
    output, summary = finished
    table = pq.read_table(output).to_pylist()
    n_tracks = len((library / "catalog.csv").read_text(encoding="utf-8").splitlines()) - 1
    assert summary.counts.tracks == n_tracks == len({row["track_id"] for row in table})
    assert summary.counts.crops == sum(row["crop"] is not None for row in table)
    assert summary.counts.silent == sum(row["status"] == "silent" for row in table)
    assert summary.counts.errors.total() == sum(row["status"] == "error" for row in table)
    assert summary.counts.errors["not_found"] == 1


def test_rows_are_in_the_catalogues_order(finished: tuple[Path, RunSummary], library: Path) -> None:
    lines = (library / "catalog.csv").read_text(encoding="utf-8").splitlines()[1:]
    found = [track for track, _ in itertools.groupby(pq.read_table(finished[0])["track_id"].to_pylist())]
    assert found == [line.split(",")[0] for line in lines]


def test_provenance_is_in_the_metadata(finished: tuple[Path, RunSummary]) -> None:
    metadata = json.loads(pq.read_metadata(finished[0]).metadata[METADATA_KEY])
    assert metadata["spec"]["method"] == "byol"
    assert len(metadata["engine"]["sha256"]) == len(metadata["catalog"]["sha256"]) == 64
    assert metadata["options"]["silence_dbfs"] == -60.0
    assert metadata["verification"]["crops"] == 16
    assert metadata["version"]


def test_readers_of_others_need_no_conversion(finished: tuple[Path, RunSummary]) -> None:
    path = str(finished[0])
    schema = pq.read_schema(path)
    assert schema.field("embedding").type == pa.list_(pa.field("element", pa.float32()), 1000)
    connection = duckdb.connect()
    connection.execute(f"create view rows as select * from '{path}'")
    n, dim = connection.execute("select count(*), max(len(embedding)) from rows where status = 'ok'").fetchall()[0]
    assert dim == 1000
    near = connection.execute(
        "select array_cosine_similarity(a.embedding::float[1000], b.embedding::float[1000]) from rows a, rows b "
        "where a.track_id = 'float.wav' and b.track_id = '24bit.wav' and a.crop = 0 and b.crop = 0"
    ).fetchall()[0][0]
    assert near > 0.999
    frame = pl.read_parquet(path)
    assert frame["embedding"].null_count() == len(frame) - n
    pandas = pd.read_parquet(path)
    assert np.stack(list(pandas[pandas["status"] == "ok"]["embedding"])).shape == (n, 1000)


def test_threads_and_units_do_not_change_a_bit(
    finished: tuple[Path, RunSummary], library: Path, reference_engine: str, tmp_path: Path
) -> None:
    expected = pq.read_table(finished[0])
    for workers, minutes in ((1, 1000.0), (3, 5.0), (7, 0.1)):
        output = tmp_path / f"{workers}.parquet"
        options = RunOptions(workers=workers, unit_minutes=minutes)
        run(str(library / "catalog.csv"), str(output), engine=reference_engine, options=options)
        assert pq.read_table(output).equals(expected)


# --- options --------------------------------------------------------------------------------------------------------


def test_spaced_crops_equal_those_of_a_full_read(
    library: Path, reference_engine: str, tmp_path: Path, voice: Voice
) -> None:
    soundfile.write(tmp_path / "long.flac", voice(43, 48_000), 48_000)
    lines = [f"x,{tmp_path}/long.flac,,"]
    everything = embed_lines(library, reference_engine, tmp_path / "all.parquet", lines)
    three = embed_lines(library, reference_engine, tmp_path / "three.parquet", lines, crops=3)
    assert everything["crop"].to_pylist() == list(range(10))
    assert three["crop"].to_pylist() == [1, 5, 8]
    a = np.array(everything["embedding"].to_pylist(), np.float32)[[1, 5, 8]]
    b = np.array(three["embedding"].to_pylist(), np.float32)
    assert compare(b, a).cosine > 0.99999
    assert three["start"].to_pylist() == [4.0, 20.0, 32.0]


def test_hop_pool_dtype_and_silence(library: Path, reference_engine: str, tmp_path: Path) -> None:
    lines = ["x,@float.wav,,", "z,@zero.wav,,"]
    hop = embed_lines(library, reference_engine, tmp_path / "hop.parquet", lines, hop_seconds=1.5)
    assert hop["start"].to_pylist() == [0, 1.5, 3.0, 4.5] * 2
    plain = embed_lines(library, reference_engine, tmp_path / "plain.parquet", lines)
    pooled = embed_lines(library, reference_engine, tmp_path / "pool.parquet", lines, pool="mean")
    assert pooled["status"].to_pylist() == ["ok", "silent"]
    assert pooled["end"].to_pylist() == [8.0, 8.0]
    mean = np.mean(plain["embedding"].to_pylist()[:2], axis=0)
    assert np.allclose(pooled["embedding"][0].as_py(), mean, atol=1e-4)
    half = embed_lines(library, reference_engine, tmp_path / "half.parquet", lines, embedding_dtype="float16")
    assert half.schema.field("embedding").type.value_type == pa.float16()
    assert np.allclose(half["embedding"][0].as_py(), plain["embedding"][0].as_py(), rtol=1e-3, atol=1e-3)
    quiet = embed_lines(library, reference_engine, tmp_path / "quiet.parquet", lines, silence_dbfs=0.0)
    assert set(quiet["status"].to_pylist()) == {"silent"}


def test_catalogue_columns_pass_through(library: Path, reference_engine: str, tmp_path: Path) -> None:
    catalog = tmp_path / "c.parquet"
    table = pa.table({
        "id": [7, 8], "file": [f"{library}/float.wav", f"{library}/none.wav"], "status": ["released", None],
        "year": pa.array([1999, None], pa.int16()), "tags": [["a", "b"], None],
    })  # fmt: skip
    pq.write_table(table, catalog)
    columns = Columns("file", "id", {"status": "label_status"})
    run(str(catalog), str(tmp_path / "o.parquet"), engine=reference_engine, options=RunOptions(columns=columns))
    found = pq.read_table(tmp_path / "o.parquet")
    assert found["track_id"].to_pylist() == ["7", "7", "8"]
    assert found["label_status"].to_pylist() == ["released", "released", None]
    assert found["status"].to_pylist() == ["ok", "ok", "error"]
    assert found.schema.field("year").type == pa.int16()
    assert found["tags"].to_pylist() == [["a", "b"], ["a", "b"], None]


def test_an_empty_catalogue_gives_an_empty_output(reference_engine: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("path,artist\n", encoding="utf-8")
    summary = run(str(tmp_path / "c.csv"), str(tmp_path / "o.parquet"), engine=reference_engine)
    assert summary.counts.tracks == 0
    assert pq.read_table(tmp_path / "o.parquet").num_rows == 0
    assert "artist" in pq.read_schema(tmp_path / "o.parquet").names
