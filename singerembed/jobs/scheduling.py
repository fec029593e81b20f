"""Schedule units on worker processes, and reschedule the units of a worker that died. Independent of Ray.

A unit whose worker dies is assigned again, with all its recordings decoded in separate processes: a decoder that
crashes then costs a row. If its workers still die, it gets a worker to itself, and its tracks are tried one at a time;
a track that crashes several workers, each time alone, becomes an error row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from singerembed.catalog.read import Track, Unit
from singerembed.errors import ClusterError, TrackError

# Nodes that leave a cluster lose units that are not to blame, and may do so more than once.
DEATHS_BEFORE_TRIALS = 3
DEATHS_OF_A_TRACK = 3


@dataclass(eq=False)
class Assignment:
    """A unit to be embedded and published or, in a trial, one of its tracks to be tried."""

    unit: Unit
    positions: Sequence[int]  # of its tracks, those to embed
    deaths: int = 0  # of workers that were embedding it
    trial: int | None = None  # which of `positions` is tried
    trial_deaths: int = 0
    tried: bool = False  # all of them were

    @property
    def careful(self) -> bool:
        """Whether to decode in separate processes."""
        return self.deaths > 0

    @property
    def alone(self) -> bool:
        """Whether it needs a worker that does nothing else, one track at a time."""
        return self.deaths >= DEATHS_BEFORE_TRIALS

    @property
    def track(self) -> Track:
        """The track that is tried."""
        assert self.trial is not None
        return self.unit.tracks[self.positions[self.trial]]


class Scheduler:
    """Assigns the units of `work` to workers, and reassigns those that were not finished."""

    def __init__(self, work: Iterator[tuple[Unit, Sequence[int]]]) -> None:
        self._work = work
        self._again: deque[Assignment] = deque()
        self._to_be_alone: deque[Assignment] = deque()
        self._exhausted = False

    @property
    def waiting_alone(self) -> int:
        """How many assignments wait for a worker that does nothing else."""
        return len(self._to_be_alone)

    @property
    def all_given(self) -> bool:
        """Whether nothing waits to be assigned."""
        return self._exhausted and not self._again and not self._to_be_alone

    def next(self, *, alone: bool = False) -> Assignment | None:
        """The next assignment, one that must run alone or one that need not; None if there is none now."""
        if alone:
            return self._to_be_alone.popleft() if self._to_be_alone else None
        if self._again:
            return self._again.popleft()
        for unit, positions in self._work:
            return Assignment(unit, positions)
        self._exhausted = True
        return None

    def finished(self, assignment: Assignment) -> bool:
        """Record that a worker finished `assignment`; return whether the unit is published."""
        if assignment.trial is None:
            return True
        self._try_next(assignment)
        return False

    def failed(self, assignment: Assignment) -> None:
        """Record that a worker died while it embedded `assignment`. Raises ClusterError where no retry is left."""
        assignment.deaths += 1
        if assignment.trial is not None:
            assignment.trial_deaths += 1
            if assignment.trial_deaths < DEATHS_OF_A_TRACK:
                self._to_be_alone.append(assignment)
                return
            message = f"{DEATHS_OF_A_TRACK} worker processes died while they embedded nothing but this"
            assignment.unit.tracks[assignment.positions[assignment.trial]] = replace(
                assignment.track, problem=TrackError("worker_died", message)
            )
            self._try_next(assignment)
        elif not assignment.alone:
            self._again.append(assignment)
        elif not assignment.tried:
            assignment.trial = 0
            self._to_be_alone.append(assignment)
        elif assignment.trial_deaths < DEATHS_OF_A_TRACK:
            assignment.trial_deaths += 1
            self._to_be_alone.append(assignment)
        else:
            tracks = assignment.unit.tracks
            raise ClusterError(
                f"unit {assignment.unit.index + 1:,} (rows {tracks[0].row:,} to {tracks[-1].row:,} of the catalogue) "
                "crashes every worker that embeds it, and none of its tracks does so alone. Is there memory enough? "
                "Finished units are safe; the same command goes on from here"
            )

    def _try_next(self, assignment: Assignment) -> None:
        assert assignment.trial is not None
        assignment.trial, assignment.trial_deaths = assignment.trial + 1, 0
        if assignment.trial == len(assignment.positions):
            assignment.trial, assignment.tried = None, True
        self._to_be_alone.append(assignment)
