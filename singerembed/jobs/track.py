"""Embed one track: decode and cut its recording, embed the crops, return the rows."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed import storage
from singerembed.audio.crops import CropBlock, CropPlan, read_crops
from singerembed.audio.limits import TimeLimit
from singerembed.audio.process import packet_hash
from singerembed.audio.recording import local_recording, open_recording
from singerembed.catalog.read import Track
from singerembed.engine.base import EmbeddedCrops, Engine
from singerembed.engine.separation import MAX_BLOCK, VOICELESS, Separation
from singerembed.errors import SingerEmbedError, TrackError
from singerembed.jobs.options import RunOptions
from singerembed.jobs.voiced_crops import crops_with_voice
from singerembed.model import mel
from singerembed.model.mixture import MixtureDetector
from singerembed.output.schema import ERROR, NO_VOICE, OK, SILENT, TrackRows
from singerembed.storage import Facts

_log = logging.getLogger(__name__)

_HASH_DIGITS = 32  # 128 bits: no two of a billion recordings meet by chance
_STATUS = {mel.LOUD: OK, mel.SILENT: SILENT, mel.INVALID: ERROR, VOICELESS: NO_VOICE}

_FIRST_PAUSE_SECONDS = 0.5  # before a recording is read again after its storage failed; doubled each time
_LONGEST_PAUSE_SECONDS = 60.0
_POLL_SECONDS = 0.5


class Stopped(Exception):
    """A signal asked to stop."""


class Patience:
    """Limits the time that a run waits in vain for storage that fails, so that many bad files do not take a night."""

    def __init__(self, seconds: float = 600.0) -> None:
        self._left = seconds
        self._lock = threading.Lock()

    @property
    def is_left(self) -> bool:
        """Whether a recording may still be waited for."""
        return self._left > 0

    def waited_in_vain(self, seconds: float) -> None:
        """Count the pauses before a recording that could not be read after them either."""
        with self._lock:
            was_left, self._left = self.is_left, self._left - seconds
        if was_left and not self.is_left:
            _log.warning("storage failed too often: files that cannot be read are not waited for any more")


def embed_track(
    track: Track,
    engine: Engine,
    options: RunOptions,
    limit: TimeLimit | None = None,
    patience: Patience | None = None,
    *,
    isolated: bool = False,
    stop: Callable[[], int] = lambda: 0,
    separation: Separation | None = None,
    mixtures: MixtureDetector | None = None,
) -> TrackRows:
    """Embed one track; any error of the track is returned as `TrackRows.error`.

    `limit`: of its decoding; by default that of the options. `patience`: of the run, with storage that fails.
    `isolated`: decode it in another process, because a decoder may have crashed on it. `stop` is asked between blocks
    of crops. `separation`: separates the voice, where that is wanted. `mixtures`: looks for accompaniment, likewise.
    Raises EngineError, and Stopped once `stop` returns a signal's number.
    """
    started = time.monotonic()
    limit = limit or TimeLimit(options.track_timeout_seconds)
    patience = patience or Patience()
    waited = 0.0
    for attempt in range(options.retries + 1):
        embedded = _EmbeddedTrack(engine, options, None if track.vocals else separation, mixtures)
        rows = _attempt(track, embedded, limit, isolated=isolated, stop=stop, started=started)
        if rows.error is None or not rows.error.passing:
            return rows
        if attempt == options.retries or not patience.is_left:
            break
        waited += _pause(min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2**attempt), stop)
    patience.waited_in_vain(waited)
    return rows


def _pause(seconds: float, stop: Callable[[], int]) -> float:
    """Sleep for `seconds`, and return them. Raises Stopped."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if stop():
            raise Stopped
        time.sleep(min(left, _POLL_SECONDS))
    return seconds


def facts_of(location: str, *, raising: bool = False) -> Facts:
    """Size and time of the file at `location`; empty where it is not there, or its storage does not say.

    `raising`: OSError of a kind that may pass is raised.
    """
    try:
        return storage.facts_of(location)
    except Exception as exc:  # each fsspec file system has exceptions of its own
        if raising and isinstance(exc, OSError) and storage.may_pass(exc):
            raise
        return Facts()


def overdue_rows(options: RunOptions, embedding_dim: int) -> TrackRows:
    """The rows of a track whose storage did not answer within the time limit."""
    limit = TimeLimit(options.track_timeout_seconds)
    error = TrackError("decode_timeout", f"{limit.exceeded()}: its storage does not answer")
    return TrackRows.of_error(error, embedding_dim, options.track_timeout_seconds)


def _attempt(
    track: Track,
    embedded: _EmbeddedTrack,
    limit: TimeLimit,
    *,
    isolated: bool,
    stop: Callable[[], int],
    started: float,
) -> TrackRows:
    error: TrackError | None = None
    try:
        if track.problem:
            raise track.problem
        with limit.counting():  # before it is opened: what is written to it meanwhile then counts as a change
            embedded.facts = facts_of(track.source, raising=True)
        for block in _timed_blocks(track, embedded, limit, isolated=isolated):
            if stop():
                raise Stopped
            embedded.add(block)
    except TrackError as exc:
        of_stem = f"its stem {storage.printable(storage.redacted(track.vocals))}: " if track.vocals else ""
        error = TrackError(exc.code, f"{of_stem}{exc}", passing=exc.passing)
    except (SingerEmbedError, Stopped):
        raise
    except OSError as exc:  # the storage went away
        error = TrackError("unreadable", exc.strerror or str(exc), passing=storage.may_pass(exc))
    except Exception as exc:  # one track must not stop a run, whatever a library raises on it
        error = TrackError("internal", f"{type(exc).__name__}: {exc}")
    return embedded.rows(error, time.monotonic() - started)


def _timed_blocks(track: Track, embedded: _EmbeddedTrack, limit: TimeLimit, *, isolated: bool) -> Iterator[CropBlock]:
    """Yield the track's crops; the time limit counts the decoding, not what the caller does with a block.

    What the reader notes of the recording, and the hash of its packets, are added to `embedded`.
    """
    engine, options, stage = embedded.engine, embedded.options, embedded.separation
    channels = stage.channels if stage else 1
    with ExitStack() as stack:
        rate = engine.spec.sample_rate
        with limit.counting():
            path = stack.enter_context(local_recording(track.source))
            reader = stack.enter_context(open_recording(path, rate, limit, isolated=isolated, channels=channels))
            if options.identity == "audio":
                with contextlib.suppress(TrackError):  # FFmpeg does not know what libsndfile reads
                    embedded.packet_hash = packet_hash(path, limit)
        stack.callback(lambda: embedded.notes.extend(reader.notes))
        plan = _crop_plan(track, engine, options)
        if stage is None:
            blocks = read_crops(reader, plan, engine.batch)
        else:
            blocks = read_crops(*stage.surrounded(reader, plan), min(engine.batch, MAX_BLOCK), embedded.choose)
        while True:
            with limit.counting():
                block = next(blocks, None)
            if block is None:
                break
            yield block
        if track.end is None and options.crops is None:
            reader.check_complete()


def _crop_plan(track: Track, engine: Engine, options: RunOptions) -> CropPlan:
    spec = engine.spec
    hop = spec.crop_samples if options.hop_seconds is None else max(1, round(options.hop_seconds * spec.sample_rate))
    stop = None if track.end is None else round(track.end * spec.sample_rate)
    return CropPlan(spec.crop_samples, hop, options.crops, round(track.start * spec.sample_rate), stop)


class _EmbeddedTrack:
    """Collects the embedded crops of one track."""

    def __init__(
        self, engine: Engine, options: RunOptions, separation: Separation | None, mixtures: MixtureDetector | None
    ) -> None:
        self.notes: list[str] = []
        self.facts = Facts()
        self.packet_hash = ""
        self.engine, self.options, self.separation = engine, options, separation
        self._mixtures = mixtures
        self._seems_mixed: bool | None = None
        self._n_embedded = 0
        self._put_off: dict[int, float] = {}  # crops of which it seemed that nobody sings, and their scores
        self._ratio: list[NDArray[np.float32]] = []
        self._index: list[int] = []
        self._start: list[NDArray[np.int64]] = []
        self._stop: list[NDArray[np.int64]] = []
        self._embedded: list[EmbeddedCrops] = []
        self._hash = hashlib.sha256() if options.audio_hash else None

    def add(self, block: CropBlock) -> None:
        if self._is_put_off(block):
            return
        if self._hash is not None:
            self._hash.update(mel.as_float(block.pcm).data)
        if self.separation is None:
            embedded = self.engine.embed(block.pcm)
        else:
            block, embedded, ratio = self.separation.embed(block, self.engine)
            self._ratio.append(ratio)
        self._n_embedded += len(embedded.embedding)
        if self._mixtures is not None and self._seems_mixed is None and len(embedded.embedding):
            first = int((embedded.state == mel.LOUD).argmax())
            self._seems_mixed = self._mixtures.seems_mixed(block.pcm[first])
        if not np.isfinite(embedded.embedding).all():
            loud = np.array(block.index)[embedded.state == mel.LOUD]
            bad = loud[~np.isfinite(embedded.embedding).all(axis=1)][0]
            raise TrackError(
                "not_finite",
                f"the engine gave NaN or infinity for crop {bad}. If it is FP16, build it with --precision fp32",
            )
        self._embedded.append(embedded)
        self._index += block.index
        self._start.append(block.start)
        self._stop.append(block.stop)

    def choose(self, n_crops: int) -> Iterator[int]:
        """Which of `n_crops` crops to read: those wanted, and others where there is no voice in them."""
        return crops_with_voice(n_crops, self.options.crops or n_crops, lambda: self._n_embedded, self._put_off)

    def _is_put_off(self, block: CropBlock) -> bool:
        """Whether nobody seems to sing in the only crop of `block`, which is separated at the end if at all."""
        if self.separation is None or self.options.crops is None or block.index[0] in self._put_off:
            return False
        score = self.separation.vocal_score(block)
        if score is None or score > 0:
            return False
        self._put_off[block.index[0]] = score
        return True

    def rows(self, error: TrackError | None, seconds: float) -> TrackRows:
        spec = self.engine.spec
        state = _concatenate([e.state for e in self._embedded], np.uint8)
        rows = TrackRows(
            crop=np.array(self._index, np.int32),
            start=_concatenate(self._start, np.int64) / spec.sample_rate,
            end=_concatenate(self._stop, np.int64) / spec.sample_rate,
            status=[_STATUS[int(s)] for s in state],
            peak=_concatenate([e.peak for e in self._embedded], np.float32),
            rms=_concatenate([e.rms for e in self._embedded], np.float32),
            embedding=np.concatenate(
                [np.empty((0, spec.embedding_dim), np.float32), *(e.embedding for e in self._embedded)]
            ),
            error=error,
            note="; ".join(self.notes),
            seconds=seconds,
            audio_hash=self._hash.hexdigest()[:_HASH_DIGITS] if self._hash and self._index else "",
            packet_hash=self.packet_hash,
            facts=self.facts,
            vocal_ratio=_concatenate(self._ratio, np.float32) if self.separation else None,
            seems_mixed=self._seems_mixed,
        )
        rows = _in_order(rows)
        return _pooled(rows) if self.options.pool == "mean" and len(rows.crop) else rows


def _concatenate(arrays: list[Any], dtype: Any) -> Any:
    return np.concatenate([np.empty(0, dtype), *arrays])


def _pooled(rows: TrackRows) -> TrackRows:
    """Reduce to one row: the mean embedding of the loud crops, over the time from the first crop to the last."""
    valid = ~np.isnan(rows.peak)
    status = next((s for s in (OK, NO_VOICE, SILENT) if s in rows.status), ERROR)
    return TrackRows(
        crop=np.zeros(1, np.int32),
        start=rows.start[:1],
        end=rows.end[-1:],
        status=[status],
        peak=rows.peak[valid].max(keepdims=True) if valid.any() else np.full(1, np.nan, np.float32),
        rms=np.sqrt((rows.rms[valid] ** 2).mean(keepdims=True)) if valid.any() else np.full(1, np.nan, np.float32),
        embedding=rows.embedding.mean(axis=0, keepdims=True) if len(rows.embedding) else rows.embedding,
        error=rows.error,
        note=rows.note,
        seconds=rows.seconds,
        audio_hash=rows.audio_hash,
        packet_hash=rows.packet_hash,
        facts=rows.facts,
        vocal_ratio=_pooled_ratio(rows),
        seems_mixed=rows.seems_mixed,
    )


def _pooled_ratio(rows: TrackRows) -> NDArray[np.float32] | None:
    """The ratio of voice to mixture over all crops that have one, in dB: their energies are added."""
    if rows.vocal_ratio is None:
        return None
    known = ~np.isnan(rows.vocal_ratio)
    mixture = rows.rms[known].astype(np.float64) ** 2
    vocals = mixture * 10 ** (rows.vocal_ratio[known] / 10)
    return np.array([10 * np.log10(vocals.sum() / mixture.sum()) if known.any() else np.nan], np.float32)


def _in_order(rows: TrackRows) -> TrackRows:
    """Return `rows` by rising crops: of a track with too few voices, some were read later."""
    order = np.argsort(rows.crop, kind="stable")
    if (order[1:] > order[:-1]).all():
        return rows
    has_embedding = np.array([status == OK for status in rows.status])
    row_of_embedding = np.cumsum(has_embedding) - 1
    return replace(
        rows,
        crop=rows.crop[order],
        start=rows.start[order],
        end=rows.end[order],
        status=[rows.status[i] for i in order],
        peak=rows.peak[order],
        rms=rows.rms[order],
        embedding=rows.embedding[row_of_embedding[order][has_embedding[order]]],
        vocal_ratio=None if rows.vocal_ratio is None else rows.vocal_ratio[order],
    )
