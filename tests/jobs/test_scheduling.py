"""What becomes of units whose workers die."""

from __future__ import annotations

import pyarrow as pa
import pytest

from singerembed.catalog.read import Track, Unit
from singerembed.errors import ClusterError
from singerembed.jobs.scheduling import DEATHS_BEFORE_TRIALS, DEATHS_OF_A_TRACK, Order, Orders


def unit(index: int, tracks: int = 3) -> Unit:
    rows = range(index * tracks + 1, index * tracks + tracks + 1)
    return Unit(index, [Track(row, f"t{row}", f"{row}.wav", f"{row}.wav") for row in rows], pa.table({}))


def orders(n: int) -> Orders:
    return Orders((unit(i), range(3)) for i in range(n))


def take(from_: Orders, *, alone: bool = False) -> Order:
    order = from_.next(alone=alone)
    assert order is not None
    return order


def test_units_are_handed_out_once_and_in_order() -> None:
    given = orders(3)
    assert [take(given).unit.index for _ in range(3)] == [0, 1, 2]
    assert not given.all_given  # it is not known yet that there is no fourth
    assert given.next() is None
    assert given.all_given


def test_a_unit_whose_worker_died_goes_first_and_carefully() -> None:
    given = orders(3)
    first = take(given)
    assert not first.careful
    given.failed(first)
    again = take(given)
    assert (again, again.careful, again.alone) == (first, True, False)
    assert given.finished(again)
    assert take(given).unit.index == 1


def condemn(given: Orders, order: Order, killer: int | None) -> list[int]:
    """Play workers that die of the whole unit, and of track `killer` alone; returns the tracks that were tried."""
    tried = []
    for _ in range(DEATHS_BEFORE_TRIALS):
        given.failed(order)
        if not order.alone:
            assert take(given) is order
    while order.trial is not None:
        assert given.waiting_alone == 1
        assert not given.all_given
        assert take(given, alone=True) is order
        tried.append(order.track.row)
        if order.trial == killer:
            given.failed(order)
        else:
            assert not given.finished(order)
    return tried


def test_a_killer_is_found_by_trials_and_costs_itself_only() -> None:
    given = orders(1)
    order = take(given)
    assert condemn(given, order, killer=1) == [1, *[2] * DEATHS_OF_A_TRACK, 3]
    problems = [track.problem for track in order.unit.tracks]
    assert problems[0] is problems[2] is None
    assert problems[1] is not None
    assert problems[1].code == "worker_died"
    assert take(given, alone=True) is order
    assert given.finished(order)
    assert given.next() is None
    assert given.all_given


def test_a_track_that_survives_a_trial_at_last_is_innocent() -> None:
    given = orders(1)
    order = take(given)
    for _ in range(DEATHS_BEFORE_TRIALS):
        given.failed(order)
        if not order.alone:
            take(given)
    for _ in range(DEATHS_OF_A_TRACK - 1):
        given.failed(take(given, alone=True))
    assert not given.finished(take(given, alone=True))
    assert order.trial == 1
    given.failed(take(given, alone=True))
    assert order.unit.tracks[1].problem is None


def test_a_unit_that_kills_only_as_a_whole_ends_the_run() -> None:
    given = orders(1)
    order = take(given)
    condemn(given, order, killer=None)
    with pytest.raises(ClusterError, match=r"unit 1 \(rows 1 to 3 .* Is there memory enough"):
        for _ in range(10):
            given.failed(take(given, alone=True))


def test_others_go_on_while_one_waits_to_be_alone() -> None:
    given = orders(2)
    order = take(given)
    for _ in range(DEATHS_BEFORE_TRIALS):
        given.failed(order)
        if not order.alone:
            take(given)
    assert take(given).unit.index == 1
    assert given.next() is None
    assert given.waiting_alone == 1
