"""Pairs: the official file, drawing, all pairs in bounded memory, and what ranks compare."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tolerances import MNR_STANDARD_ERRORS, SHARE

from singerembed.errors import InputError
from singerembed.evaluation import pairs as module
from singerembed.evaluation.metrics import equal_error_rate, normalised_rank
from singerembed.evaluation.pairs import (
    Pairs,
    all_pairs,
    draw_pairs,
    draw_rank_scores,
    pair_scores,
    pairs_of_names,
    read_pair_file,
    unit_rows,
    write_pair_file,
)

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def singers() -> NDArray[np.int64]:
    """Seven singers; the last has one crop only."""
    return np.array([0] * 5 + [1] * 9 + [2] * 2 + [3] * 30 + [4] * 4 + [5] * 3 + [6])


@pytest.fixture
def unit(singers: NDArray[np.int64]) -> NDArray[np.float32]:
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((7, 16))
    return unit_rows(centres[singers] + rng.standard_normal((len(singers), 16)))


def test_the_official_mean_normalised_rank() -> None:
    official = json.loads((GOLDEN / "evaluation.json").read_text(encoding="utf-8"))
    table = np.load(GOLDEN / "evaluation_in.npz")
    names = [str(name) for name in table["names"]]
    pairs, _ = pairs_of_names(
        read_pair_file(str(GOLDEN / "evaluation_pairs.txt")), {name: i for i, name in enumerate(names)}
    )
    singers = np.unique([name.split("/")[0] for name in names], return_inverse=True)[1]
    unit = unit_rows(table["embedding"])
    means = []
    for seed in range(6):
        drawn = draw_rank_scores(unit, singers, pairs, seed=seed)
        assert drawn.distractors.shape == (official["mnr_queries"], official["mnr_distractors"])
        means.append(normalised_rank(drawn.positive, drawn.distractors).mean())
    error = official["mnr_sd_between_seeds"] * np.sqrt(2 / 6)
    assert np.mean(means) == pytest.approx(official["mnr_mean_of_6_seeds"], abs=MNR_STANDARD_ERRORS * error)
    assert np.std(means) < 3 * official["mnr_sd_between_seeds"]


def test_distractors_are_other_singers_and_all_of_them_where_few(
    unit: NDArray[np.float32], singers: NDArray[np.int64]
) -> None:
    pairs = Pairs(np.array([0, 0, 5]), np.array([1, 5, 20]), np.array([True, False, False]))
    drawn = draw_rank_scores(unit, singers, pairs, seed=0)
    assert drawn.positive == pytest.approx([unit[0] @ unit[1]])
    np.testing.assert_allclose(np.sort(drawn.distractors[0]), np.sort(unit[[5, 20]] @ unit[0]), rtol=1e-6)


@pytest.mark.parametrize(("first", "second", "label"), [(0, 1, True), (0, 5, False)])
def test_a_rank_needs_a_query_and_a_second_singer(
    unit: NDArray[np.float32], singers: NDArray[np.int64], first: int, second: int, label: bool
) -> None:
    with pytest.raises(ValueError, match="a rank needs"):
        draw_rank_scores(unit, singers, Pairs(np.array([first]), np.array([second]), np.array([label])), seed=0)


def test_a_pair_file_goes_there_and_back(tmp_path: Path) -> None:
    pairs = Pairs(np.array([0, 1]), np.array([2, 0]), np.array([True, False]))
    path, names = str(tmp_path / "pairs.txt"), ["a/1.wav", "a/2.wav", "b/ü #3.wav"]
    write_pair_file(path, pairs, names)
    assert Path(path).read_text(encoding="utf-8") == "1,a/1.wav,b/ü #3.wav\n0,a/2.wav,a/1.wav\n"
    again, missing = pairs_of_names(read_pair_file(path), {"a/1.wav": 0, "b/ü #3.wav": 2})
    assert (again.first.tolist(), again.second.tolist(), again.labels.tolist(), missing) == ([0], [2], [True], 1)


def test_names_with_commas_come_back(tmp_path: Path) -> None:
    names = ["Earth, Wind & Fire/1.wav", 'a "live" take.wav', '"quoted", too.wav']
    path = str(tmp_path / "pairs.txt")
    write_pair_file(path, Pairs(np.array([0, 1]), np.array([1, 2]), np.array([True, False])), names)
    assert read_pair_file(path) == [(True, names[0], names[1]), (False, names[1], names[2])]


@pytest.mark.parametrize("line", ["1,a.wav", "2,a.wav,b.wav", "a.wav,b.wav,1", "1,a.wav,b.wav,c.wav"])
def test_a_bad_pair_file_names_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text(f"1,a.wav,b.wav\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"pairs\.txt line 2: expected label,path1,path2"):
        read_pair_file(str(path))


@pytest.mark.parametrize("content", [None, ""])
def test_no_pairs(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "pairs.txt"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot read|holds no pairs"):
        read_pair_file(str(path))


def test_drawn_pairs(singers: NDArray[np.int64]) -> None:
    pairs = draw_pairs(singers, 20_001, seed=3)
    assert len(pairs) == 20_001
    assert int(pairs.labels.sum()) == 10_000
    assert (pairs.first != pairs.second).all()
    np.testing.assert_array_equal(singers[pairs.first] == singers[pairs.second], pairs.labels)
    # Singers weigh the same, however many crops they have; the one with a single crop has no pair of its own.
    of_one = np.bincount(singers[pairs.first[pairs.labels]], minlength=7)
    assert of_one[6] == 0
    assert of_one[:6].min() > 0.9 * of_one[:6].max()
    of_two = np.bincount(singers[pairs.first[~pairs.labels]], minlength=7)
    assert of_two.min() > 0.85 * of_two.max()


def test_the_same_seed_draws_the_same_pairs(singers: NDArray[np.int64]) -> None:
    one, same, other = (draw_pairs(singers, 100, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.first, same.first)
    assert (one.first != other.first).any()


@pytest.mark.parametrize(
    ("who", "positive", "negative"), [([0, 0, 0], 5, 0), ([0, 1, 2], 0, 5), ([0], 0, 0), ([0, 0, 1], 5, 5)]
)
def test_drawing_from_little(who: list[int], positive: int, negative: int) -> None:
    pairs = draw_pairs(np.array(who), 10, seed=0)
    assert (int(pairs.labels.sum()), int((~pairs.labels).sum())) == (positive, negative)


def test_all_pairs_are_exact_whatever_the_block(
    unit: NDArray[np.float32], singers: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    monkeypatch.setattr(module, "_COMPRESS_AT", 3)
    first, second = np.triu_indices(len(unit), k=1)
    pairs = Pairs(first, second, singers[first] == singers[second])
    found = all_pairs(unit, singers)
    assert found.n_positive + found.n_negative == len(first)
    assert found.eer.rate == pytest.approx(equal_error_rate(pairs.labels, pair_scores(unit, pairs)).rate, abs=SHARE)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2), st.integers(-2, 2)), min_size=3, max_size=24))
def test_all_pairs_with_ties(rows: list[tuple[int, int, int]]) -> None:
    """Few distinct directions, so most scores are tied; rows of zeros too."""
    who = np.array([row[0] for row in rows])
    unit = unit_rows(np.array([row[1:] for row in rows], float))
    first, second = np.triu_indices(len(who), k=1)
    labels = who[first] == who[second]
    if labels.all() or not labels.any():
        with pytest.raises(ValueError, match="two singers"):
            all_pairs(unit, who)
        return
    scores = (unit @ unit.T)[first, second]
    assert all_pairs(unit, who).eer.rate == pytest.approx(equal_error_rate(labels, scores).rate, abs=SHARE)


def test_all_pairs_of_an_encoder_that_says_the_same_of_everything(singers: NDArray[np.int64]) -> None:
    rng = np.random.default_rng(0)
    unit = unit_rows(1 + 1e-5 * rng.standard_normal((len(singers), 8)))
    first, second = np.triu_indices(len(unit), k=1)
    expected = equal_error_rate(singers[first] == singers[second], (unit @ unit.T)[first, second]).rate
    assert all_pairs(unit, singers).eer.rate == pytest.approx(expected, abs=SHARE)


def test_all_pairs_can_leave_some_out(unit: NDArray[np.float32], singers: NDArray[np.int64]) -> None:
    recording = np.arange(len(singers)) // 2
    found = all_pairs(unit, singers, lambda a, b: recording[a, np.newaxis] != recording[np.newaxis, b])
    first, second = np.triu_indices(len(unit), k=1)
    keep = recording[first] != recording[second]
    first, second = first[keep], second[keep]
    expected = equal_error_rate(singers[first] == singers[second], (unit @ unit.T)[first, second]).rate
    assert found.eer.rate == pytest.approx(expected, abs=SHARE)


def test_nan_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        all_pairs(np.full((3, 2), np.nan, np.float32), np.array([0, 0, 1]))


def test_millions_of_pairs_in_seconds() -> None:
    rng = np.random.default_rng(0)
    who = np.arange(2500) % 50
    unit = unit_rows(rng.standard_normal((50, 64))[who] + rng.standard_normal((2500, 64)))
    started = time.process_time()
    found = all_pairs(unit, who)
    assert found.n_positive + found.n_negative == 2500 * 2499 // 2  # 3.1 million
    assert time.process_time() - started < 20
