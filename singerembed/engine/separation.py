"""The stage between decoding and the engine that separates the voice from a mixture.

Each crop is separated for itself, with the sound around it, so that its result depends on the recording alone: not on
which crops are wanted, nor on what was read before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from singerembed.audio.crops import CropBlock, CropPlan
from singerembed.audio.mono import segment_samples
from singerembed.audio.padding import PaddedReader
from singerembed.audio.reader import PcmReader
from singerembed.engine.base import EmbeddedCrops, Engine
from singerembed.engine.file import SeparatorFile
from singerembed.engine.gpu import GpuEngine
from singerembed.engine.ring import Request
from singerembed.errors import EngineError, TrackError
from singerembed.model import mel
from singerembed.model.spec import ModelSpec
from singerembed.model.vocal_activity import VocalDetector

if TYPE_CHECKING:
    from singerembed.engine.separator import Separator
    from singerembed.engine.separator_gpu import DeviceVoice

MAX_BLOCK = 8  # crops that are read before they are separated: 17 MB in windows of 6 s
VOICELESS = 3  # a state of a crop beside those of mel
_NEVER_DB = -200.0  # the ratio of a crop whose separated voice is digital silence


class Separation:
    """Separates the crops of a run. Thread-safe."""

    def __init__(self, separator: Separator, spec: ModelSpec, min_vocals_db: float, silence_dbfs: float) -> None:
        """`spec`: of the encoder. Raises EngineError where the two do not fit together."""
        if separator.spec.sample_rate != spec.sample_rate:
            raise EngineError(
                f"the separator is for {separator.spec.sample_rate:,} Hz and the encoder for {spec.sample_rate:,} Hz"
            )
        self.channels = separator.spec.channels
        self.description = separator.description
        self._separator = separator
        self._crop_samples = spec.crop_samples
        try:
            self._window = separator.spec.segment_samples(spec.crop_samples)
        except ValueError as exc:
            raise EngineError(f"{exc}. Build it with longer segments, or with less context") from exc
        self._context = (self._window - spec.crop_samples) // 2  # samples before and after each crop
        self._mixing_segment = segment_samples(spec.sample_rate)
        self._detector = VocalDetector(spec) if VocalDetector.fits(spec) else None
        self._min_vocals_db, self._silence_peak = min_vocals_db, 10 ** (silence_dbfs / 20)

    def close(self) -> None:
        """Free the separator's device."""
        self._separator.close()

    def surrounded(self, reader: PcmReader, plan: CropPlan) -> tuple[PcmReader, CropPlan]:
        """Return a reader and a plan that give each crop of `plan` with what lies around it."""
        stop = None if plan.stop is None else plan.stop + 2 * self._context
        crop_samples = plan.crop_samples + 2 * self._context
        return PaddedReader(reader, self._context), replace(plan, crop_samples=crop_samples, stop=stop)

    def vocal_score(self, block: CropBlock) -> float | None:
        """How much the single crop of `block`, of a surrounded plan, seems to hold a voice: above 0, it does.

        None where it cannot be said: the crop is silent, invalid or not whole, or the encoder has other crops or mel
        bands than the usual ones.
        """
        if self._detector is None or block.stop[0] - block.start[0] != self._crop_samples + 2 * self._context:
            return None
        mixture = mel.as_float(block.pcm[0]).reshape(-1, self.channels)[self._context :][: self._crop_samples]
        mono = self._mono(mixture)
        if not self._silence_peak < np.abs(mono).max() < np.inf:  # so that NaN is not looked at either
            return None
        return self._detector.score(mono)

    def embed(self, block: CropBlock, engine: Engine) -> tuple[CropBlock, EmbeddedCrops, NDArray[np.float32]]:
        """Separate and embed the crops of a surrounded plan.

        Return them as crops of the plan itself, their embeddings with the levels of the mixture, and the energy of the
        voice over that of the mixture in dB, float32 [n], NaN where a crop is silent or invalid. Raises TrackError,
        no_audio, and EngineError.
        """
        stop = block.stop - 2 * self._context
        if stop[0] <= block.start[0]:
            raise TrackError("no_audio", "there is no audio after its start")
        n = len(block.index)
        peak, rms, ratio = (np.full(n, np.nan, np.float32) for _ in range(3))
        state = np.full(n, mel.INVALID, np.uint8)
        with closing(self._voices_for(engine)) as voices:
            for i, pcm in enumerate(block.pcm):
                window = mel.as_float(pcm).reshape(-1, self.channels)
                samples = int(stop[i] - block.start[i])
                mixture: NDArray[np.float32] = np.ascontiguousarray(window[self._context :][:samples])
                if not np.isfinite(mixture).all():
                    continue
                mono = self._mono(mixture)
                peak[i] = np.abs(mono).max()
                rms[i] = np.sqrt(np.sum(mono.astype(np.float64) ** 2) / self._crop_samples)
                if peak[i] <= self._silence_peak:
                    state[i] = mel.SILENT
                    continue
                ratio[i] = _ratio_db(voices.separate(self._segment(window), self._context, samples), _energy(mixture))
                state[i] = mel.LOUD if ratio[i] >= self._min_vocals_db else VOICELESS
                if state[i] == mel.LOUD:
                    voices.embed()
            embedding, of_voices = voices.results()
        voiced = np.flatnonzero(state == mel.LOUD)
        state[voiced[of_voices != mel.LOUD]] = VOICELESS
        return replace(block, stop=stop), EmbeddedCrops(embedding, peak, rms, state), ratio

    def _voices_for(self, engine: Engine) -> _Voices:
        if isinstance(engine, GpuEngine) and self._separator.stays_on(engine.device_index):
            return _OnDevice(self._separator, engine)
        return _OnHost(self._separator, engine, self._mono)

    def _segment(self, window: NDArray[np.float32]) -> NDArray[np.float32]:
        segment = np.zeros((self._window, self.channels), np.float32)
        segment[: len(window)] = window
        if not np.isfinite(segment).all():
            np.nan_to_num(segment, copy=False, posinf=0, neginf=0)
        return segment

    def _mono(self, pcm: NDArray[np.float32]) -> NDArray[np.float32]:
        return mel.mix_down(np.ascontiguousarray(pcm), self._mixing_segment)[0]


class _Voices(Protocol):
    """Voices of the crops of a block, from the separator to the encoder."""

    def separate(self, segment: NDArray[np.float32], first: int, samples: int) -> float:
        """Separate a segment, and return the energy of the voice in `samples` samples from `first` on."""
        ...

    def embed(self) -> None:
        """Have what was separated last embedded."""
        ...

    def results(self) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Return the embeddings of loud voices, and the state of each voice that `embed` was called for."""
        ...

    def close(self) -> None: ...


class _OnHost:
    """Voices that the host gives to the encoder. See `_Voices`."""

    def __init__(
        self, separator: Separator, engine: Engine, mono: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    ) -> None:
        self._separator, self._engine, self._mono = separator, engine, mono
        self._last = np.empty((0, 0), np.float32)
        self._crops: list[NDArray[np.float32]] = []

    def separate(self, segment: NDArray[np.float32], first: int, samples: int) -> float:
        self._last = self._separator.vocals(segment)[first : first + samples]
        return _energy(self._last)

    def embed(self) -> None:
        crop = np.zeros(self._engine.spec.crop_samples, np.float32)
        crop[: len(self._last)] = self._mono(self._last)
        self._crops.append(crop)

    def results(self) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        if not self._crops:
            return np.empty((0, self._engine.spec.embedding_dim), np.float32), np.empty(0, np.uint8)
        embedded = self._engine.embed(np.stack(self._crops))
        return embedded.embedding, embedded.state

    def close(self) -> None:
        pass


class _OnDevice:
    """Voices that stay on the device that separator and encoder share. See `_Voices`."""

    def __init__(self, separator: Separator, engine: GpuEngine) -> None:
        self._separator, self._engine = separator, engine
        self._last: DeviceVoice | None = None
        self._requests: list[Request] = []

    def separate(self, segment: NDArray[np.float32], first: int, samples: int) -> float:
        self.close()
        self._last = self._separator.voice_on_device(segment, first, samples)
        return self._last.energy

    def embed(self) -> None:
        # At once, for a voice that waits holds memory of the separator, which others may wait for.
        assert self._last is not None
        self._requests.append(self._engine.start_on_device(self._last.slot))
        self._last = None

    def results(self) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        embedded = [self._engine.result(request) for request in self._requests]
        rows = np.empty((0, self._engine.spec.embedding_dim), np.float32)
        states = np.empty(0, np.uint8)
        return (
            np.concatenate([rows, *(one.embedding for one in embedded)]),
            np.concatenate([states, *(one.state for one in embedded)]),
        )

    def close(self) -> None:
        """Give the last voice back if it was not embedded."""
        if self._last is not None:
            self._last.slot.release()
            self._last = None


def open_separation(
    file: SeparatorFile, spec: ModelSpec, min_vocals_db: float, silence_dbfs: float, device: int = 0
) -> Separation:
    """Start the separator of `file` for crops of an encoder with `spec`, on CUDA device `device` if it can use one.

    Raises EngineError.
    """
    from singerembed.engine.separator import Separator  # loads ONNX Runtime, which not every process needs
    from singerembed.engine.separator_gpu import CropMix

    crop_mix = CropMix(file.spec, spec.crop_samples, segment_samples(spec.sample_rate))
    return Separation(Separator(file, device, crop_mix), spec, min_vocals_db, silence_dbfs)


def _energy(pcm: NDArray[np.float32]) -> float:
    return float(np.sum(pcm.astype(np.float64) ** 2))


def _ratio_db(of_voice: float, of_mixture: float) -> float:
    return max(_NEVER_DB, 10 * np.log10(of_voice / of_mixture)) if of_voice > 0 else _NEVER_DB
