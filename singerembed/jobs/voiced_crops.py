"""The order in which crops of a track are separated where only some of them are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from singerembed.audio.crops import spaced_indices


def crops_with_voice(n_crops: int, count: int, found: Callable[[], int], put_off: Mapping[int, float]) -> Iterator[int]:
    """Yield the indices of `count` crops of `n_crops`, evenly spaced, and further ones until `found()` reaches `count`.

    The further ones lie between, at twice the density. Whoever looks at a crop may put it off, with a score: where the
    others are too few, those are yielded again at the end, the highest score first, until `patience(count)` of them in
    a row have not raised `found()`.
    """
    count = min(count, n_crops)
    first = spaced_indices(n_crops, count)
    yield from first
    for index in spaced_indices(n_crops, 2 * count):
        if found() >= count:
            return
        if index not in first:
            yield index
    in_vain = 0
    for index in sorted(put_off, key=lambda index: (-put_off[index], index)):
        if found() >= count or in_vain == patience(count):
            return
        before = found()
        yield index
        in_vain = 0 if found() > before else in_vain + 1


def patience(count: int) -> int:
    """How many crops that seem to hold no voice are separated in vain, one after another, where `count` are wanted."""
    return max(2, count // 2)
