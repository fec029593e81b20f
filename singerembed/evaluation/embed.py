"""Embeds labelled recordings with a model, and selects the crops that several models have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from singerembed.audio.crops import CropPlan, read_crops
from singerembed.audio.limits import DEFAULT_TRACK_TIMEOUT_SECONDS, TimeLimit
from singerembed.audio.recording import open_recording
from singerembed.errors import InputError, TrackError
from singerembed.evaluation.baselines.base import ONLY_LAYER, Model, ModelFacts
from singerembed.evaluation.data import Recording, StoredEmbeddings
from singerembed.evaluation.metrics import Ints
from singerembed.model.mel import DEFAULT_SILENCE_DBFS

CROP_SECONDS = 4.0  # as in the paper
MAX_FAILURES_KEPT = 5
_SAME_START_SECONDS = 0.01  # a sample at another rate is less


@dataclass(frozen=True)
class EmbeddedTable:
    """The embeddings of all crops by one model."""

    facts: ModelFacts
    recording: Ints  # [n], index of the crop's recording
    start: NDArray[np.float64]  # [n], seconds from the start of the recording
    layers: dict[str, NDArray[np.float32]]  # [n, dim] each
    n_silent: int
    n_invalid: int  # NaN or infinity, in the samples or in the embedding
    n_failed: int  # recordings that could not be read to the end
    failures: list[str]  # the first few, with the reason
    seconds: float  # time of decoding and embedding; 0 for stored embeddings

    def select(self, rows: Ints) -> EmbeddedTable:
        """Return the table with only the crops `rows`."""
        layers = {name: embedding[rows] for name, embedding in self.layers.items()}
        return replace(self, recording=self.recording[rows], start=self.start[rows], layers=layers)


@dataclass(frozen=True)
class _RecordingResult:
    start: list[float]
    layers: dict[str, NDArray[np.float32]]
    n_silent: int
    n_invalid: int
    failure: str


def embed_recordings(
    model: Model,
    recordings: list[Recording],
    *,
    crops: int | None = None,
    silence_dbfs: float = DEFAULT_SILENCE_DBFS,
    advance: Callable[[], object] = lambda: None,
) -> EmbeddedTable:
    """Cut each recording into crops of 4 s at the model's rate, and embed those that are not silent.

    `crops`: number per recording, evenly spaced; None: all consecutive ones, as in `run`. `advance` is called after
    each recording. Raises InputError if no crop of any recording could be embedded.
    """
    started = time.monotonic()

    def embed(recording: Recording) -> _RecordingResult:
        result = _embed_recording(model, recording, crops, 10 ** (silence_dbfs / 20))
        advance()
        return result

    with ThreadPoolExecutor(model.workers) as pool:
        results = list(pool.map(embed, recordings))
    failures = [r.failure for r in results if r.failure]
    filled = [i for i, r in enumerate(results) if r.start]
    if not filled:
        reason = failures[0] if failures else "every crop is silent"
        raise InputError(f"{model.facts.name} could embed none of the {len(recordings)} recordings: {reason}")
    names = results[filled[0]].layers
    table = EmbeddedTable(
        facts=model.facts,
        recording=np.repeat(filled, [len(results[i].start) for i in filled]),
        start=np.array([s for i in filled for s in results[i].start]),
        layers={name: np.concatenate([results[i].layers[name] for i in filled]) for name in names},
        n_silent=sum(r.n_silent for r in results),
        n_invalid=sum(r.n_invalid for r in results),
        n_failed=len(failures),
        failures=failures[:MAX_FAILURES_KEPT],
        seconds=time.monotonic() - started,
    )
    return _without_invalid(table)


def _embed_recording(model: Model, recording: Recording, crops: int | None, silence: float) -> _RecordingResult:
    rate = model.facts.sample_rate
    size = round(CROP_SECONDS * rate)
    stop = None if recording.end is None else round(recording.end * rate)
    plan = CropPlan(size, size, crops, round(recording.start * rate), stop)
    start = list[float]()
    parts: dict[str, list[NDArray[np.float32]]] = {}
    n_silent, n_invalid, failure = 0, 0, ""
    try:
        with open_recording(recording.location, rate, TimeLimit(DEFAULT_TRACK_TIMEOUT_SECONDS)) as reader:
            for block in read_crops(reader, plan, model.batch):
                pcm = block.pcm.astype(np.float32) / (32768 if block.pcm.dtype == np.int16 else 1)
                finite = np.isfinite(pcm).all(axis=1)
                loud = finite & (np.abs(pcm).max(axis=1) > silence)
                n_invalid += int((~finite).sum())
                n_silent += int((finite & ~loud).sum())
                if loud.any():
                    start += (block.start[loud] / rate).tolist()
                    for name, embedding in model.embed(np.ascontiguousarray(pcm[loud])).items():
                        parts.setdefault(name, []).append(embedding)
    except TrackError as exc:  # crops before the damage are kept
        failure = f"{recording.name}: {exc}"
    layers = {name: np.concatenate(blocks) for name, blocks in parts.items()}
    return _RecordingResult(start, layers, n_silent, n_invalid, failure)


def stored_table(stored: StoredEmbeddings) -> EmbeddedTable:
    """Return stored embeddings as a table."""
    spec = stored.metadata.get("spec", {})
    facts = ModelFacts(
        name=str(spec.get("name", "stored")),
        sample_rate=int(spec.get("sample_rate", 0)),
        n_parameters=None,
        description="embeddings stored by singerembed run",
    )
    return _without_invalid(
        EmbeddedTable(
            facts, stored.recording, stored.start, {ONLY_LAYER: stored.embedding},
            stored.n_silent, 0, stored.n_errors, [], 0.0,
        )
    )  # fmt: skip


def _without_invalid(table: EmbeddedTable) -> EmbeddedTable:
    """Drop, and count, crops with NaN or infinity in any layer."""
    finite = np.ones(len(table.start), bool)
    for embedding in table.layers.values():
        finite &= np.isfinite(embedding).all(axis=1)
    if finite.all():
        return table
    return replace(table.select(np.flatnonzero(finite)), n_invalid=table.n_invalid + int((~finite).sum()))


def in_common(tables: list[EmbeddedTable]) -> list[EmbeddedTable]:
    """Return the tables restricted to the crops that all of them have, in the same order.

    Crops are the same where they begin at the same time: those of an output may have other hops, and other numbers.
    """
    recording, start = (np.concatenate([getattr(table, name) for table in tables]) for name in ("recording", "start"))
    order = np.lexsort([start, recording])
    apart = (np.diff(recording[order]) != 0) | (np.diff(start[order]) > _SAME_START_SECONDS)
    place = np.empty(len(order), np.int64)
    place[order] = np.concatenate([[0], np.cumsum(apart)])[: len(order)]
    of_table = np.split(place, np.cumsum([len(table.start) for table in tables])[:-1])
    shared = of_table[0]
    for places in of_table[1:]:
        shared = np.intersect1d(shared, places)
    selected = []
    for table, places in zip(tables, of_table, strict=True):
        rows = np.unique(places, return_index=True)
        selected.append(table.select(rows[1][np.isin(rows[0], shared)]))
    return selected


def standardised(embedding: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale each dimension to mean 0 and standard deviation 1 over the rows; a constant one becomes 0."""
    centred = embedding - embedding.mean(axis=0)
    deviation = centred.std(axis=0)
    return np.asarray(centred / np.where(deviation > 0, deviation, 1), np.float32)
