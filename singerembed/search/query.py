"""Look recordings up in an index: nearest tracks, nearest singers, and where in them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from singerembed import storage
from singerembed.engine.base import Engine
from singerembed.engine.embedder import Embedder
from singerembed.engine.separation import Separation
from singerembed.errors import MissingDependencyError, UsageError
from singerembed.search.calibration import Calibration
from singerembed.search.nearest import nearest, read_quantised
from singerembed.search.recording import (
    QueryCrops,
    embed_recording,
    embed_separated,
    note_on_length,
    open_engine_of,
    open_separation_of,
)
from singerembed.search.store import INDEX_COLUMNS, MIN_LENGTH, StoredIndex, Vectors, track_vector

BY = ("track", "crop")
_MATCHES = 2  # pairs of crops that are named for a track
# Crops that are looked up for each crop of a query before tracks are ranked by them: several may be of one track.
_CROPS_A_TRACK = 20
# That a query is sung by somebody in the index at all; each of its singers is then as likely as the other.
PRIOR_KNOWN = 0.5


@dataclass(frozen=True)
class Match:
    """A crop of the query and the crop of a track that is like it."""

    query_seconds: float
    track_seconds: float
    score: float


@dataclass(frozen=True)
class FoundTrack:
    """A track of the answer."""

    score: float  # -1 to 1
    track_id: str
    path: str
    singer: str  # empty if not known
    matches: list[Match]  # the most similar pairs of crops, in order of time
    also: list[str]  # paths of further copies of the same recording
    number: int  # of the track in the index, from 0


@dataclass(frozen=True)
class FoundSinger:
    """A singer of the answer."""

    score: float  # of the query against the singer's tracks together, -1 to 1
    chance: float | None  # that this singer sings the query, see `Index.search`; None: the index is not calibrated
    singer: str
    n_tracks: int


@dataclass(frozen=True)
class Answer:
    """The result of one query, best first."""

    tracks: list[FoundTrack]
    singers: list[FoundSinger]
    note: str = ""  # what a person should know of the query; empty: nothing

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON types."""
        return asdict(self)


class Index:
    """An index of vectors, opened for queries. Read-only, and the same query always gets the same answer."""

    def __init__(self, path: str, engine: str | None = None, separator: str | None = None) -> None:
        """Open the index at `path`; `engine`: file of the engine it was made with (None: the bundled one).

        `separator`: file of the separator that its voices came out of, if any did. Both are opened when they are first
        needed. Raises InputError and OutputError.
        """
        self.stored = StoredIndex(path)
        self._engine_path, self._separator_path = engine, separator
        self._quantised: dict[str, Any] = {}

    @cached_property
    def engine(self) -> Engine:
        """The engine, which is the one the index was made with."""
        return open_engine_of(self.stored, self._engine_path)

    @cached_property
    def separation(self) -> Separation | None:
        """The separator, which is the one that the index's voices came out of; None where none did."""
        return open_separation_of(self.stored, self._separator_path, self.engine.spec)

    @cached_property
    def calibration(self) -> Calibration | None:
        """From scores against singers to likelihood ratios; None where the index has too few labelled tracks."""
        fields = self.stored.manifest.get("calibration")
        return Calibration(**fields) if fields else None

    def quantised(self, kind: str) -> Any | None:
        """The quantised vectors of "tracks" or "crops", read once; None where there are few enough to compare all."""
        name = self.stored.manifest["quantised"].get(kind)
        if name is not None and kind not in self._quantised:
            self._quantised[kind] = read_quantised(self.stored.folder / name)
        return self._quantised.get(kind)

    def search(
        self, audio: NDArray[Any], sample_rate: int, *, top: int = 10, by: str = "track", where: str | None = None
    ) -> Answer:
        """Look up audio, [samples] or [samples, channels], int16 or float with full scale 1.

        `sample_rate`: Hz. `top`: number of tracks, and of singers. `by`: rank by the mean over crops ("track"), or by
        the one crop that is most similar ("crop"). `where`: a condition in SQL on the columns of tracks. A singer's
        chance supposes that the query is sung by one of the index's singers in one case of two, each as likely
        as the other. Raises ValueError for unfit or silent audio.
        """
        if self.separation:
            query = embed_separated(audio, sample_rate, self.engine, self.separation)
            return self.search_crops(query, top=top, by=by, where=where)
        embedding = Embedder(self.engine).embed(audio, sample_rate)
        loud = ~np.isnan(embedding).any(axis=1)
        if not loud.any():
            raise ValueError("the audio is silent")
        start = np.asarray(np.flatnonzero(loud) * self.engine.spec.crop_seconds, np.float64)
        note = note_on_length("the audio", len(audio) / sample_rate, self.engine.spec)
        return self.search_crops(QueryCrops(note, start, embedding[loud]), top=top, by=by, where=where)

    def search_file(self, path: str, *, top: int = 10, by: str = "track", where: str | None = None) -> Answer:
        """Look up the recording `path`; arguments as `search`. Raises InputError if it cannot be looked up."""
        query = embed_recording(storage.local_path(path), self.engine, self.separation, name=path)
        return self.search_crops(query, top=top, by=by, where=where)

    def search_track(self, track_id: str, *, top: int = 10, by: str = "track", where: str | None = None) -> Answer:
        """Look up a track of the index, by its id or its path, among the others; its copies are left out.

        Raises UsageError where there is none.
        """
        ids, paths = self.stored.tracks["track_id"], self.stored.tracks["path"]
        named = [np.flatnonzero(pc.equal(column, track_id).to_numpy()) for column in (ids, paths)]
        found = [number for number in np.concatenate(named).tolist() if number not in self._replaced]
        if not found:
            raise UsageError(
                f'{self.stored.folder} has no track of the id or path "{track_id}"; the first is "{ids[0].as_py()}", '
                f"{paths[0].as_py()}"
            )
        same_as = self.stored.tracks["same_as"][found[0]].as_py()
        number = found[0] if same_as is None else same_as
        part = self.stored.crops_of(number)
        start = self.stored.crops["start"].slice(part.start, part.stop - part.start).to_numpy()
        return self._answer(self._crops_of(number), start, top, by, where, number)

    def search_crops(self, query: QueryCrops, *, top: int = 10, by: str = "track", where: str | None = None) -> Answer:
        """Look up embedded crops; arguments as `search`."""
        found = self._answer(self.stored.scoring.vectors(query.embedding), query.start, top, by, where, None)
        return replace(found, note=query.note)

    def _answer(
        self, crops: Vectors, start: NDArray[np.float64], top: int, by: str, where: str | None, itself: int | None
    ) -> Answer:
        allowed = self.stored.active.copy()
        if where is not None:
            allowed &= self._satisfying(where)
        if itself is not None:
            allowed[itself] = False
        whole = track_vector(crops)
        find = self._by_track if by == "track" else self._by_crop
        ranked = find(whole if by == "track" else crops, top, allowed)
        tracks = [self._found_track(number, score, crops, start) for number, score in ranked]
        return Answer(tracks, self._singers(whole, top, itself))

    def _crops_of(self, number: int) -> Vectors:
        part = self.stored.crops_of(number)
        return self.stored.vectors["crops"].take(np.arange(part.start, part.stop))

    def _by_track(self, whole: Vectors, top: int, allowed: NDArray[np.bool_]) -> list[tuple[int, float]]:
        vectors = self.stored.vectors["tracks"]
        rows, scores = nearest(vectors, whole[np.newaxis], top, allowed, self.quantised("tracks"))
        return [(int(row), float(score)) for row, score in zip(rows[0], scores[0], strict=True) if row >= 0]

    def _by_crop(self, crops: Vectors, top: int, allowed: NDArray[np.bool_]) -> list[tuple[int, float]]:
        of_crop = self.stored.track_of_crop
        vectors = self.stored.vectors["crops"]
        rows, scores = nearest(vectors, crops, top * _CROPS_A_TRACK, allowed[of_crop], self.quantised("crops"))
        best: dict[int, float] = {}
        for row, score in zip(rows.ravel(), scores.ravel(), strict=True):
            if row >= 0:
                track = int(of_crop[row])
                best[track] = max(float(score), best.get(track, -2.0))
        return sorted(best.items(), key=lambda item: (-item[1], item[0]))[:top]

    def _found_track(self, number: int, score: float, crops: Vectors, start: NDArray[np.float64]) -> FoundTrack:
        row = self.stored.tracks.slice(number, 1)
        return FoundTrack(
            _rounded(score), row["track_id"][0].as_py(), row["path"][0].as_py(), self.stored.singer(number),
            self._matches(number, crops, start), self._copies.get(number, []), number,
        )  # fmt: skip

    def _matches(self, number: int, crops: Vectors, start: NDArray[np.float64], n: int = _MATCHES) -> list[Match]:
        """Return the `n` most similar pairs of crops of a query and of track `number`, no crop twice."""
        part = self.stored.crops_of(number)
        # float16 rounds the length of a vector: the score of a crop with itself may come out above 1.
        score = crops @ self._crops_of(number).T
        times = self.stored.crops["start"].slice(part.start, part.stop - part.start).to_numpy()
        found = []
        for _ in range(min(n, *score.shape)):
            a, b = np.unravel_index(int(score.argmax()), score.shape)
            found.append(Match(float(start[a]), float(times[b]), _rounded(score[a, b])))
            score[a, :] = score[:, b] = -np.inf
        return sorted(found, key=lambda match: match.query_seconds)

    def _singers(self, whole: Vectors, top: int, itself: int | None) -> list[FoundSinger]:
        if self.stored.singer_column is None:
            return []
        profiles = self.stored.profiles
        score, counts = profiles.scores(whole[np.newaxis])[0], profiles.n_tracks
        own = self.stored.singer(itself) if itself is not None else ""
        if own:
            number = profiles.names.index(own)
            rest = profiles.total[number] - self.stored.vectors["tracks"].take(np.array([itself]))[0]
            score[number] = rest @ whole / max(float(np.linalg.norm(rest)), MIN_LENGTH)
            counts = counts.copy()
            counts[number] -= 1
        score[counts == 0] = -1.0
        chances = self.chances(score[np.newaxis], counts)
        order = [i for i in np.argsort(-score, kind="stable")[:top] if counts[i] > 0]
        return [
            FoundSinger(
                _rounded(score[i]), None if chances is None else float(chances[0, i]), profiles.names[i], int(counts[i])
            )
            for i in order
        ]

    def chances(self, score: NDArray[Any], counts: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """Return the chance of each singer from scores [queries, singers]; None where the index is not calibrated.

        `counts`: tracks of each singer, [singers] or [queries, singers]; those without any are not in the index.

        """
        if self.calibration is None:
            return None
        ratios = self.calibration.ratios(score)
        here = np.broadcast_to(counts, score.shape) > 0
        np.multiply(ratios, here, out=ratios)
        return chances_of(ratios, ratios.sum(axis=1, keepdims=True), here.sum(axis=1, keepdims=True))

    @cached_property
    def _replaced(self) -> set[int]:
        return set(self.stored.manifest["replaced"])

    @cached_property
    def _copies(self) -> dict[int, list[str]]:
        """Paths of further copies, by the number of the track that counts."""
        found: dict[int, list[str]] = {}
        same_as = self.stored.tracks["same_as"]
        copies = np.flatnonzero(same_as.is_valid().to_numpy())
        for number in copies.tolist():
            if number not in self._replaced:
                path = self.stored.tracks["path"][number].as_py()
                found.setdefault(same_as[number].as_py(), []).append(path)
        return found

    def _satisfying(self, where: str) -> NDArray[np.bool_]:
        """Which tracks satisfy a condition in SQL."""
        try:
            import duckdb
        except ImportError as exc:
            raise MissingDependencyError("--where", "duckdb", "search") from exc
        names = [name for name in self.stored.tracks.column_names if name not in INDEX_COLUMNS]
        number = "row" + "_" * max(map(len, names))  # which none of them is called
        rows = np.arange(self.stored.tracks.num_rows)
        table = self.stored.tracks.select(names).append_column(number, [rows])
        connection = duckdb.connect(config={"enable_external_access": "false"})
        try:
            found = connection.from_arrow(table).filter(where).project(number).fetchnumpy()
        except duckdb.Error as exc:
            first = str(exc).strip().splitlines()[0]
            raise UsageError(f"--where {where}: {first}. Columns: {', '.join(names)}") from exc
        mask = np.zeros(len(rows), bool)
        mask[found[number].astype(np.int64)] = True
        return mask


def chances_of(ratios: NDArray[np.float64], total: NDArray[np.float64], n_singers: Any) -> NDArray[np.float64]:
    """Return the chances of singers from their likelihood ratios, and from the sum of all singers' ratios, `total`.

    That the query is sung by somebody in the index has the prior chance PRIOR_KNOWN, shared equally by its `n_singers`
    singers; that it is sung by nobody in it has the rest, and the likelihood ratio 1. The shapes are broadcast.
    """
    prior = PRIOR_KNOWN / np.maximum(1, n_singers)
    return np.asarray(ratios * prior / (total * prior + 1 - PRIOR_KNOWN))


def _rounded(score: Any) -> float:
    return round(min(1.0, float(score)), 6)


def open_index(path: str, engine: str | None = None, separator: str | None = None) -> Index:
    """Open the index `path` for queries; `engine`: file of the engine it was made with (None: the bundled one).

    `separator`: file of the separator that its voices came out of, where it was made with `run --separate`.
    Raises InputError if there is no index, OutputError if it is damaged.
    """
    return Index(path, engine, separator)
