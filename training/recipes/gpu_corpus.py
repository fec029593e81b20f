"""A corpus in a GPU's memory: crops, speeds, channels and targets are drawn and computed there, batch by batch.

The data loaders of `training.data` draw some hundred crops a second and core; a GPU trains on thousands.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from singerembed.errors import UsageError
from singerembed.model.spec import ModelSpec
from training.model import MelSpectrogram
from training.recipes.speakers import SAMPLE_RATE

_OCTAVES = 0.3  # the speed of a crop is up to 2 to this, or its reciprocal: it moves pitch and vocal tract
_QUIET = 1e-3  # root mean square, full scale 1, below which a crop is drawn again
_DRAWS = 3
_KNOTS_HZ = np.geomspace(60, 18_000, 9)
_ROOM_SECONDS = 0.5
_N_CEPSTRA = 20
_POWER_OFFSET = 1e-10


class Corpus:
    """Recordings of SINGER/**/* as int16 samples on a device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Read all recordings below `folder`. Raises UsageError if there are none, or one of another sample rate."""
        paths = sorted(path for path in folder.rglob("*") if path.suffix in {".flac", ".wav", ".ogg", ".opus"})
        if not paths:
            raise UsageError(f"{folder} holds no recordings")
        with ThreadPoolExecutor() as pool:
            pcm = list(pool.map(_read, paths))
        names = [path.relative_to(folder).parts[0] for path in paths]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        lengths = np.array([len(one) for one in pcm])
        self._pcm = torch.from_numpy(np.concatenate([*pcm, np.zeros(1, np.int16)])).to(device)
        self._first = torch.from_numpy(np.cumsum(lengths) - lengths).to(device)
        self._length = torch.from_numpy(lengths).to(device)
        self._singer = torch.tensor([numbers[name] for name in names], device=device)
        # Paths are sorted, so that those of a singer follow each other.
        self._n_members = torch.bincount(self._singer)
        self._first_member = self._n_members.cumsum(0) - self._n_members
        self.seconds = float(lengths.sum()) / SAMPLE_RATE

    @property
    def n_singers(self) -> int:
        """How many folders there are."""
        return len(self._n_members)

    def draw_pairs(self, n: int, samples: int) -> tuple[Tensor, Tensor]:
        """Draw crops of `n` singers, two of each, at one speed. Return [2 n, samples], the second ones last, and [n].

        They have a peak of 1; the second tensor holds the numbers of the singers.
        """
        device = self._pcm.device
        singers = torch.randint(self.n_singers, (n,), device=device)
        speed = 2 ** torch.empty(n, device=device).uniform_(-_OCTAVES, _OCTAVES).repeat(2)
        best = torch.zeros(2 * n, samples, device=device)
        loud = torch.zeros(2 * n, 1, dtype=torch.bool, device=device)
        for _ in range(_DRAWS):
            drawn = self._draw(singers.repeat(2), speed, samples)
            best = torch.where(loud, best, drawn)
            loud = best.square().mean(1, keepdim=True).sqrt() > _QUIET
        return peak_normalised(best), singers

    def _draw(self, singers: Tensor, speed: Tensor, samples: int) -> Tensor:
        """Draw a crop of each singer, [n, samples], by linear interpolation; past the recording's end it is silent."""
        which = (torch.rand(len(singers), device=singers.device) * self._n_members[singers]).long()
        recording = self._first_member[singers] + which
        room = (self._length[recording] - samples * speed - 1).clamp(min=0)
        # In double: float would place samples to 1/64 of one.
        start = torch.rand(len(singers), device=singers.device).double() * room
        position = start[:, None] + torch.arange(samples, device=singers.device) * speed[:, None].double()
        whole = position.long()
        inside = whole + 1 < self._length[recording][:, None]
        at = torch.where(inside, self._first[recording][:, None] + whole, 0)
        left, right = self._pcm[at].float(), self._pcm[at + 1].float()
        return torch.where(inside, torch.lerp(left, right, (position - whole).float()) / 32768, 0.0)


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

    As `training.recipes.channel`, less accompaniment and codecs; and with a gain and an erased stretch.
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
    return torch.where(erased, 0.0, out * 10 ** (-_between(n, 0, 12, pcm) / 20))


def _gains(n: int, length: int, device: torch.device) -> Tensor:
    """Draw the gains of equaliser and band limits at the frequencies of a real transform, [n, length // 2 + 1]."""
    hertz = torch.fft.rfftfreq(length, 1 / SAMPLE_RATE, device=device).clamp(min=1)
    place = np.interp(np.log(hertz.cpu().numpy()), np.log(_KNOTS_HZ), np.arange(len(_KNOTS_HZ)))
    between = torch.from_numpy(np.maximum(0, 1 - np.abs(place - np.arange(len(_KNOTS_HZ))[:, None]))).float().to(device)
    like = torch.empty(1, device=device)
    decibels = torch.randn(n, len(_KNOTS_HZ), device=device) * _between(n, 0, 6, like)
    gains = 10 ** (decibels @ between / 20)
    lowest = torch.where(_chance(n, 0.4, like), torch.exp(_between(n, math.log(3400), math.log(16_000), like)), 1e6)
    highest = torch.where(_chance(n, 0.4, like), _between(n, 40, 250, like), 1e-3)
    limited: Tensor = gains / ((1 + (hertz / lowest) ** 8) * (1 + (highest / hertz) ** 4)).sqrt()
    return limited


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


# --- targets --------------------------------------------------------------------------------------------------------


class Ge2e(nn.Module):
    """GE2E (arXiv 1710.10467) with resemblyzer's weights, of whole crops and on any device."""

    window: Tensor
    basis: Tensor

    def __init__(self, weights: Path) -> None:
        """`weights`: resemblyzer's pretrained.pt."""
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        state = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
        self.load_state_dict({name: state[name] for name in self.state_dict()})
        # Its spectra are of 400 samples at 16 kHz, with a hop of 160: here the same 25 and 10 ms, at 44.1 kHz, of which
        # the bins to 8 kHz are taken.
        self._n_fft, self._hop = round(0.025 * SAMPLE_RATE), round(0.01 * SAMPLE_RATE)
        self.register_buffer("window", torch.hann_window(self._n_fft) * (400 / self._n_fft), persistent=False)
        self.register_buffer("basis", torch.from_numpy(_ge2e_basis()), persistent=False)

    @torch.no_grad()
    def forward(self, pcm: Tensor) -> Tensor:
        """Return embeddings, [crops, 256], of `pcm`, [crops, samples] with a peak of 1."""
        level = pcm.square().mean(1, keepdim=True).sqrt().clamp(min=1e-9)
        pcm = pcm * (10 ** (-30 / 20) / level).clamp(min=1)  # only raised, as resemblyzer does
        spectrum = torch.stft(
            pcm, self._n_fft, self._hop, window=self.window, center=True, pad_mode="reflect", return_complex=True
        )[:, : self.basis.shape[1]]
        mel = self.basis @ (spectrum.real.square() + spectrum.imag.square())
        _, (hidden, _) = self.lstm(mel.transpose(1, 2).contiguous())
        return F.normalize(self.linear(hidden[-1]).relu(), dim=1)


def _ge2e_basis() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return the mel basis of 40 bands to 8 kHz on Slaney's scale and norm, [40, 201]."""

    def mel(hertz: np.ndarray) -> np.ndarray:
        return np.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * np.log(np.maximum(hertz, 1e-9) / 1000) / np.log(6.4))

    hertz, bands = np.linspace(0, 8000, 201), np.linspace(0, float(mel(np.array(8000.0))), 42)
    edges = np.where(bands < 15, bands * 200 / 3, 1000 * np.exp(np.log(6.4) * (bands - 15) / 27))
    rising = (hertz - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - hertz) / np.diff(edges)[1:, None]
    weights = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return np.asarray(weights.astype(np.float32))


class Cepstra(nn.Module):
    """Mean and deviation over time of cepstral coefficients and their differences, as the baseline `mfcc`."""

    transform: Tensor

    def __init__(self) -> None:
        super().__init__()
        spec = ModelSpec(name="mfcc", method="mfcc", mel_sample_rate=SAMPLE_RATE, mel_fmax=16_000.0)
        self._mel = MelSpectrogram(spec)
        k, n = np.arange(1, _N_CEPSTRA + 1)[:, None], np.arange(spec.n_mels)[None]
        cosines = np.sqrt(2 / spec.n_mels) * np.cos(np.pi * k * (2 * n + 1) / (2 * spec.n_mels))
        self.register_buffer("transform", torch.from_numpy(cosines.astype(np.float32)), persistent=False)

    @torch.no_grad()
    def forward(self, pcm: Tensor) -> Tensor:
        """Return [crops, 80] of `pcm`, [crops, samples]."""
        cepstrum = self.transform @ (self._mel(pcm) + _POWER_OFFSET).log()
        tracks = torch.cat([cepstrum, torch.gradient(cepstrum, dim=2)[0]], dim=1)
        return torch.cat([tracks.mean(2), tracks.std(2, correction=0)], dim=1)


class Targets(nn.Module):
    """The target of a crop: GE2E's centred embedding beside standardised cepstral statistics of weight `cepstra`.

    Both have length 1 before they are weighed. Mean and deviation are those of the crops given to `fit`.
    """

    def __init__(self, ge2e: Path, cepstra: float) -> None:
        super().__init__()
        self._ge2e, self._cepstra, self._weight = Ge2e(ge2e), Cepstra(), cepstra
        self._centre: Tensor | None = None
        self._scales: tuple[Tensor, Tensor] | None = None

    def fit(self, batches: list[Tensor]) -> None:
        """Take mean and deviation from batches of crops of the length to come."""
        self._centre = torch.cat([self._ge2e(pcm) for pcm in batches]).mean(0)
        statistics = torch.cat([self._cepstra(pcm) for pcm in batches])
        self._scales = statistics.mean(0), statistics.std(0).clamp(min=1e-6)

    def forward(self, pcm: Tensor) -> Tensor:
        """Return targets of length 1, [crops, 336], of `pcm`, [crops, samples] with a peak of 1."""
        if self._centre is None or self._scales is None:
            raise RuntimeError("fit comes first")
        voice = F.normalize(self._ge2e(pcm) - self._centre, dim=1)
        mean, deviation = self._scales
        timbre = F.normalize((self._cepstra(pcm) - mean) / deviation, dim=1)
        return F.normalize(torch.cat([voice, self._weight * timbre], dim=1), dim=1)
