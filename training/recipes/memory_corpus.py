"""A corpus in memory, of the host or of a GPU, where crops and channels are drawn batch by batch.

The data loaders of `training.data` draw some hundred crops a second and core; a GPU trains on thousands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from singerembed.errors import UsageError
from training.recipes.crop_teacher import CropTeacher, even_lengths, resampled
from training.recipes.formants import with_moved_formants
from training.recipes.speakers import SAMPLE_RATE
from training.targets import Targets

_QUIET = 1e-3  # root mean square, full scale 1, below which a crop is drawn again
_DRAWS = 3
_KNOTS_HZ = np.geomspace(60, 18_000, 9)
_ROOM_SECONDS = 0.5
_WITH_BAND = 0.4  # share of the crops
_VOICE_OVER_BAND_DB = (0.0, 20.0)
_SPEED_OCTAVES, _FORMANT_OCTAVES = 0.2, 0.2
_CROPS_OF_A_SPEED = 16
_GAIN_DB = 12.0  # with constant normalisation the encoder sees the level


class Recordings:
    """Recordings as int16 samples on a device."""

    def __init__(self, paths: Sequence[Path], device: torch.device) -> None:
        """Raises UsageError for one that cannot be read, or has another sample rate than 44.1 kHz."""
        with ThreadPoolExecutor() as pool:
            pcm = list(pool.map(_read, paths))
        lengths = np.array([len(one) for one in pcm])
        self.seconds = lengths / SAMPLE_RATE
        self._pcm = torch.from_numpy(np.concatenate(pcm)).to(device)
        self._first = torch.from_numpy(np.cumsum(lengths) - lengths).to(device)
        self._length = torch.from_numpy(lengths).to(device)

    def draw(self, n: int) -> Tensor:
        """Draw the numbers of `n` recordings."""
        return torch.randint(len(self._length), (n,), device=self._length.device)

    def cut(self, recording: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Return a crop of each recording from a random place, [n, samples] with a peak of 1, and the places, [n].

        There are zeros after a recording's end.
        """
        best = torch.zeros(len(recording), samples, device=recording.device)
        place = torch.zeros_like(recording)
        loud = torch.zeros_like(recording, dtype=torch.bool)
        for _ in range(_DRAWS):
            room = (self._length[recording] - samples + 1).clamp(min=1)
            start = (torch.rand(len(recording), device=recording.device, dtype=torch.float64) * room).long()
            place = torch.where(loud, place, start)
            best = torch.where(loud[:, None], best, self.at(recording, start, samples))
            loud = best.square().mean(1).sqrt() > _QUIET
            if loud.all():
                break
        return peak_normalised(best), place

    def at(self, recording: Tensor, start: Tensor, samples: int) -> Tensor:
        """Return the crop of each recording from sample `start`, [n, samples], full scale 1; zeros after its end."""
        at = start[:, None] + torch.arange(samples, device=recording.device)
        inside = at < self._length[recording][:, None]
        pcm = self._pcm[torch.where(inside, self._first[recording][:, None] + at, 0)]
        return torch.where(inside, pcm, 0) / 32768


class Corpus:
    """Recordings with the teacher's embedding of each, and accompaniment."""

    def __init__(
        self,
        folders: Sequence[Path],
        targets: Targets,
        backing: Path | None,
        device: torch.device,
        teacher: CropTeacher | None = None,
    ) -> None:
        """Read the recordings below `folders` that `targets` has windows of, and those in the folder `backing`.

        A recording goes by its path in its folder; `self.targets` has a row of length 1 for each. With `teacher`, crops
        get other speeds and formants, and the teacher is asked about each: about the same crop of the first folder that
        has a recording of the name. Raises UsageError if there are no recordings.
        """
        found = [
            (folder, str(path.relative_to(folder))) for folder in folders for path in sorted(folder.rglob("*.flac"))
        ]
        found = [(folder, name) for folder, name in found if name in targets]
        bands = sorted(backing.glob("*.flac")) if backing else []
        if not found or (backing and not bands):
            raise UsageError(f"no recording of {folders[0]} is in the table of targets, or none is in {backing}")
        names = [name for _, name in found]
        self._voices = Recordings([folder / name for folder, name in found], device)
        lengths = self._voices.seconds
        self.targets = torch.from_numpy(
            np.stack([targets.of_crop(*each) for each in zip(names, 0 * lengths, lengths, strict=True)])
        ).to(device)
        self._bands = Recordings(bands, device) if bands else None
        self._teacher = teacher
        first = {name: i for i, name in reversed(list(enumerate(names)))}
        self._heard_by_teacher = torch.tensor([first[name] for name in names], device=device)
        self.seconds = float(lengths.sum())

    def draw(self, n: int, samples: int) -> tuple[Tensor, Tensor]:
        """Draw crops of `n` recordings, each through a channel of its own. Return [n, samples], and targets [n, dim].

        The target of a crop is that of its whole recording, or what the teacher says of the crop.
        """
        recording = self._voices.draw(n)
        if self._teacher is None:
            voice, targets = self._voices.cut(recording, samples)[0], self.targets[recording]
        else:
            voice, targets = self._as_other_voices(recording, samples, self._teacher)
        pcm = through_channel(voice)
        if self._bands:
            band, _ = self._bands.cut(self._bands.draw(n), samples)
            ratio = (pcm.square().mean(1, keepdim=True) / band.square().mean(1, keepdim=True).clamp(min=1e-12)).sqrt()
            level = ratio * 10 ** (-_between(n, *_VOICE_OVER_BAND_DB, pcm) / 20)
            pcm = pcm + torch.where(_chance(n, _WITH_BAND, pcm), band * level, 0.0)
        return peak_normalised(pcm) * 10 ** (-_between(n, 0, _GAIN_DB, pcm) / 20), targets

    def _as_other_voices(self, recording: Tensor, samples: int, teacher: CropTeacher) -> tuple[Tensor, Tensor]:
        """Return crops of other speeds and formants, [n, samples] with a peak of 1, and what the teacher says of each.

        Speeds are drawn for a few crops together, because transforms of one length are fast.
        """
        lengths = even_lengths(*(round(samples * 2**octaves) for octaves in (-_SPEED_OCTAVES, _SPEED_OCTAVES)))
        heard = self._heard_by_teacher[recording]
        voices, originals = [], []
        for first in range(0, len(recording), _CROPS_OF_A_SPEED):
            group = slice(first, first + _CROPS_OF_A_SPEED)
            length = lengths[int(torch.randint(len(lengths), ()))]
            voice, place = self._voices.cut(recording[group], length)
            voices.append(resampled(voice, samples))
            originals.append(resampled(self._voices.at(heard[group], place, length), samples))
        voice, original = torch.cat(voices), torch.cat(originals)
        factor = 2 ** _between(len(voice), -_FORMANT_OCTAVES, _FORMANT_OCTAVES, voice)[:, 0]
        voice = with_moved_formants(voice, factor)
        separated = heard != recording
        original = torch.where(separated[:, None], original, voice)
        if separated.any():
            original[separated] = with_moved_formants(original[separated], factor[separated])
        original = peak_normalised(resampled(original, round(samples * teacher.sample_rate / SAMPLE_RATE)))
        return peak_normalised(voice), teacher(original)


def _read(path: Path) -> np.ndarray[tuple[int], np.dtype[np.int16]]:
    try:
        pcm, rate = soundfile.read(path, dtype="int16")
    except soundfile.LibsndfileError as exc:
        raise UsageError(f"{path} cannot be read: {exc}. Remove it, or build the corpus again") from exc
    if pcm.ndim > 1:
        pcm = pcm[:, 0]
    if rate == 48_000:  # Opus
        import soxr

        pcm = soxr.resample(pcm, rate, SAMPLE_RATE)
    elif rate != SAMPLE_RATE:
        raise UsageError(f"{path} has {rate} Hz; resample it to {SAMPLE_RATE} Hz")
    return np.asarray(pcm)


def peak_normalised(pcm: Tensor) -> Tensor:
    """Divide each row by its largest magnitude."""
    return pcm / pcm.abs().amax(1, keepdim=True).clamp(min=1e-9)


def through_channel(pcm: Tensor) -> Tensor:
    """Return `pcm`, [crops, samples], each through a channel of its own: equaliser, room, limits, noise, saturation.

    As `training.recipes.channel`, less accompaniment and codecs; and with an erased stretch.
    """
    n, samples = pcm.shape
    tail = round(_ROOM_SECONDS * SAMPLE_RATE)
    length = samples + tail
    spectrum = torch.fft.rfft(pcm, length)
    spectrum *= _gains(n, length, pcm.device)
    in_room = torch.rand(n, device=pcm.device) < 0.4
    if in_room.any():
        spectrum[in_room] *= _rooms(int(in_room.sum()), tail, length, pcm.device)
    out = torch.fft.irfft(spectrum, length)[:, :samples]
    out = torch.where(_chance(n, 0.2, pcm), torch.tanh(peak_normalised(out) * _between(n, 1, 4, pcm)), out)
    rms = out.square().mean(1, keepdim=True).sqrt()
    noise = torch.randn_like(out) * rms * 10 ** (-_between(n, 15, 70, pcm) / 20)
    out = peak_normalised(out + torch.where(_chance(n, 0.6, pcm), noise, 0.0))
    first = _between(n, 0, samples, pcm)
    width = _between(n, 0, samples / 8, pcm) * _chance(n, 0.3, pcm)
    at = torch.arange(samples, device=pcm.device)
    erased = (at >= first) & (at < first + width)
    return torch.where(erased, 0.0, out)


def _gains(n: int, length: int, device: torch.device) -> Tensor:
    """Draw the gains of equaliser and band limits at the frequencies of a real transform, [n, length // 2 + 1]."""
    hertz, between = _between_knots(length, device)
    like = torch.empty(1, device=device)
    decibels = torch.randn(n, len(_KNOTS_HZ), device=device) * _between(n, 0, 6, like)
    gains = 10 ** (decibels @ between / 20)
    lowest = torch.where(_chance(n, 0.4, like), torch.exp(_between(n, math.log(3400), math.log(16_000), like)), 1e6)
    highest = torch.where(_chance(n, 0.4, like), _between(n, 40, 250, like), 1e-3)
    limited: Tensor = gains / ((1 + (hertz / lowest) ** 8) * (1 + (highest / hertz) ** 4)).sqrt()
    return limited


@cache
def _between_knots(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the frequencies of a real transform, and each knot's share in the gain at them, [knots, frequencies]."""
    hertz = torch.fft.rfftfreq(length, 1 / SAMPLE_RATE).clamp(min=1)
    place = np.interp(np.log(hertz.numpy()), np.log(_KNOTS_HZ), np.arange(len(_KNOTS_HZ)))
    shares = np.maximum(0, 1 - np.abs(place - np.arange(len(_KNOTS_HZ))[:, None]))
    return hertz.to(device), torch.from_numpy(shares).float().to(device)


def _rooms(n: int, tail: int, length: int, device: torch.device) -> Tensor:
    """Draw transforms of impulse responses: the direct sound and noise that decays exponentially."""
    like = torch.empty(1, device=device)
    seconds = torch.exp(_between(n, math.log(0.1), math.log(1.5), like))  # to -60 dB
    at = torch.arange(tail, device=device) / SAMPLE_RATE
    response = torch.randn(n, tail, device=device) * 10 ** (-3 * at / seconds)
    response *= at > _between(n, 0, 0.02, like)
    response *= 10 ** (-_between(n, 0, 20, like) / 20) / response.square().sum(1, keepdim=True).sqrt()
    response[:, 0] = 1
    spectrum: Tensor = torch.fft.rfft(response, length)
    return spectrum


def _between(n: int, low: float, high: float, like: Tensor) -> Tensor:
    return torch.empty(n, 1, device=like.device).uniform_(low, high)


def _chance(n: int, probability: float, like: Tensor) -> Tensor:
    return torch.rand(n, 1, device=like.device) < probability
