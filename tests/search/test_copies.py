"""Copies of a recording in other formats: they count once, whatever comes when, and other recordings do not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from made_library import MadeTrack, made_tracks, write_output
from numpy.typing import NDArray

from singerembed.search import copies as copies_module
from singerembed.search.build import build_index, index_of
from singerembed.search.cluster import group_tracks
from singerembed.search.copies import (
    LEVEL_DB,
    MIN_CROPS,
    MIN_SPREAD_DB,
    NEAR_COPY,
    TracksAndCrops,
    find_copies,
)
from singerembed.search.query import open_index
from singerembed.search.store import StoredIndex, StoredVectors
from singerembed.search.verify import verify_credits

CROPS = 8


def coded(track: MadeTrack, name: str, *, noise: float = 0.02, level_noise: float = 0.02) -> MadeTrack:
    """`track` as a lossy encoder leaves it: `noise` is that of embeddings, in their standard deviations."""
    rng = np.random.default_rng(len(name))
    crops = [crop + noise * np.std(crop) * rng.standard_normal(len(crop)) for crop in track.crops if crop is not None]
    levels = -0.45 + np.array(track.rms_dbfs) + rng.normal(0, level_noise, len(crops))
    return dataclasses.replace(
        track, track_id=name, crops=[crop.astype(np.float32) for crop in crops], rms_dbfs=levels.tolist()
    )


def cut(track: MadeTrack, name: str, n: int) -> MadeTrack:
    return dataclasses.replace(track, track_id=name, crops=track.crops[:n], rms_dbfs=track.rms_dbfs[:n])


@pytest.fixture
def tracks() -> list[MadeTrack]:
    return made_tracks(5, 4, CROPS)


def names_that_count(path: str) -> set[str]:
    index = StoredIndex(path)
    return {index.tracks["track_id"][row].as_py() for row in np.flatnonzero(index.active).tolist()}


@pytest.mark.parametrize("nights", [1, 2])
def test_a_recording_in_two_formats_counts_once(tracks: list[MadeTrack], tmp_path: Path, nights: int) -> None:
    library = [*tracks, coded(tracks[0], "mp3"), coded(tracks[0], "ogg"), coded(tracks[7], "7.mp3")]
    path = str(tmp_path / "i.index")
    if nights == 2:
        build_index([write_output(tmp_path / "first.parquet", tracks)], path)
    done = build_index([write_output(tmp_path / "all.parquet", library)], path)
    assert (done.n_tracks, done.n_crops, done.n_doubled) == (20, 20 * CROPS, 3)
    assert done.doubled == [("mp3.wav", "s0-0.wav"), ("ogg.wav", "s0-0.wav"), ("7.mp3.wav", "s1-3.wav")]
    assert (done.added_tracks, done.added_crops) == ((23, 20 * CROPS) if nights == 1 else (3, 0))
    index = open_index(path)
    assert index.stored.profiles.n_tracks.tolist() == [4] * 5
    for by in ("track", "crop"):
        answer = index.search_track("s0-1", top=25, by=by)
        also = {found.track_id: found.also for found in answer.tracks}
        assert also["s0-0"] == ["mp3.wav", "ogg.wav"]
        assert len(also) == 19
    assert index.search_track("mp3") == index.search_track("s0-0")
    again = build_index([str(tmp_path / "all.parquet")], path)
    assert (again.known, again.added_tracks, again.n_tracks) == (23, 0, 20)


def test_other_recordings_are_kept_apart(tracks: list[MadeTrack], tmp_path: Path) -> None:
    steady = dataclasses.replace(made_tracks(1, 1, CROPS, seed=1)[0], track_id="steady", rms_dbfs=[-20.0] * CROPS)
    short, copy = cut(tracks[2], "short", MIN_CROPS - 1), coded(tracks[0], "copy")
    others = [
        coded(tracks[0], "another take", level_noise=0.5),
        coded(tracks[0], "another voice", noise=1.0),
        cut(copy, "shorter", CROPS - 1),
        dataclasses.replace(copy, track_id="later", crops=[None, *copy.crops], rms_dbfs=[-90.0, *copy.rms_dbfs]),
        steady,
        dataclasses.replace(coded(steady, "steady too"), rms_dbfs=steady.rms_dbfs),
        short,
        coded(short, "short too"),
    ]
    path = str(tmp_path / "i.index")
    done = build_index([write_output(tmp_path / "o.parquet", [*tracks, *others])], path)
    assert (done.n_doubled, done.n_tracks) == (0, 20 + len(others))


@pytest.mark.parametrize("changed_comes", ["first", "last", "alone"])
def test_a_copy_counts_when_its_first_is_replaced(tracks: list[MadeTrack], tmp_path: Path, changed_comes: str) -> None:
    path = str(tmp_path / "i.index")
    twins = [coded(tracks[0], "mp3"), coded(tracks[0], "ogg")]
    twins += [dataclasses.replace(twin, track_id=f"{twin.track_id} again") for twin in (tracks[0], twins[0])]
    done = build_index([write_output(tmp_path / "one.parquet", [*tracks, *twins])], path)
    assert (done.n_tracks, done.n_doubled) == (20, 4)
    changed = dataclasses.replace(made_tracks(1, 1, CROPS, seed=3)[0], track_id="s0-0")
    tonight = {"first": [changed, *twins], "last": [*twins, changed], "alone": [changed]}[changed_comes]
    done = build_index([write_output(tmp_path / "two.parquet", tonight)], path)
    assert (done.replaced, done.added_tracks, done.n_doubled, done.n_tracks) == (1, 1, 0, 21)
    index = open_index(path)
    assert index.stored.profiles.n_tracks.tolist() == [5, 4, 4, 4, 4]
    found = {track.track_id: track.also for track in index.search_track("s0-1", top=25).tracks}
    assert "s0-0" in found
    assert found["mp3"] == ["ogg.wav", "s0-0 again.wav", "mp3 again.wav"]
    assert len(found) == 20
    again = build_index([write_output(tmp_path / "all.parquet", [changed, *tracks[1:], *twins])], path)
    assert (again.known, again.added_tracks, again.n_tracks) == (24, 0, 21)


def test_a_better_copy_of_the_same_recording_takes_its_place(tracks: list[MadeTrack], tmp_path: Path) -> None:
    path = str(tmp_path / "i.index")
    build_index([write_output(tmp_path / "one.parquet", [*tracks, coded(tracks[0], "mp3")])], path)
    better = coded(tracks[0], "s0-0", noise=0.01)
    done = build_index([write_output(tmp_path / "two.parquet", [better])], path)
    assert (done.replaced, done.n_tracks) == (1, 20)
    assert "mp3" not in names_that_count(path)
    assert "s0-0" in names_that_count(path)


def test_a_copy_does_not_vouch_for_its_twin(tmp_path: Path) -> None:
    tracks = made_tracks(8, 6, CROPS, spread=3.0)
    wrong = dataclasses.replace(tracks[0], singer="singer 5")
    library = [wrong, *tracks[1:]]
    alone, with_twin = (
        write_output(tmp_path / f"{n}.parquet", [*library, *(coded(wrong, f"twin {i}") for i in range(n))])
        for n in (0, 2)
    )
    with index_of(alone) as one, index_of(with_twin) as two:
        expected, found = (verify_credits(index, "singer").credits for index in (one, two))
    assert found.track_id == expected.track_id
    assert expected.llr[0] < 0
    assert found.llr[0] < 0


def test_copies_make_no_group(tmp_path: Path) -> None:
    tracks = made_tracks(4, 4, CROPS)
    alone = dataclasses.replace(made_tracks(1, 1, CROPS, seed=7)[0], track_id="alone")
    library = [*tracks, alone, coded(alone, "alone.mp3"), coded(alone, "alone.ogg")]
    with index_of(write_output(tmp_path / "o.parquet", library)) as index:
        groups = group_tracks(index, 2)
    assert len(groups.track) == 17
    assert groups.group[-1] == -1


def made_comparison(folder: Path, seed: int, n: int = 400, dim: int = 64) -> TracksAndCrops:
    """Tracks of some lengths, four in ten derived from earlier ones, many near the limits of what copies are."""
    rng = np.random.default_rng(seed)
    made = list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], float]]()
    for _ in range(n):
        if made and rng.random() < 0.4:
            vectors, level, place, hop = made[rng.integers(len(made))]
            vectors = vectors + rng.choice([0.01, 0.03, 0.035]) * rng.standard_normal(vectors.shape)
            level = level + 2 * rng.normal() + rng.choice([0.02, 0.07, 0.1]) * rng.standard_normal(len(level))
            place = place + (rng.random() < 0.05)
        else:
            n_crops = int(rng.choice([MIN_CROPS - 1, MIN_CROPS, MIN_CROPS + 1, 40]))
            vectors = rng.standard_normal(dim) + rng.choice([0.3, 1]) * rng.standard_normal((n_crops, dim))
            level = rng.normal(-20, 4) + rng.choice([0.2, 1, 3]) * rng.standard_normal(n_crops)
            place, hop = np.arange(n_crops), rng.choice([4.0, 1.0])
        made.append((vectors / np.linalg.norm(vectors, axis=1, keepdims=True), level, place, hop))
    mean = np.stack([vectors.mean(axis=0) for vectors, *_ in made])
    length = np.linalg.norm(mean, axis=1)
    stored = {"tracks": mean / length[:, np.newaxis], "crops": np.concatenate([vectors for vectors, *_ in made])}
    for kind, rows in stored.items():
        (folder / kind).write_bytes(rows.astype(np.float16).tobytes())
    start = np.concatenate([hop * place for _, _, place, hop in made])
    return TracksAndCrops(
        np.array([len(vectors) for vectors, *_ in made]),
        length.astype(np.float32),
        np.concatenate([place for _, _, place, _ in made]).astype(np.int32),
        start,
        start + 4,
        np.concatenate([level for _, level, _, _ in made]).astype(np.float32),
        *(StoredVectors([folder / kind], dim) for kind in ("tracks", "crops")),
    )


def all_pairs(library: TracksAndCrops, counts: NDArray[np.bool_], first_new: int) -> dict[int, int]:
    """What `find_copies` returns, by comparing every pair."""
    ends = np.cumsum(library.n_crops)
    parts = [slice(end - n, end) for end, n in zip(ends.tolist(), library.n_crops.tolist(), strict=True)]
    crops = [library.crop_vectors.take(np.arange(part.start, part.stop)) for part in parts]
    level = [library.rms_dbfs[part] - library.rms_dbfs[part].mean() for part in parts]
    found: dict[int, int] = {}

    def alike(one: int, two: int) -> bool:
        return (
            np.array_equal(library.crop[parts[one]], library.crop[parts[two]])
            and bool(np.square(level[one] - level[two]).mean() <= LEVEL_DB**2)
            and bool((crops[one] * crops[two]).sum(axis=1).mean() >= NEAR_COPY)
        )

    seconds = [library.end[part.stop - 1] - library.start[part.start] for part in parts]
    told = [
        bool(counted) and len(rms) >= MIN_CROPS and rms.std() >= MIN_SPREAD_DB and long >= 4 * MIN_CROPS
        for counted, rms, long in zip(counts, level, seconds, strict=True)
    ]
    for track in range(first_new, len(parts)):
        before = [other for other in range(track) if told[other] and other not in found]
        same = next((other for other in before if told[track] and alike(track, other)), None)
        if same is not None:
            found[track] = same
    return found


@pytest.mark.parametrize("blocks", [(4096, 64, 16_384), (16, 3, 7)])
@pytest.mark.parametrize("first_new", [0, 250])
def test_no_pair_is_overlooked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, int, int], first_new: int
) -> None:
    for name, value in zip(("_TRACKS", "_ROWS", "_COLUMNS"), blocks, strict=True):
        monkeypatch.setattr(copies_module, name, value)
    library = made_comparison(tmp_path, seed=first_new)
    counts = np.random.default_rng(1).random(len(library.n_crops)) > 0.05
    expected = all_pairs(library, counts, first_new)
    assert len(expected) > 5
    assert find_copies(library, counts, first_new) == expected
