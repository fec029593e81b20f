"""The run: rows that say what happened, order, resume, refusals, stopping."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from conftest import GOLDEN, Golden
from numpy.typing import NDArray

from singerembed.audio import open_recording
from singerembed.catalog import Columns
from singerembed.engine.build import compare
from singerembed.errors import CatalogError, EngineError, InterruptedRun, OutputError
from singerembed.parquet import METADATA_KEY
from singerembed.pipeline import RunOptions, RunSummary, ordered_map, run

Voice = Callable[..., NDArray[np.float32]]
RATE = 44_100


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue over the golden crops and every defect named in the issue of a bad night."""
    folder = tmp_path_factory.mktemp("library")
    shutil.copytree(GOLDEN / "crops", folder / "crops")
    rng = np.random.default_rng(0)
    noise = (0.1 * rng.standard_normal((RATE * 9, 6))).astype(np.float32)
    soundfile.write(folder / "zero.wav", np.zeros(9 * RATE), RATE)
    soundfile.write(folder / "short.wav", noise[:441, 0], RATE)
    soundfile.write(folder / "8bit.wav", noise[:, 0], RATE, subtype="PCM_U8")
    soundfile.write(folder / "24bit.wav", noise[:, 0], RATE, subtype="PCM_24")
    soundfile.write(folder / "float.wav", noise[:, 0], RATE, subtype="FLOAT")
    soundfile.write(folder / "six.wav", noise, RATE)
    soundfile.write(folder / "8k.wav", noise[: 8_000 * 9, 0], 8_000)
    soundfile.write(folder / "192k.flac", noise[:, 0], 192_000, subtype="PCM_24")
    nan = noise[:, :1].copy()
    nan[5 * RATE] = np.nan
    soundfile.write(folder / "nan.wav", nan, RATE, subtype="FLOAT")
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("not audio at all\n" * 100, encoding="utf-8")
    (folder / "folder.wav").mkdir()
    soundfile.write(folder / "half.wav", noise[:, 0], RATE)
    content = (folder / "half.wav").read_bytes()
    (folder / "half.wav").write_bytes(content[: len(content) // 2])
    names = sorted(p.name for p in (folder / "crops").iterdir())
    rows = [f"{name},crops/{name},,,golden" for name in names]
    rows += [f"{name},{name},,,made" for name in sorted(p.name for p in folder.iterdir() if p.name != "crops")]
    rows += [
        "missing,missing.wav,,,made",
        "part,float.wav,1,8.5,made",
        "late,float.wav,100,,made",
        "bad,float.wav,x,,made",
    ]
    (folder / "catalog.csv").write_text("track_id,path,start,end,kind\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(library: Path, reference_engine: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunSummary]:
    output = tmp_path_factory.mktemp("out") / "out.parquet"
    summary = run(str(library / "catalog.csv"), str(output), engine=reference_engine)
    return output, summary


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


def small_run(library: Path, engine: str, output: Path, lines: list[str], **options: Any) -> pa.Table:
    catalog = output.with_suffix(".csv")
    text = "track_id,path,start,end\n" + "".join(f"{line}\n" for line in lines)
    catalog.write_text(text.replace("@", f"{library}/"), encoding="utf-8")
    run(str(catalog), str(output), engine=engine, options=RunOptions(**options))
    return pq.read_table(output)


def test_spaced_crops_equal_those_of_a_full_read(
    library: Path, reference_engine: str, tmp_path: Path, voice: Voice
) -> None:
    soundfile.write(tmp_path / "long.flac", voice(43, 48_000), 48_000)
    lines = [f"x,{tmp_path}/long.flac,,"]
    everything = small_run(library, reference_engine, tmp_path / "all.parquet", lines)
    three = small_run(library, reference_engine, tmp_path / "three.parquet", lines, crops=3)
    assert everything["crop"].to_pylist() == list(range(10))
    assert three["crop"].to_pylist() == [1, 5, 8]
    a = np.array(everything["embedding"].to_pylist(), np.float32)[[1, 5, 8]]
    b = np.array(three["embedding"].to_pylist(), np.float32)
    assert compare(b, a).cosine > 0.99999
    assert three["start"].to_pylist() == [4.0, 20.0, 32.0]


def test_hop_pool_dtype_and_silence(library: Path, reference_engine: str, tmp_path: Path) -> None:
    lines = ["x,@float.wav,,", "z,@zero.wav,,"]
    hop = small_run(library, reference_engine, tmp_path / "hop.parquet", lines, hop_seconds=1.5)
    assert hop["start"].to_pylist() == [0, 1.5, 3.0, 4.5] * 2
    plain = small_run(library, reference_engine, tmp_path / "plain.parquet", lines)
    pooled = small_run(library, reference_engine, tmp_path / "pool.parquet", lines, pool="mean")
    assert pooled["status"].to_pylist() == ["ok", "silent"]
    assert pooled["end"].to_pylist() == [8.0, 8.0]
    mean = np.mean(plain["embedding"].to_pylist()[:2], axis=0)
    assert np.allclose(pooled["embedding"][0].as_py(), mean, atol=1e-4)
    half = small_run(library, reference_engine, tmp_path / "half.parquet", lines, embedding_dtype="float16")
    assert half.schema.field("embedding").type.value_type == pa.float16()
    assert np.allclose(half["embedding"][0].as_py(), plain["embedding"][0].as_py(), rtol=1e-3, atol=1e-3)
    quiet = small_run(library, reference_engine, tmp_path / "quiet.parquet", lines, silence_dbfs=0.0)
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


# --- going on, and refusing to --------------------------------------------------------------------------------------


def test_a_finished_run_does_nothing_again(
    finished: tuple[Path, RunSummary], library: Path, reference_engine: str
) -> None:
    before = finished[0].stat().st_mtime_ns
    summary = run(str(library / "catalog.csv"), str(finished[0]), engine=reference_engine)
    assert summary.already_done
    assert summary.counts == finished[1].counts
    assert finished[0].stat().st_mtime_ns == before
    assert sorted(p.name for p in finished[0].parent.iterdir()) == ["out.parquet"]


def stop_after(n: int) -> Callable[[], int]:
    calls = itertools.count()
    return lambda: signal.SIGTERM if next(calls) >= n else 0


def test_a_stopped_run_goes_on(
    finished: tuple[Path, RunSummary], library: Path, reference_engine: str, tmp_path: Path
) -> None:
    output = tmp_path / "o.parquet"
    options = RunOptions(unit_minutes=8.0)
    stops = 0
    for n in (4, 10, 14):
        try:
            run(str(library / "catalog.csv"), str(output), engine=reference_engine, options=options, stop=stop_after(n))
        except InterruptedRun as exc:
            stops += 1
            assert exc.exit_code == 128 + signal.SIGTERM
            assert "goes on from here" in str(exc)
            assert not output.exists()
    summary = run(str(library / "catalog.csv"), str(output), engine=reference_engine, options=options)
    assert stops >= 2
    assert summary.units_before > 0
    assert pq.read_table(output).equals(pq.read_table(finished[0]))
    assert not Path(f"{output}.parts").exists()


def interrupted(library: Path, engine: str, output: Path) -> None:
    with pytest.raises(InterruptedRun):
        run(
            str(library / "catalog.csv"),
            str(output),
            engine=engine,
            options=RunOptions(unit_minutes=8.0),
            stop=stop_after(15),
        )


def test_other_options_engines_and_catalogues_are_refused(
    finished: tuple[Path, RunSummary], library: Path, reference_engine: str, tmp_path: Path
) -> None:
    catalog = str(library / "catalog.csv")
    output = tmp_path / "o.parquet"
    interrupted(library, reference_engine, output)
    same = RunOptions(unit_minutes=8.0)
    with pytest.raises(OutputError, match=r"options silence_dbfs \(was -60.0, now -50.0\).*--restart"):
        run(catalog, str(output), engine=reference_engine, options=replace(same, silence_dbfs=-50.0))
    with pytest.raises(OutputError, match=r"engine name.*engine sha256"):
        run(catalog, str(output), options=same)
    changed = tmp_path / "catalog.csv"
    changed.write_text((library / "catalog.csv").read_text(encoding="utf-8") + "more,more.wav,,,\n", encoding="utf-8")
    with pytest.raises(OutputError, match="catalog sha256"):
        run(str(changed), str(output), engine=reference_engine, options=same)
    with pytest.raises(OutputError, match="comes from another run: options crops"):
        run(catalog, str(finished[0]), engine=reference_engine, options=RunOptions(crops=2))
    restarted = run(catalog, str(output), engine=reference_engine, options=RunOptions(restart=True))
    assert restarted.units_before == 0
    assert pq.read_table(output).equals(pq.read_table(finished[0]))


def test_files_of_others_are_never_overwritten(library: Path, reference_engine: str, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"x": [1]}), foreign)
    text = tmp_path / "notes.parquet"
    text.write_text("my notes", encoding="utf-8")
    for output, message in ((foreign, "not written by singerembed"), (text, "is not a Parquet file")):
        content = output.read_bytes()
        for restart in (False, True):
            with pytest.raises(OutputError, match=message):
                run(
                    str(library / "catalog.csv"),
                    str(output),
                    engine=reference_engine,
                    options=RunOptions(restart=restart),
                )
        assert output.read_bytes() == content


def test_two_runs_on_one_output(library: Path, reference_engine: str, tmp_path: Path) -> None:
    output = str(tmp_path / "o.parquet")
    entered, leave = threading.Event(), threading.Event()

    def stop() -> int:
        entered.set()
        leave.wait(30)
        return signal.SIGINT

    def first() -> None:
        with pytest.raises(InterruptedRun):
            run(str(library / "catalog.csv"), output, engine=reference_engine, stop=stop)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(30)
    with pytest.raises(OutputError, match=f"another run is writing .* \\(process {os.getpid()}\\)"):
        run(str(library / "catalog.csv"), output, engine=reference_engine)
    leave.set()
    thread.join()


def test_kills_lose_nothing(
    finished: tuple[Path, RunSummary], library: Path, reference_engine: str, tmp_path: Path
) -> None:
    """SIGKILL at random moments, then the same command again. tests/soak does it a hundred times."""
    output = tmp_path / "o.parquet"
    command = [
        sys.executable, "-m", "singerembed", "run", str(library / "catalog.csv"), str(output),
        "--engine", reference_engine, "--unit-minutes", "8", "-q",
    ]  # fmt: skip
    rng = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(command, start_new_session=True)
        time.sleep(rng.uniform(0.5, 2.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, check=False).returncode == 3
    assert pq.read_table(output).equals(pq.read_table(finished[0]))


def test_a_full_disk_keeps_what_is_done(
    finished: tuple[Path, RunSummary], library: Path, reference_engine: str, tmp_path: Path
) -> None:
    """RLIMIT_FSIZE plays the full disk: first no part fits, then the parts fit but not the merged file."""
    output = tmp_path / "o.parquet"
    arguments = ["run", str(library / "catalog.csv"), str(output), "--engine", reference_engine, "--unit-minutes", "8"]

    def limited(size: int) -> subprocess.CompletedProcess[str]:
        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        command = [sys.executable, "-m", "singerembed", *arguments]
        return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)

    for size, message in ((6_000, "while writing unit"), (70_000, "while writing")):
        result = limited(size)
        assert result.returncode == 1
        assert message in result.stderr
        assert "are safe" in result.stderr
        assert "Traceback" not in result.stderr
        assert not output.exists()
        assert not list(Path(f"{output}.parts").glob("*.tmp"))
    run(str(library / "catalog.csv"), str(output), engine=reference_engine, options=RunOptions(unit_minutes=8.0))
    assert pq.read_table(output).equals(pq.read_table(finished[0]))


def test_a_broken_engine_ends_the_run(
    library: Path, reference_engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: object, _crops: object) -> None:
        raise EngineError("the device fell off the bus")

    monkeypatch.setattr("singerembed.engine.onnxruntime.OnnxRuntimeEngine.embed", fail)
    with pytest.raises(EngineError, match="fell off the bus"):
        run(str(library / "catalog.csv"), str(tmp_path / "o.parquet"), engine=reference_engine)
    assert not (tmp_path / "o.parquet").exists()


def test_a_surprise_costs_one_track(
    library: Path, reference_engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def surprising(location: str, *rest: Any) -> Any:
        if location.endswith("six.wav"):
            raise ZeroDivisionError("surprise")
        return open_recording(location, *rest)

    monkeypatch.setattr("singerembed.pipeline.open_recording", surprising)
    table = small_run(library, reference_engine, tmp_path / "o.parquet", ["a,@six.wav,,", "b,@float.wav,,"])
    assert table["status"].to_pylist() == ["error", "ok", "ok"]
    assert table["error_code"][0].as_py() == "internal"
    assert "surprise" in table["error"][0].as_py()


def test_a_missing_engine_or_catalogue_is_said(library: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="No such file"):
        run(str(library / "catalog.csv"), str(tmp_path / "o.parquet"), engine=str(tmp_path / "none.engine"))
    with pytest.raises(CatalogError, match="No such file"):
        run(str(tmp_path / "none.csv"), str(tmp_path / "o.parquet"))
    assert list(tmp_path.iterdir()) == []


# --- the ordered map ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_ordered_map_keeps_order_and_bounds(seed: int) -> None:
    rng = random.Random(seed)
    delays = [rng.choice([0, 0, 0.001, 0.01]) for _ in range(200)]
    running, most_running, started, most_ahead, taken = 0, 0, 0, 0, 0
    lock = threading.Lock()

    def work(i: int) -> int:
        nonlocal running, most_running, started, most_ahead
        with lock:
            running += 1
            started += 1
            most_running = max(most_running, running)
            most_ahead = max(most_ahead, started - taken)
        time.sleep(delays[i])
        with lock:
            running -= 1
        return i * i

    with ThreadPoolExecutor(16) as pool:
        results = ordered_map(pool, work, range(200), max_running=5, weight=lambda _: 1, max_waiting=10)
        for i, (item, result) in enumerate(results):
            taken += 1
            assert (item, result) == (i, i * i)
    assert most_running <= 5
    assert most_ahead <= 10 + 5 + 1


def test_ordered_map_raises_in_its_turn() -> None:
    def work(i: int) -> int:
        if i == 3:
            raise KeyError(i)
        return i

    seen = []
    with ThreadPoolExecutor(4) as pool, pytest.raises(KeyError):
        for item, _ in ordered_map(pool, work, range(100), max_running=4, weight=lambda _: 1, max_waiting=5):
            seen.append(item)
    assert seen == [0, 1, 2]
