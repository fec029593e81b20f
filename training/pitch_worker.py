"""Worker process that shifts pitch with Praat: requests on stdin, replies on stdout.

It is a process because Praat's "Change gender" cannot be interrupted, and was seen to hang for minutes on short, noisy
speech. It imports only numpy and parselmouth, to start quickly.
"""

from __future__ import annotations

import contextlib
import math
import signal
import struct
import sys
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

# Request: number of samples, sample rate in Hz, pitch ratio, pitch range ratio, seed; then the samples, float32.
# Reply: number of samples; then the samples, float32.
REQUEST = struct.Struct("<qdddq")
REPLY = struct.Struct("<q")

# Pitch range of the paper's code, Hz. Praat's manual advises a time step of 0.75 to 0.8 periods of the floor.
PITCH_FLOOR, PITCH_CEILING = 75.0, 600.0

Samples = NDArray[np.float32]


def shift_pitch(pcm: Samples, sample_rate: float, ratio: float, range_ratio: float, seed: int) -> Samples:
    """Multiply the pitch of `pcm` by `ratio`, and its range about the median by `range_ratio`, preserving formants.

    Return as many samples as given; audio without pitch is returned unchanged. Method: PSOLA, Praat's "Change gender"
    with a formant shift ratio of 1.
    """
    # Not at the top: a training reads REQUEST and REPLY here, and Praat belongs in a process of its own.
    import parselmouth
    from parselmouth.praat import call, run

    # Praat places periods at random in unvoiced parts.
    run(f"random_initializeWithSeedUnsafelyButPredictably ({seed})")
    sound = parselmouth.Sound(pcm.astype(np.float64), sampling_frequency=sample_rate)
    pitch = call(sound, "To Pitch", 0.8 / PITCH_FLOOR, PITCH_FLOOR, PITCH_CEILING)
    median = call(pitch, "Get quantile", 0.0, 0.0, 0.5, "Hertz")
    if math.isnan(median):
        return pcm
    lowest = call(pitch, "Get minimum", 0.0, 0.0, "Hertz", "Parabolic")
    if median + (lowest - median) * range_ratio <= 0:  # the lowest pitch would become negative
        range_ratio = 1.0
    shifted = call((sound, pitch), "Change gender", 1.0, median * ratio, range_ratio, 1.0)
    samples = np.zeros_like(pcm)
    values = shifted.values[0, : len(pcm)]
    samples[: len(values)] = values
    return samples


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until the end of `requests`."""
    import parselmouth

    while header := requests.read(REQUEST.size):
        n_samples, sample_rate, ratio, range_ratio, seed = REQUEST.unpack(header)
        pcm = np.frombuffer(requests.read(4 * n_samples), np.float32)
        with contextlib.suppress(parselmouth.PraatError):  # a crop that Praat rejects is returned unchanged
            pcm = shift_pitch(pcm, sample_rate, ratio, range_ratio, seed)
        replies.write(REPLY.pack(len(pcm)))
        replies.write(np.ascontiguousarray(pcm, np.float32).tobytes())
        replies.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C; its end closes our stdin
    serve(sys.stdin.buffer, sys.stdout.buffer)
