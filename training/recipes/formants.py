"""Moves the formants of voices, on the device that they are on, and leaves their pitch: a longer or shorter throat."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_N_FFT, _HOP = 2048, 512
# Quefrencies of the envelope, in samples at 44.1 kHz: 1.1 ms, below the period of all but the highest notes.
_ENVELOPE_QUEFRENCIES = 50
_FLOOR = 1e-4  # of a magnitude, relative to the loudest of its row
_MOST_DB = 20.0  # that a frequency is raised or lowered


def with_moved_formants(pcm: Tensor, factor: Tensor) -> Tensor:
    """Return `pcm`, [n, samples] at 44.1 kHz, with each row's spectral envelope stretched by its `factor`, [n].

    The envelope is the smooth part of the log magnitudes (their cepstrum's first quefrencies); each frequency is raised
    from the envelope that it has to the stretched one, and phases stay.
    """
    window = torch.hann_window(_N_FFT, device=pcm.device)
    spectrum = torch.stft(pcm, _N_FFT, _HOP, window=window, return_complex=True)
    magnitude = spectrum.abs()
    floor = _FLOOR * magnitude.amax((1, 2), keepdim=True).clamp(min=1e-9)
    cepstrum: Tensor = torch.fft.irfft((magnitude + floor).log(), dim=1)
    lifter = torch.zeros(_N_FFT, 1, device=pcm.device)
    lifter[0], lifter[1:_ENVELOPE_QUEFRENCIES] = 1, 2  # the cepstrum is symmetric: twice its first half
    envelope = torch.fft.rfft(cepstrum * lifter, dim=1).real
    last = envelope.shape[1] - 1
    place = (torch.arange(last + 1, device=pcm.device) / factor[:, None]).clamp(max=last)
    below = place.floor().long().clamp(max=last - 1)
    share = (place - below)[:, :, None]
    low, high = (envelope.gather(1, at[:, :, None].expand(-1, -1, envelope.shape[2])) for at in (below, below + 1))
    most = _MOST_DB * math.log(10) / 20
    gain = (torch.lerp(low, high, share.expand_as(low)) - envelope).clamp(-most, most).exp()
    return torch.istft(spectrum * gain, _N_FFT, _HOP, window=window, length=pcm.shape[1])
