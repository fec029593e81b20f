"""An index: what goes in, and what comes out."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_library import MadeTrack, made_tracks, write_output
from numpy.typing import NDArray
from tolerances import SCORE_FLOAT16

from singerembed.errors import InputError, OutputError, UsageError
from singerembed.evaluation.scoring import Moments, fit_scoring
from singerembed.search import nearest as nearest_module
from singerembed.search.build import build_index
from singerembed.search.library import Library
from singerembed.search.nearest import nearest
from singerembed.search.query import open_index
from singerembed.search.store import MANIFEST, track_vector

pytest_plugins = ["small_library"]


def test_scores_are_those_of_the_centred_embeddings(output: str, tracks: list[MadeTrack], tmp_path: Path) -> None:
    path = str(tmp_path / "i.index")
    done = build_index([output], path)
    assert (done.n_tracks, done.n_crops, done.silent) == (20, 60, 0)
    every = np.stack([crop for track in tracks for crop in track.crops if crop is not None]).astype(np.float64)
    whole = np.stack([_unit(_unit(_stacked(t) - every.mean(0)).mean(0, keepdims=True))[0] for t in tracks])
    for number in (0, 7, 19):
        scores = whole @ whole[number]
        scores[number] = -2
        answer = open_index(path).search_track(tracks[number].track_id, top=3)
        expected = np.argsort(-scores)[:3]
        assert [found.track_id for found in answer.tracks] == [tracks[i].track_id for i in expected]
        assert [found.score for found in answer.tracks] == pytest.approx(scores[expected], abs=SCORE_FLOAT16)
        assert answer.singers[0].singer == tracks[number].singer
        assert answer.singers[0].n_tracks == 3  # the track itself does not count


def _stacked(track: MadeTrack) -> NDArray[np.float64]:
    return np.asarray([crop for crop in track.crops if crop is not None], np.float64)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def test_silent_crops_and_copies_do_not_count(tracks: list[MadeTrack], tmp_path: Path) -> None:
    copy = dataclasses.replace(tracks[0], track_id="copy")
    silent = dataclasses.replace(tracks[1], track_id="silent", crops=[None, None])
    half = dataclasses.replace(tracks[2], track_id="half", crops=[None, tracks[2].crops[0]])
    path = str(tmp_path / "i.index")
    done = build_index([write_output(tmp_path / "o.parquet", [*tracks, copy, silent, half])], path)
    assert (done.n_tracks, done.n_doubled, done.doubled, done.silent) == (21, 1, [("copy.wav", "s0-0.wav")], 3)
    index = open_index(path)
    answer = index.search_track("s0-1", top=3)
    assert {found.track_id: found.also for found in answer.tracks}["s0-0"] == ["copy.wav"]
    assert "copy" not in [found.track_id for found in answer.tracks]
    assert index.search_track("copy", top=3) == index.search_track("s0-0", top=3)
    assert answer.singers[0].n_tracks == 4  # s0-0, s0-2, s0-3 and half
    half_match = index.search_track("half", top=1).tracks[0].matches
    assert [(match.query_seconds, match.track_seconds) for match in half_match] == [(4.0, 0.0)]
    with pytest.raises(UsageError, match='no track of the id or path "silent"'):
        index.search_track("silent")


def test_by_crop_finds_the_one_crop_of_a_duet(tracks: list[MadeTrack], tmp_path: Path) -> None:
    duet = MadeTrack("duet", None, [*tracks[0].crops[:1], *tracks[8].crops, *tracks[12].crops])
    path = str(tmp_path / "i.index")
    build_index([write_output(tmp_path / "o.parquet", [*tracks, duet])], path)
    index = open_index(path)
    assert index.search_track("s0-0", top=1, by="crop").tracks[0].track_id == "duet"
    assert index.search_track("s0-0", top=1, by="track").tracks[0].track_id != "duet"


def test_where_takes_columns_of_the_catalogue(output: str, tmp_path: Path) -> None:
    path = str(tmp_path / "i.index")
    build_index([output], path)
    index = open_index(path)
    years = index.stored.tracks["year"].to_pylist()
    names = index.stored.tracks["track_id"].to_pylist()
    found = [t.track_id for t in index.search_track("s0-0", where="year < 1982 and singer <> 'singer 0'").tracks]
    assert sorted(found) == sorted(n for n, year in zip(names, years, strict=True) if year < 1982 and n[:2] != "s0")
    with pytest.raises(UsageError, match=r"no_such.*Columns: track_id, path, singer, year"):
        index.search_track("s0-0", where="no_such = 1")
    with pytest.raises(UsageError):
        index.search_track("s0-0", where="year in (select 1 from read_csv('/etc/passwd'))")


@pytest.mark.parametrize("allowed_share", [1.0, 0.5])
def test_quantised_vectors_find_what_exact_search_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed_share: float
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(nearest_module, "EXACT_ROWS", 200)
    monkeypatch.setattr("singerembed.search.build.EXACT_ROWS", 200)
    path = str(tmp_path / "i.index")
    tracks = made_tracks(40, 10, 3)
    build_index([write_output(tmp_path / "one.parquet", tracks[:350])], path)
    before = sorted(p.name for p in Path(path).glob("*.faiss"))
    build_index([write_output(tmp_path / "two.parquet", tracks[350:])], path)
    assert before == ["000000.crops.faiss", "000000.tracks.faiss"]
    assert sorted(p.name for p in Path(path).glob("*.faiss")) == [*before, "000001.crops.faiss", "000001.tracks.faiss"]
    index = open_index(path)
    crops = index.stored.vectors["crops"]
    allowed = np.random.default_rng(0).random(len(crops)) < allowed_share
    queries = crops.take(np.arange(0, len(crops), 40)) + 0.01
    found = nearest(crops, queries, 10, allowed, index.quantised("crops"))
    exact = nearest(crops, queries, 10, allowed)
    same = [len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(found[0], exact[0], strict=True)]
    assert np.mean(same) >= 0.98
    again = nearest(crops, queries, 10, allowed, index.quantised("crops"))
    assert np.array_equal(found[0], again[0])
    assert np.array_equal(found[1], again[1])
    assert allowed[found[0]].all()


@pytest.mark.parametrize("bytes_left", [100, 3_000, 300_000, 600_000])
def test_a_full_disk_is_told_and_leaves_the_index_as_it_was(tmp_path: Path, bytes_left: int) -> None:
    more = write_output(tmp_path / "o.parquet", made_tracks(20, 10, 1))
    code = (
        "import resource, signal, sys\n"
        "from singerembed.errors import OutputError\n"
        "from singerembed.search import build, nearest\n"
        "build.EXACT_ROWS = nearest.EXACT_ROWS = 130\n"
        "limit = int(sys.argv[3])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "try:\n"
        "    build.build_index([sys.argv[1]], sys.argv[2])\n"
        "except OutputError as exc:\n"
        "    print(exc)\n"
    )
    for path, n_files in (tmp_path / "new.index", 0), (tmp_path / "old.index", 1):
        if n_files:
            build_index([write_output(tmp_path / "few.parquet", made_tracks(5, 4, 1, first=20))], str(path))
        command = [sys.executable, "-c", code, more, str(path), str(bytes_left)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said == f"cannot write the index {path}: File too large\n"
        assert len(list(tmp_path.glob("*.index"))) == n_files
        assert not list(tmp_path.glob(".*"))
    assert open_index(str(path)).stored.active.sum() == 20


def test_an_output_that_is_damaged_is_named(output: str, tmp_path: Path) -> None:
    content = bytearray(Path(output).read_bytes())
    content[4:400] = bytes(396)
    Path(output).write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*out\.parquet: "):
        build_index([output], str(tmp_path / "i.index"))


def test_plain_messages(output: str, tmp_path: Path) -> None:
    path = str(tmp_path / "i.index")
    with pytest.raises(UsageError, match='no column "artist"; it has: singer, year'):
        build_index([output], path, singer_column="artist")
    other = write_output(tmp_path / "other.parquet", made_tracks(1, 1, 1), engine={"name": "byol", "sha256": "0" * 64})
    with pytest.raises(UsageError, match=r"engine byol .* cannot be compared"):
        build_index([output, other], path)
    silent = write_output(tmp_path / "silent.parquet", [MadeTrack("a", "x", [None])])
    with pytest.raises(InputError, match=r"no row has an embedding .1 silent crops"):
        build_index([silent], path)
    with pytest.raises(InputError, match="no such file"):
        build_index([str(tmp_path / "none.parquet")], path)
    assert not Path(path).exists()
    build_index([output], path)
    with pytest.raises(UsageError, match="engine byol"):
        build_index([other], path)
    with pytest.raises(UsageError, match="was made with --singer-column singer"):
        build_index([output], path, singer_column="year")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UsageError, match="exists and is not an index"):
        build_index([output], str(tmp_path / "other"))
    vectors = Path(path) / "000000.crops.f16"
    vectors.write_bytes(vectors.read_bytes()[:-2000])
    with pytest.raises(OutputError, match="is damaged"):
        open_index(path)
    (Path(path) / MANIFEST).write_text('{"format": 99}', encoding="utf-8")
    with pytest.raises(OutputError, match="format 99, but this singerembed reads 3"):
        open_index(path)


def test_voices_that_were_separated_are_not_mixed_with_others(tmp_path: Path) -> None:
    tracks = made_tracks(3, 2, 2)
    plain = write_output(tmp_path / "a.parquet", tracks)
    separated = [
        write_output(tmp_path / f"{name}.parquet", tracks, separator={"name": "x", "sha256": "1", "min_vocals_db": db})
        for name, db in (("b", -15), ("c", -10))
    ]
    with pytest.raises(UsageError, match="embeddings cannot be compared"):
        Library([plain, separated[0]])
    assert Library(separated).n_silent == 0


def test_scorings_separate_made_singers() -> None:
    tracks = made_tracks(6, 4, 3)
    rows = np.stack([crop for track in tracks for crop in track.crops if crop is not None])
    singer = np.repeat(np.arange(6), 12)
    moments = Moments(second=True)
    moments.add(rows)
    each = [Moments(second=True) for _ in range(6)]
    for number in range(6):
        each[number].add(rows[singer == number])
    for kind in ("centred", "whitened", "lda", "cosine"):
        vectors = fit_scoring(kind, moments, each).vectors(rows)
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
        same = (singer[:, np.newaxis] == singer) & ~np.eye(len(rows), dtype=bool)
        scores = vectors @ vectors.T
        gap = scores[same].mean() - scores[singer[:, np.newaxis] != singer].mean()
        assert gap > (0.01 if kind == "cosine" else 0.2), kind
    with pytest.raises(ValueError, match="three singers"):
        fit_scoring("lda", moments, each[:2])


def test_a_tracks_vector_weighs_crops_alike() -> None:
    crops = np.eye(3, dtype=np.float32)[:2]
    assert track_vector(crops) == pytest.approx([np.sqrt(0.5), np.sqrt(0.5), 0])


def test_outputs_may_have_other_columns_and_types(tracks: list[MadeTrack], tmp_path: Path) -> None:
    plain = write_output(tmp_path / "plain.parquet", tracks[:8])
    numbers = write_output(tmp_path / "numbers.parquet", tracks[8:12])
    text = write_output(tmp_path / "text.parquet", tracks[12:])
    for path, name, new, values in (
        (numbers, "label", pa.int64(), lambda row: row % 2),
        (text, "label", pa.string(), lambda row: f"label {row % 2}"),
        (text, "vector", pa.string(), lambda row: "an own column"),
        (text, "row number", pa.int64(), lambda row: 7),
    ):
        table = pq.read_table(path)
        pq.write_table(table.append_column(name, pa.array([values(row) for row in range(len(table))], new)), path)
    together, nights = str(tmp_path / "together.index"), str(tmp_path / "nights.index")
    assert build_index([plain, numbers, text], together).n_tracks == 20
    assert [build_index([night], nights).n_tracks for night in (plain, numbers, text)] == [8, 12, 20]
    for path in (together, nights):
        index = open_index(path)
        for where, n in (("label = '1'", 2), ("label like 'label%'", 8), ("vector_ like 'an own%'", 8), ("true", 19)):
            assert len(index.search_track("s0-0", top=30, where=where).tracks) == n, where


def test_a_condition_is_one_expression(output: str, tmp_path: Path) -> None:
    path = str(tmp_path / "i.index")
    build_index([output], path)
    index = open_index(path)
    for where in ("true); select 1 --", "true; select 1", "", "year = 1980) or (year = 1981"):
        with pytest.raises(UsageError, match="--where"):
            index.search_track("s0-0", where=where)
    assert index.search_track("s0-0", where="year < 1990 -- a note").tracks
