"""Credits, screening and groups, on made-up singers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_library import MadeTrack, made_tracks, write_output
from numpy.typing import NDArray

from singerembed.errors import InputError
from singerembed.evaluation.metrics import error_curve
from singerembed.search.audit_page import make_audit
from singerembed.search.build import build_index, index_of
from singerembed.search.calibration import cllr, expected_calibration_error, singer_sums
from singerembed.search.cluster import group_tracks, write_groups
from singerembed.search.query import open_index
from singerembed.search.screening import false_alarms, screen
from singerembed.search.verify import Verification, verify_credits, write_credits
from singerembed.search.voices import split_score

# Harder than the others: tracks of a singer overlap with those of others.
SPREAD = 3.0


def verified(tracks: list[MadeTrack], folder: Path) -> Verification:
    with index_of(write_output(folder / "o.parquet", tracks)) as index:
        return verify_credits(index, "singer")


def test_swapped_credits_are_found(tmp_path: Path) -> None:
    tracks = made_tracks(20, 8, 2, spread=SPREAD)
    rng = np.random.default_rng(0)
    wrong = set(rng.choice(len(tracks), len(tracks) // 5, replace=False).tolist())
    swapped = [
        dataclasses.replace(track, singer=f"singer {(i // 8 + 1 + i % 19) % 20}") if i in wrong else track
        for i, track in enumerate(tracks)
    ]
    wrong = {i for i in wrong if swapped[i].singer != tracks[i].singer}
    found = verified(swapped, tmp_path)
    labels = np.array([i in wrong for i in range(len(tracks))])
    curve = error_curve(labels, -found.credits.llr)
    area = float(-np.trapezoid(curve.false_acceptance, curve.false_rejection))
    assert area > 0.97 or 1 - area > 0.97
    first = found.suspects(1.0)[: len(wrong)]
    assert labels[first].mean() > 0.8
    true_singer = [tracks[i].singer for i in first if labels[i]]
    named = [found.singers[found.credits.other[i]] for i in first if labels[i]]
    assert np.mean([a == b for a, b in zip(true_singer, named, strict=True)]) > 0.8
    assert found.calibration.cllr < 0.9
    assert found.calibration.min_cllr <= found.calibration.cllr + 1e-9


def test_twenty_tracks_of_one_singer_given_to_another(tmp_path: Path) -> None:
    tracks = made_tracks(8, 40, 1, spread=SPREAD)
    given = [dataclasses.replace(t, singer="singer 1") if i < 20 else t for i, t in enumerate(tracks)]
    found = verified(given, tmp_path)
    first = found.suspects(1.0)[:20]
    assert (first < 20).mean() > 0.8


def test_singers_with_few_tracks_are_named_and_not_guessed(tmp_path: Path) -> None:
    tracks = [*made_tracks(6, 5, 2), MadeTrack("x-0", "rare", made_tracks(1, 1, 2, seed=9)[0].crops)]
    nobody = dataclasses.replace(made_tracks(1, 1, 2, seed=8)[0], track_id="n", singer=None)
    found = verified([*tracks, nobody], tmp_path)
    assert found.too_few == ["rare"]
    assert [*found.credits.status[-2:]] == ["too few tracks", "no singer"]
    assert np.isnan(found.credits.chance[-2:]).all()
    write_credits(found, str(tmp_path / "c.parquet"), 0.05)
    table = pq.read_table(tmp_path / "c.parquet")
    assert table["chance"].null_count == 2
    assert table["credited"].to_pylist()[-2:] == ["rare", None]
    with pytest.raises(InputError, match="0 singers have 3 tracks or more, 4 are needed"):
        verified(made_tracks(6, 2, 1), tmp_path)


def test_credits_that_say_nothing_are_not_calibrated_on(tmp_path: Path) -> None:
    voice = made_tracks(1, 1, 1)[0].crops[0]
    assert voice is not None
    tracks = [MadeTrack(f"t{n}", f"singer {n % 5}", [voice * np.float32(1 + n / 1000)]) for n in range(20)]
    path = str(tmp_path / "i.index")
    build_index([write_output(tmp_path / "o.parquet", tracks)], path)
    with pytest.raises(InputError, match="no more like others of their 5 singers"):
        verify_credits(open_index(path).stored)
    assert open_index(path).search_track("t0").singers[0].chance is None


def test_a_calibration_of_known_ratios_is_good() -> None:
    rng = np.random.default_rng(0)
    same = rng.random(20_000) < 0.5
    score = rng.standard_normal(len(same)) + np.where(same, 1, -1)  # the log likelihood ratio is 2 * score
    assert expected_calibration_error(2 * score, same) < 0.02
    assert expected_calibration_error(8 * score, same) > 0.05
    assert cllr(2 * score, same) < min(cllr(8 * score, same), cllr(0.5 * score, same))
    assert cllr(0 * score, same) == pytest.approx(1)


def test_two_voices_in_one_track(tmp_path: Path) -> None:
    tracks = made_tracks(8, 5, 8)
    duets = [
        MadeTrack(f"duet-{i}", f"singer {i}", [*tracks[5 * i].crops[:4], *tracks[5 * i + 5].crops[4:]])
        for i in range(3)
    ]
    found = verified([*tracks, *duets], tmp_path)
    names = [found.credits.track_id[row] for row in found.divided(0.5)]
    assert sorted(names) == ["duet-0", "duet-1", "duet-2"]
    assert split_score(np.eye(6, dtype=np.float32)[[0, 0, 0, 1, 1, 1]]) == pytest.approx(0)


def test_the_page_plays_crops_and_escapes_names(tmp_path: Path) -> None:
    tracks = made_tracks(6, 5, 2)
    tracks[0] = dataclasses.replace(tracks[0], track_id="<b>&'x", singer="singer 3")
    with index_of(write_output(tmp_path / "o.parquet", tracks)) as index:
        text = make_audit(verify_credits(index, "singer"), index, "/music/", 0.5, 0.95)
    assert "&lt;b&gt;&amp;&#x27;x.wav" in text
    assert "<b>" not in text
    assert 'src="file:///music/%3Cb%3E%26%27x.wav#t=' in text
    assert text.count("<audio") == 3


def test_screening_names_those_that_sound_like_others(tmp_path: Path) -> None:
    library, tonight = made_tracks(10, 6, 2)[: 8 * 6], made_tracks(10, 8, 2)
    path = str(tmp_path / "i.index")
    build_index([write_output(tmp_path / "o.parquet", library)], path)
    index = open_index(path)
    clones = [
        dataclasses.replace(t, track_id=f"new-{i}", singer="unknown")
        for i, t in enumerate(made_tracks(10, 6, 2)[2 * 6 : 2 * 6 + 3])
    ]
    strangers = [dataclasses.replace(t, singer=None) for t in tonight[9 * 8 :]]
    honest = dataclasses.replace(library[0], track_id="honest")
    output = write_output(tmp_path / "t.parquet", [*clones, *strangers, honest])
    found = list(screen(index, output, 0.5))
    assert [track.track_id for track in found] == ["new-0", "new-1", "new-2"]
    assert {track.singers[0][0] for track in found} == {"singer 2"}
    alarms = false_alarms(index, 0.5)
    assert alarms.found > 900
    assert alarms.known < 50
    assert alarms.unknown <= 1000
    build_index([write_output(tmp_path / "few.parquet", made_tracks(2, 3, 1))], str(tmp_path / "few.index"))
    with pytest.raises(InputError, match="fewer than four singers"):
        list(screen(open_index(str(tmp_path / "few.index")), output, 0.5))


def test_false_alarms_are_those_of_an_index_without_the_singer_or_the_track(tmp_path: Path) -> None:
    min_chance, path = 0.3, str(tmp_path / "i.index")
    tracks = [*made_tracks(8, 5, 2, spread=SPREAD), *made_tracks(3, 1, 2, spread=SPREAD, seed=5, first=9)]
    tracks[-1] = dataclasses.replace(tracks[-1], singer="alone")
    build_index([write_output(tmp_path / "o.parquet", tracks)], path)
    index = open_index(path)
    vectors = index.stored.vectors["tracks"].take(np.arange(len(tracks)))
    names = index.stored.profiles.names
    singer = np.array([names.index(track.singer or "") for track in tracks])

    def named(kept: NDArray[np.bool_], vector: NDArray[np.float32]) -> int:
        """The singer who is named when only the tracks `kept` are there; -1: nobody."""
        counts = np.bincount(singer[kept], minlength=len(names))
        total = singer_sums(vectors[kept], singer[kept], len(names))
        score = total @ vector / np.maximum(np.linalg.norm(total, axis=1), 1e-6)
        chance = index.chances(score[np.newaxis], counts)
        assert chance is not None
        return int(chance.argmax()) if chance.max() >= min_chance else -1

    number = np.arange(len(tracks))
    several = np.bincount(singer)[singer] > 1
    unknown = np.array([named(singer != singer[i], vectors[i]) for i in number])
    known = np.array([named(number != i, vectors[i]) for i in number])[several]
    wrong = (known != -1) & (known != singer[several])
    assert 0 < wrong.sum() < (known != -1).sum()
    alarms = false_alarms(index, min_chance)
    assert alarms.unknown == pytest.approx(1000 * (unknown != -1).mean())
    assert alarms.known == pytest.approx(1000 * wrong.mean())
    assert alarms.found == pytest.approx(1000 * (known == singer[several]).mean())


def test_chances_add_up_to_less_than_one(tmp_path: Path) -> None:
    path = str(tmp_path / "i.index")
    build_index([write_output(tmp_path / "o.parquet", made_tracks(6, 4, 2, spread=SPREAD))], path)
    singers = open_index(path).search_track("s2-0").singers
    chances = [singer.chance for singer in singers if singer.chance is not None]
    assert len(chances) == 6
    assert sum(chances) < 1
    assert chances == sorted(chances, reverse=True)


def test_groups_are_singers(tmp_path: Path) -> None:
    tracks = [dataclasses.replace(t, singer=None) for t in made_tracks(6, 5, 2)]
    alone = dataclasses.replace(made_tracks(1, 1, 2, seed=7)[0], track_id="alone")
    with index_of(write_output(tmp_path / "o.parquet", [*tracks, alone])) as index:
        groups = group_tracks(index, 3)
        write_groups(index, groups, str(tmp_path / "g.parquet"))
        with pytest.raises(InputError, match="too few"):
            group_tracks(index, 30)
    assert groups.n_groups == 6
    assert [len(set(groups.group[5 * i : 5 * i + 5].tolist())) for i in range(6)] == [1] * 6
    assert groups.group[-1] == -1
    assert (groups.stability >= 0.8).all()
    table = pq.read_table(tmp_path / "g.parquet")
    assert table["group"].null_count == 1
    assert table["group_tracks"].to_pylist()[0] == 5
