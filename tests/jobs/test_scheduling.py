"""What becomes of units whose workers die."""

from __future__ import annotations

import pyarrow as pa
import pytest

from singerembed.catalog.read import Track, Unit
from singerembed.errors import ClusterError
from singerembed.jobs.scheduling import DEATHS_BEFORE_TRIALS, DEATHS_OF_A_TRACK, Assignment, Scheduler


def unit(index: int, tracks: int = 3) -> Unit:
    rows = range(index * tracks + 1, index * tracks + tracks + 1)
    return Unit(index, [Track(row, f"t{row}", f"{row}.wav", f"{row}.wav") for row in rows], pa.table({}))


def scheduler(n: int) -> Scheduler:
    return Scheduler((unit(i), range(3)) for i in range(n))


def take(from_: Scheduler, *, alone: bool = False) -> Assignment:
    assignment = from_.next(alone=alone)
    assert assignment is not None
    return assignment


def test_units_are_handed_out_once_and_in_order() -> None:
    given = scheduler(3)
    assert [take(given).unit.index for _ in range(3)] == [0, 1, 2]
    assert not given.all_given  # it is not known yet that there is no fourth
    assert given.next() is None
    assert given.all_given


def test_a_unit_whose_worker_died_goes_first_and_carefully() -> None:
    given = scheduler(3)
    first = take(given)
    assert not first.careful
    given.failed(first)
    again = take(given)
    assert (again, again.careful, again.alone) == (first, True, False)
    assert given.finished(again)
    assert take(given).unit.index == 1


def condemn(given: Scheduler, assignment: Assignment, killer: int | None) -> list[int]:
    """Play workers that die of the whole unit, and of track `killer` alone; returns the tracks that were tried."""
    tried = []
    for _ in range(DEATHS_BEFORE_TRIALS):
        given.failed(assignment)
        if not assignment.alone:
            assert take(given) is assignment
    while assignment.trial is not None:
        assert given.waiting_alone == 1
        assert not given.all_given
        assert take(given, alone=True) is assignment
        tried.append(assignment.track.row)
        if assignment.trial == killer:
            given.failed(assignment)
        else:
            assert not given.finished(assignment)
    return tried


def test_a_killer_is_found_by_trials_and_costs_itself_only() -> None:
    given = scheduler(1)
    assignment = take(given)
    assert condemn(given, assignment, killer=1) == [1, *[2] * DEATHS_OF_A_TRACK, 3]
    problems = [track.problem for track in assignment.unit.tracks]
    assert problems[0] is problems[2] is None
    assert problems[1] is not None
    assert problems[1].code == "worker_died"
    assert take(given, alone=True) is assignment
    assert given.finished(assignment)
    assert given.next() is None
    assert given.all_given


def test_a_track_that_survives_a_trial_at_last_is_innocent() -> None:
    given = scheduler(1)
    assignment = take(given)
    for _ in range(DEATHS_BEFORE_TRIALS):
        given.failed(assignment)
        if not assignment.alone:
            take(given)
    for _ in range(DEATHS_OF_A_TRACK - 1):
        given.failed(take(given, alone=True))
    assert not given.finished(take(given, alone=True))
    assert assignment.trial == 1
    given.failed(take(given, alone=True))
    assert assignment.unit.tracks[1].problem is None


def test_a_unit_that_kills_only_as_a_whole_ends_the_run() -> None:
    given = scheduler(1)
    assignment = take(given)
    condemn(given, assignment, killer=None)
    with pytest.raises(ClusterError, match=r"unit 1 \(rows 1 to 3 .* Is there memory enough"):
        for _ in range(10):
            given.failed(take(given, alone=True))


def test_others_go_on_while_one_waits_to_be_alone() -> None:
    given = scheduler(2)
    assignment = take(given)
    for _ in range(DEATHS_BEFORE_TRIALS):
        given.failed(assignment)
        if not assignment.alone:
            take(given)
    assert take(given).unit.index == 1
    assert given.next() is None
    assert given.waiting_alone == 1
