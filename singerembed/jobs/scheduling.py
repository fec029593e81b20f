"""Which unit goes to a worker next, and what becomes of the units of a worker that died. Knows nothing of Ray.

A unit whose worker dies is handed out again, with all its recordings decoded in processes beside the worker: a decoder
that crashes then costs a row. If its workers die all the same, it gets a worker to itself, and its tracks are tried one
at a time; a track that takes several workers with it, each time alone, becomes an error row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from singerembed.catalog.read import Track, Unit
from singerembed.errors import ClusterError, TrackError

# A node that leaves takes units with it that are not to blame, more than once on a bad day.
DEATHS_BEFORE_TRIALS = 3
DEATHS_OF_A_TRACK = 3


@dataclass(eq=False)
class Order:
    """A unit on its way: to be embedded and published, or, in a trial, one of its tracks to be tried."""

    unit: Unit
    positions: Sequence[int]  # of its tracks, those to embed
    deaths: int = 0  # of workers that had it in hand
    trial: int | None = None  # which of `positions` is tried
    trial_deaths: int = 0
    tried: bool = False  # all of them were

    @property
    def careful(self) -> bool:
        """Decode in processes beside the worker."""
        return self.deaths > 0

    @property
    def alone(self) -> bool:
        """Give it to a worker that has nothing else in hand, and one track at a time."""
        return self.deaths >= DEATHS_BEFORE_TRIALS

    @property
    def track(self) -> Track:
        """The track that is tried."""
        assert self.trial is not None
        return self.unit.tracks[self.positions[self.trial]]


class Orders:
    """Hands out the units of `work`, and takes back what was not finished."""

    def __init__(self, work: Iterator[tuple[Unit, Sequence[int]]]) -> None:
        self._work = work
        self._again: deque[Order] = deque()
        self._to_be_alone: deque[Order] = deque()
        self._exhausted = False

    @property
    def waiting_alone(self) -> int:
        """How many orders wait for a worker to themselves."""
        return len(self._to_be_alone)

    @property
    def all_given(self) -> bool:
        """Whether nothing waits to be handed out."""
        return self._exhausted and not self._again and not self._to_be_alone

    def next(self, *, alone: bool = False) -> Order | None:
        """The next order, one that has to be alone or one that has not; None: there is none now."""
        if alone:
            return self._to_be_alone.popleft() if self._to_be_alone else None
        if self._again:
            return self._again.popleft()
        for unit, positions in self._work:
            return Order(unit, positions)
        self._exhausted = True
        return None

    def finished(self, order: Order) -> bool:
        """Take note that a worker did what it was told; returns whether the unit is published."""
        if order.trial is None:
            return True
        self._try_next(order)
        return False

    def failed(self, order: Order) -> None:
        """Take note that a worker died with `order` in hand. Raises ClusterError where nothing helps."""
        order.deaths += 1
        if order.trial is not None:
            order.trial_deaths += 1
            if order.trial_deaths < DEATHS_OF_A_TRACK:
                self._to_be_alone.append(order)
                return
            message = f"{DEATHS_OF_A_TRACK} worker processes died while they embedded nothing but this"
            order.unit.tracks[order.positions[order.trial]] = replace(
                order.track, problem=TrackError("worker_died", message)
            )
            self._try_next(order)
        elif not order.alone:
            self._again.append(order)
        elif not order.tried:
            order.trial = 0
            self._to_be_alone.append(order)
        elif order.trial_deaths < DEATHS_OF_A_TRACK:
            order.trial_deaths += 1
            self._to_be_alone.append(order)
        else:
            tracks = order.unit.tracks
            raise ClusterError(
                f"unit {order.unit.index + 1:,} (rows {tracks[0].row:,} to {tracks[-1].row:,} of the catalogue) takes "
                "down every worker that embeds it, and none of its tracks does so alone. Is there memory enough? "
                "Finished units are safe; the same command goes on from here"
            )

    def _try_next(self, order: Order) -> None:
        assert order.trial is not None
        order.trial, order.trial_deaths = order.trial + 1, 0
        if order.trial == len(order.positions):
            order.trial, order.tried = None, True
        self._to_be_alone.append(order)
