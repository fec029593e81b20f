"""Groups of recordings that pairs are drawn from: those of one recording, or of one singer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from singerembed.errors import UsageError
from training.recordings import Recording


def recording_numbers(recordings: Sequence[Recording]) -> NDArray[np.int64]:
    """Return the number of the recording that each is a stretch of, int64 [n]."""
    numbers: dict[str, int] = {}
    names = (each.recording or f"\0{i}" for i, each in enumerate(recordings))
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def groups(recordings: Sequence[Recording], *, by_singer: bool) -> list[list[int]]:
    """Return the groups that pairs are drawn from, as indices: stretches of a recording, or all of a singer."""
    if not by_singer:
        of_recording: dict[int, list[int]] = defaultdict(list)
        for index, number in enumerate(recording_numbers(recordings).tolist()):
            of_recording[number].append(index)
        return list(of_recording.values())
    members: dict[str, list[int]] = defaultdict(list)
    for index, recording in enumerate(recordings):
        members[recording.singer].append(index)
    if len(members) in {1, len(recordings)}:
        raise UsageError(
            f"pairs of singers need several singers with several recordings each; there are {len(recordings)} "
            f"recordings of {len(members)} singers. Put each singer's into a folder, or use --set data.pairs=recording"
        )
    return list(members.values())
