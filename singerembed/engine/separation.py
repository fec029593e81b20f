"""The stage between decoding and the engine that separates the voice from a mixture.

Each crop is separated for itself, with the sound around it, so that its result depends on the recording alone: not on
which crops are wanted, nor on what was read before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from singerembed.audio.crops import CropBlock, CropPlan
from singerembed.audio.mono import segment_samples
from singerembed.audio.padding import PaddedReader
from singerembed.audio.reader import PcmReader
from singerembed.engine.base import EmbeddedCrops, Engine
from singerembed.engine.file import SeparatorFile
from singerembed.errors import EngineError, TrackError
from singerembed.model import mel
from singerembed.model.spec import ModelSpec
from singerembed.model.vocal_activity import VocalDetector

if TYPE_CHECKING:
    from singerembed.engine.separator import Separator

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
        voices = np.zeros((n, self._crop_samples), np.float32)
        for i, pcm in enumerate(block.pcm):
            window = mel.as_float(pcm).reshape(-1, self.channels)
            samples = slice(self._context, self._context + int(stop[i] - block.start[i]))
            mixture: NDArray[np.float32] = np.ascontiguousarray(window[samples])
            if not np.isfinite(mixture).all():
                continue
            mono = self._mono(mixture)
            peak[i] = np.abs(mono).max()
            rms[i] = np.sqrt(np.sum(mono.astype(np.float64) ** 2) / self._crop_samples)
            state[i] = mel.LOUD if peak[i] > self._silence_peak else mel.SILENT
            if state[i] == mel.LOUD:
                vocals = self._vocals(window)[samples]
                ratio[i] = _energy_ratio_db(vocals, mixture)
                voices[i, : len(mono)] = self._mono(vocals)
        state[(state == mel.LOUD) & (ratio < self._min_vocals_db)] = VOICELESS
        voiced = np.flatnonzero(state == mel.LOUD)
        embedding = np.empty((0, engine.spec.embedding_dim), np.float32)
        if len(voiced):
            embedded = engine.embed(voices[voiced])
            embedding = embedded.embedding
            state[voiced[embedded.state != mel.LOUD]] = VOICELESS
        return replace(block, stop=stop), EmbeddedCrops(embedding, peak, rms, state), ratio

    def _vocals(self, window: NDArray[np.float32]) -> NDArray[np.float32]:
        segment = np.zeros((self._window, self.channels), np.float32)
        segment[: len(window)] = np.nan_to_num(window, posinf=0, neginf=0)
        return self._separator.vocals(segment)

    def _mono(self, pcm: NDArray[np.float32]) -> NDArray[np.float32]:
        return mel.mix_down(np.ascontiguousarray(pcm), self._mixing_segment)[0]


def open_separation(
    file: SeparatorFile, spec: ModelSpec, min_vocals_db: float, silence_dbfs: float, device: int = 0
) -> Separation:
    """Start the separator of `file` for crops of an encoder with `spec`, on CUDA device `device` if it can use one.

    Raises EngineError.
    """
    from singerembed.engine.separator import Separator  # loads ONNX Runtime, which not every process needs

    return Separation(Separator(file, device), spec, min_vocals_db, silence_dbfs)


def _energy_ratio_db(vocals: NDArray[np.float32], mixture: NDArray[np.float32]) -> float:
    of_vocals, of_mixture = (float(np.sum(pcm.astype(np.float64) ** 2)) for pcm in (vocals, mixture))
    return max(_NEVER_DB, 10 * np.log10(of_vocals / of_mixture)) if of_vocals > 0 else _NEVER_DB
