"""Check credits: is each track sung by the singer it is credited to?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from singerembed import storage
from singerembed.errors import InputError, UsageError
from singerembed.search.calibration import (
    MIN_SINGERS,
    Calibration,
    Floats,
    calibrate,
    chance,
    draw_trials,
    own_scores,
    singer_numbers,
    singer_sums,
)
from singerembed.search.store import INDEX_COLUMNS, StoredIndex, Vectors, singer_name
from singerembed.search.voices import chance_of_two_voices

CHECKED, TOO_FEW, UNCREDITED = "checked", "too few tracks", "no singer"
DEFAULT_SINGER_COLUMN = "singer"
MIN_TRACKS = 3  # of a singer: the track itself, and two to compare it with
_BLOCK = 2048  # tracks that are compared with all singers at a time


@dataclass(frozen=True)
class Credits:
    """The n tracks of a library against their credits. NaN, or -1, where a track was not checked."""

    track: NDArray[np.int64]  # [n], number in the index
    track_id: list[str]
    path: list[str]
    singer: NDArray[np.int64]  # [n], credited; -1: none
    status: list[str]  # CHECKED, TOO_FEW or UNCREDITED
    score: Floats  # [n], against the other tracks of the credited singer
    llr: Floats  # [n], log likelihood ratio of the credited singer against any other, or nobody of the library
    other: NDArray[np.int64]  # [n], the nearest other singer
    other_score: Floats  # [n]
    other_llr: Floats  # [n]
    two_voices: Floats  # [n], chance that more than one voice is heard; NaN with too few crops

    @property
    def chance(self) -> Floats:
        """Chance that the credit is right, at even odds, [n]."""
        return chance(self.llr)


@dataclass(frozen=True)
class Verification:
    """What `verify_credits` found."""

    credits: Credits
    singers: list[str]  # names of the numbers in `credits`
    calibration: Calibration
    too_few: list[str]  # singers with fewer than MIN_TRACKS tracks

    @property
    def n_checked(self) -> int:
        """How many credits could be checked."""
        return int(np.isfinite(self.credits.llr).sum())

    def suspects(self, max_chance: float) -> NDArray[np.int64]:
        """Rows of `credits` whose credit has at most that chance, the least likely first."""
        found = np.flatnonzero(self.credits.chance <= max_chance)
        return np.asarray(found[np.argsort(self.credits.llr[found], kind="stable")])

    def divided(self, min_chance: float) -> NDArray[np.int64]:
        """Rows of `credits` with at least that chance of more than one voice, the likeliest first."""
        found = np.flatnonzero(self.credits.two_voices >= min_chance)
        return np.asarray(found[np.argsort(-self.credits.two_voices[found], kind="stable")])


def verify_credits(index: StoredIndex, singer_column: str | None = None) -> Verification:
    """Compare each track with the other tracks of its credited singer, and with all other singers.

    `singer_column`: the column of `index` with the credits; default: its column of singers. Raises
    UsageError where there is no such column, InputError where too few singers have tracks enough to calibrate on.
    """
    singer_column = singer_column or index.singer_column or DEFAULT_SINGER_COLUMN
    if singer_column not in index.tracks.column_names:
        others = [name for name in index.tracks.column_names if name not in {*INDEX_COLUMNS, "track_id", "path"}]
        raise UsageError(
            f'there is no column "{singer_column}"; there are: {", ".join(others) or "none of the catalogue"}. Name '
            "the column of credits with --singer-column"
        )
    track = np.flatnonzero(index.active)
    column = index.tracks[singer_column].take(pa.array(track)).to_pylist()
    singers, singer = singer_numbers([singer_name(name) for name in column])
    vectors = index.vectors["tracks"].take(track)
    counts = np.bincount(singer[singer >= 0], minlength=len(singers))
    enough = (singer >= 0) & (counts[np.maximum(singer, 0)] >= MIN_TRACKS) if len(singers) else singer >= 0
    compared = np.where(enough, singer, -1)
    total = singer_sums(vectors, compared, len(singers))
    fitted = calibrate(draw_trials(vectors, compared, total)) if enough.any() else None
    if fitted is None:
        n_singers = int((counts >= MIN_TRACKS).sum())
        if n_singers < MIN_SINGERS:
            raise InputError(
                f"too few labels to calibrate on: {n_singers} singers have {MIN_TRACKS} tracks or more, {MIN_SINGERS} "
                "are needed"
            )
        raise InputError(
            f"nothing to calibrate on: tracks are no more like others of their {n_singers} singers than like others. "
            "Are the credits those of the recordings?"
        )
    score = own_scores(vectors, compared, total)
    other, other_score, others_llr = _nearest_others(vectors, singer, total, fitted)
    found = Credits(
        track=track,
        track_id=index.tracks["track_id"].take(pa.array(track)).to_pylist(),
        path=index.tracks["path"].take(pa.array(track)).to_pylist(),
        singer=singer,
        status=[CHECKED if e else UNCREDITED if s < 0 else TOO_FEW for e, s in zip(enough, singer, strict=True)],
        score=score,
        llr=fitted.llr(score) - others_llr,
        other=other,
        other_score=other_score,
        other_llr=fitted.llr(other_score),
        two_voices=chance_of_two_voices(index, track, singer),
    )
    return Verification(found, singers, fitted, [singers[i] for i in np.flatnonzero(counts < MIN_TRACKS)])


def _nearest_others(
    vectors: Vectors, singer: NDArray[np.int64], total: Vectors, calibration: Calibration
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Compare tracks with all singers but the credited one; singers without a profile are left out.

    Returns the nearest of them, the score, and the logarithm of the mean likelihood ratio of all of them and of nobody,
    whose ratio is 1. Credits are weighed against that mean: measured on swapped credits (docs/search.md), it finds more
    of them than the credited singer's own ratio.
    """
    length = np.linalg.norm(total, axis=1)
    unit = total / np.maximum(length, 1e-6)[:, np.newaxis]
    best, score, mean = np.empty(len(vectors), np.int64), np.empty(len(vectors)), np.empty(len(vectors))
    for first in range(0, len(vectors), _BLOCK):
        part = slice(first, first + _BLOCK)
        found = vectors[part] @ unit.T
        found[:, length < 1e-6] = -np.inf
        credited = np.flatnonzero(singer[part] >= 0)
        found[credited, singer[part][credited]] = -np.inf
        best[part] = found.argmax(axis=1)
        score[part] = found.max(axis=1)
        ratio = np.exp(calibration.llr(found))
        mean[part] = np.log((1 + ratio.sum(axis=1)) / (1 + np.isfinite(found).sum(axis=1)))
    return best, score, mean


def check_table_path(path: str) -> None:
    """Raise UsageError where a table at `path` would replace another file than an earlier table of credits."""
    if storage.is_remote(path) or not Path(path).exists():
        return
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowException, OSError):
        names = []
    if "llr" not in names:
        raise UsageError(f"{path} is there, and is no table of verify: it would be replaced. Give -o another name")


def write_credits(found: Verification, path: str, max_chance: float) -> None:
    """Write a row a track to the Parquet file `path`. Raises OutputError."""
    credits = found.credits
    suspect = np.zeros(len(credits.track), bool)
    suspect[found.suspects(max_chance)] = True
    names = np.array([*found.singers, None], object)

    def number(values: Floats) -> pa.Array:
        return pa.array(values, pa.float64(), mask=~np.isfinite(values))

    table = pa.table(
        {
            "track_id": credits.track_id,
            "path": credits.path,
            "credited": pa.array(names[credits.singer], pa.string()),
            "status": credits.status,
            "suspect": suspect,
            "chance": number(credits.chance),
            "llr": number(credits.llr),
            "score": number(credits.score),
            "nearest_other": pa.array(names[credits.other], pa.string()),
            "nearest_other_llr": number(credits.other_llr),
            "nearest_other_score": number(credits.other_score),
            "two_voices_chance": number(credits.two_voices),
        }
    )
    with storage.writing(path), storage.publishing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
