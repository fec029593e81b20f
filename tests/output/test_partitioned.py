"""Outputs that are folders of part files: read as one table, resumed, retried, refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from singerembed.cli.main import cli
from singerembed.errors import InterruptedRun, OutputError, UsageError
from singerembed.evaluation.data import read_labelled
from singerembed.jobs.describe import describe
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import RunSummary, run
from singerembed.output.finished import UnitIndex, is_partitioned
from singerembed.output.schema import Counts

OPTIONS = RunOptions(unit_minutes=8.0, partitioned=True)


@pytest.fixture(scope="module")
def parted(library: Path, reference_engine: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunSummary]:
    output = tmp_path_factory.mktemp("parted") / "out"
    return output, run(str(library / "catalog.csv"), f"{output}/", engine=reference_engine, options=OPTIONS)


def test_every_reader_finds_the_rows_of_the_one_file(
    parted: tuple[Path, RunSummary], finished: tuple[Path, RunSummary]
) -> None:
    output, summary = parted
    whole = pq.read_table(finished[0])
    assert summary.counts == finished[1].counts
    folder = ds.dataset(output)
    assert folder.schema.equals(whole.schema)
    assert folder.to_table().equals(whole)
    assert pl.scan_parquet(f"{output}/*.parquet").collect().equals(pl.read_parquet(finished[0]))
    query = "select track_id, crop, status, error_code, embedding from read_parquet('{}')"
    connection = duckdb.connect()
    of_folder, of_file = (
        connection.execute(query.format(name)).fetchall() for name in (f"{output}/*.parquet", finished[0])
    )
    assert of_folder == of_file


def test_all_files_have_one_schema_and_nothing_else_lies_there(parted: tuple[Path, RunSummary]) -> None:
    output, summary = parted
    names = sorted(path.name for path in output.iterdir())
    parts = [name for name in names if name.startswith("unit-")]
    assert names == ["_common_metadata", "_index", *parts]
    assert {str(pq.read_schema(output / name).remove_metadata()) for name in [*parts, "_common_metadata"]} == {
        str(pq.read_schema(output / "_common_metadata").remove_metadata())
    }
    assert not Path(f"{output}.parts").exists()
    index = pq.ParquetFile(output / "_index").read().to_pylist()
    assert [row["file"] for row in index] == parts
    assert [row["rows"] for row in index] == [pq.read_metadata(output / name).num_rows for name in parts]
    assert sum(row["crops"] for row in index) == summary.counts.crops
    errors = [code for row in index for code in json.loads(row["errors"] or "{}")]
    assert set(errors) == set(summary.counts.errors)


def test_a_finished_folder_is_not_done_again(
    parted: tuple[Path, RunSummary], library: Path, reference_engine: str
) -> None:
    output, summary = parted
    again = run(str(library / "catalog.csv"), str(output), engine=reference_engine, options=OPTIONS)
    assert again.already_done
    assert again.counts == summary.counts
    with pytest.raises(OutputError, match="comes from another run: options crops"):
        run(
            str(library / "catalog.csv"), str(output), engine=reference_engine,
            options=RunOptions(unit_minutes=8.0, partitioned=True, crops=1),
        )  # fmt: skip


def test_a_stopped_run_goes_on_and_is_no_output_before(
    parted: tuple[Path, RunSummary], library: Path, reference_engine: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    catalog = str(library / "catalog.csv")
    with pytest.raises(InterruptedRun):
        run(
            catalog, str(output), engine=reference_engine, options=OPTIONS,
            stop=lambda: signal.SIGINT if len(list(output.glob("unit-*"))) > 3 else 0,
        )  # fmt: skip
    assert not is_partitioned(str(output))
    (output / ".unit-000099.parquet.1-ab.tmp").touch()  # of a process that was killed
    assert describe(f"{output}.parts")["units_done"] == len(list(output.glob("unit-*")))
    summary = run(catalog, str(output), engine=reference_engine, options=OPTIONS)
    assert summary.units_before > 3
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in parted[0].iterdir())
    assert ds.dataset(output).to_table().equals(ds.dataset(parted[0]).to_table())


def test_retry_errors_replaces_units_in_place(library: Path, reference_engine: str, tmp_path: Path) -> None:
    late, catalog, output = tmp_path / "late.wav", tmp_path / "c.csv", tmp_path / "out"
    names = [f"{library}/{name}" for name in ("float.wav", "8bit.wav", "zero.wav", "text.wav", "24bit.wav")]
    catalog.write_text("path\n" + "\n".join([*names, "late.wav", names[0]]) + "\n", encoding="utf-8")
    before = run(str(catalog), str(output), engine=reference_engine, options=OPTIONS)
    assert before.counts.errors == {"decode_failed": 1, "not_found": 1}
    times = {path.name: path.stat().st_mtime_ns for path in output.glob("unit-*")}
    shutil.copy(names[0], late)
    retry = RunOptions(unit_minutes=8.0, partitioned=True, retry_errors=True)
    after = run(str(catalog), str(output), engine=reference_engine, options=retry)
    assert after.counts.errors == {"decode_failed": 1}
    assert after.counts.tracks == 7
    changed = {path.name for path in output.glob("unit-*") if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {"unit-000001.parquet", "unit-000002.parquet"}
    whole = tmp_path / "whole.parquet"
    run(str(catalog), str(whole), engine=reference_engine, options=RunOptions(unit_minutes=8.0))
    assert ds.dataset(output).to_table().equals(pq.read_table(whole))
    assert run(str(catalog), str(output), engine=reference_engine, options=OPTIONS).counts == after.counts
    assert not Path(f"{output}.parts").exists()


def test_a_retry_killed_while_it_puts_units_in_place(
    library: Path, reference_engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is the old one then, and some units are new; the next retry ends with an index that fits."""
    late, catalog, output = tmp_path / "late.wav", tmp_path / "c.csv", tmp_path / "out"
    catalog.write_text(f"path\nlate.wav\n{library}/8bit.wav\n{library}/zero.wav\n", encoding="utf-8")
    run(str(catalog), str(output), engine=reference_engine, options=OPTIONS)
    shutil.copy(library / "float.wav", late)
    retry = RunOptions(unit_minutes=8.0, partitioned=True, retry_errors=True)

    class Killed(BaseException): ...

    def die(*_arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("singerembed.output.finished.write_index", die)
        run(str(catalog), str(output), engine=reference_engine, options=retry)
    assert ds.dataset(output).to_table()["status"].to_pylist().count("error") == 0
    after = run(str(catalog), str(output), engine=reference_engine, options=retry)
    assert after.counts.errors == {}
    assert after.counts == run(str(catalog), str(output), engine=reference_engine, options=OPTIONS).counts


def test_restart_removes_its_own_files_only(library: Path, reference_engine: str, tmp_path: Path) -> None:
    catalog, output = str(library / "catalog.csv"), tmp_path / "out"
    run(catalog, str(output), engine=reference_engine, options=OPTIONS)
    (output / "README").write_text("mine", encoding="utf-8")
    restart = RunOptions(unit_minutes=400.0, partitioned=True, restart=True, crops=1)
    with pytest.raises(OutputError, match="holds files of others"):
        run(catalog, str(output), engine=reference_engine, options=restart)
    assert [path.name for path in output.iterdir()] == ["README"]
    (output / "README").unlink()
    run(catalog, str(output), engine=reference_engine, options=restart)
    assert [path.name for path in sorted(output.glob("unit*"))] == ["unit-000000.parquet"]


def test_folders_and_files_are_not_mistaken_for_each_other(
    parted: tuple[Path, RunSummary], library: Path, reference_engine: str, tmp_path: Path
) -> None:
    catalog = str(library / "catalog.csv")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "unit-000000.parquet").write_text("not ours", encoding="utf-8")
    with pytest.raises(OutputError, match="holds files of others"):
        run(catalog, str(foreign), engine=reference_engine, options=OPTIONS)
    assert (foreign / "unit-000000.parquet").read_text(encoding="utf-8") == "not ours"
    with pytest.raises(UsageError, match="say --partitioned too"):
        run(catalog, str(parted[0]), engine=reference_engine, options=RunOptions(unit_minutes=8.0))
    with pytest.raises(UsageError, match="writes a folder"):
        run(catalog, str(library / "catalog.csv"), engine=reference_engine, options=OPTIONS)


def test_a_catalogue_without_rows(reference_engine: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("path,artist\n", encoding="utf-8")
    output = tmp_path / "out"
    for _ in range(2):
        summary = run(str(tmp_path / "c.csv"), str(output), engine=reference_engine, options=OPTIONS)
        assert summary.counts.tracks == 0
    assert "artist" in ds.dataset(output).schema.names
    assert duckdb.connect().execute(f"select count(*) from read_parquet('{output}/*.parquet')").fetchall() == [(0,)]
    assert pl.scan_parquet(f"{output}/*.parquet").collect().height == 0


def test_inspect_and_evaluation_read_a_folder(
    parted: tuple[Path, RunSummary], finished: tuple[Path, RunSummary]
) -> None:
    facts: Any = describe(str(parted[0]))
    assert facts["kind"] == "partitioned output"
    assert facts["counts"] == describe(str(finished[0]))["counts"]
    one, many = read_labelled(str(finished[0]), "kind"), read_labelled(str(parted[0]), "kind")
    assert [r.name for r in many.recordings] == [r.name for r in one.recordings]
    assert one.stored is not None
    assert many.stored is not None
    assert (many.stored.embedding == one.stored.embedding).all()


def test_the_command(library: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (tmp_path / "c.csv").write_text(f"path\n{library}/float.wav\n{library}/text.wav\n", encoding="utf-8")
    result = CliRunner().invoke(cli, ["run", str(tmp_path / "c.csv"), f"{output}/", "--partitioned"])
    assert result.exit_code == 3
    assert f"from '{output}/*.parquet' where status = 'error'" in result.stderr
    again = CliRunner().invoke(cli, ["run", str(tmp_path / "c.csv"), str(output), "--partitioned", "--restart"])
    assert f"1 finished units in {output} are thrown away\n" in again.stderr


def test_the_index_of_units_survives_its_encoding() -> None:
    index = UnitIndex()
    counts = Counts(tracks=2, crops=5, silent=1, error_tracks=1, audio_seconds=20.5)
    counts.errors["not_found"] = 1
    for unit in range(20_000):
        index.add(unit, counts if unit % 7 == 0 else Counts(tracks=1))
    decoded = UnitIndex.decode(index.encode())
    assert decoded.table.equals(index.table)
    assert decoded.table["rows"].to_pylist() == list(range(20_000))
    assert decoded.counts(14) == counts
    assert decoded.counts(15) == Counts(tracks=1)
    assert UnitIndex.decode(UnitIndex().encode()).table.num_rows == 0
