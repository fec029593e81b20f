"""The Python interface of the compiled mel kernels. Only `encoder.py` imports the extension besides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

try:
    from singerembed import _csrc
except ImportError as exc:
    raise ImportError(
        f"singerembed's compiled part is missing in {__file__}. In its source folder, Python finds the sources before "
        "the installed package: install it with pip install -e . or work in another folder"
    ) from exc
from singerembed.errors import EngineError
from singerembed.model.spec import ModelSpec

LOUD, SILENT, INVALID = _csrc.LOUD, _csrc.SILENT, _csrc.INVALID

DEFAULT_SILENCE_DBFS = -60.0

Pcm = NDArray[np.int16] | NDArray[np.float32]

# The structs of csrc/mel_device.h: the measured level of a crop, and the location of a crop on the device.
DEVICE_LEVEL = np.dtype([("peak", "<f4"), ("rms", "<f4"), ("scale", "<f4"), ("state", "<i4")])
DEVICE_CROP = np.dtype([("pcm", "<u8"), ("scale", "<f4"), ("is_int16", "<i4")])


@dataclass(frozen=True)
class MelBatch:
    """Spectrograms and levels of a batch of n crops."""

    mel: NDArray[np.float32]  # [loud crops, n_mels, n_frames], in the order of the loud crops
    peak: NDArray[np.float32]  # [n], full scale is 1; NaN in an invalid crop
    rms: NDArray[np.float32]  # [n]
    state: NDArray[np.uint8]  # [n] of LOUD, SILENT (peak not above the threshold), INVALID (NaN or infinity)


class MelExtractor:
    """Computes log-mel spectrograms of crops on the CPU, as csrc/mel.h defines them. Thread-safe."""

    def __init__(self, spec: ModelSpec, silence_dbfs: float = DEFAULT_SILENCE_DBFS, *, isa: str = "") -> None:
        """Prepare the tables for `spec`.

        `silence_dbfs`: a crop whose peak is not above it is silent. `isa`: one of `available_isas()`, or empty for the
        widest that this processor supports. Raises ValueError for a spec that the kernels were not compiled for.
        """
        self.plan = _csrc.MelPlan(_options(spec, silence_dbfs), isa=isa)  # for the compiled encoder

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self.plan.isa

    @property
    def basis(self) -> NDArray[np.float32]:
        """The mel basis, [n_mels, n_fft / 2 + 1], in 1/Hz."""
        return self.plan.mel_basis

    def log_mel(self, crops: Pcm) -> MelBatch:
        """Compute normalised log-mel spectrograms of `crops`, int16 or float32 [n, crop_samples], C-contiguous."""
        return MelBatch(*self.plan.run(crops))

    def power(self, crops: Pcm) -> MelBatch:
        """Compute mel power spectrograms: as `log_mel`, but before the logarithm."""
        return MelBatch(*self.plan.run(crops, power=True))


def _options(spec: ModelSpec, silence_dbfs: float) -> _csrc.MelOptions:
    if (spec.n_fft, spec.hop_samples) != (_csrc.FFT_SIZE, _csrc.HOP_SAMPLES):
        raise ValueError(
            f"the mel extension computes {_csrc.FFT_SIZE}-sample frames {_csrc.HOP_SAMPLES} apart; "
            f"this model has {spec.n_fft} and {spec.hop_samples}"
        )
    return _csrc.MelOptions(
        crop_samples=spec.crop_samples,
        n_mels=spec.n_mels,
        mel_sample_rate=spec.mel_sample_rate,
        mel_fmin=spec.mel_fmin,
        mel_fmax=spec.mel_fmax,
        log_offset=spec.log_offset,
        log_divisor=spec.log_divisor,
        silence_peak=10 ** (silence_dbfs / 20),
    )


def require_cuda_kernels() -> None:
    """Raise EngineError if the extension was compiled without CUDA kernels."""
    if not _csrc.HAS_CUDA:
        raise EngineError(
            "this singerembed was built without its CUDA kernels. Put nvcc (a CUDA toolkit) on the PATH and install it "
            "again with: pip install . -C cmake.define.SINGEREMBED_CUDA=ON"
        )


def cuda_mel(spec: ModelSpec, silence_dbfs: float = DEFAULT_SILENCE_DBFS) -> _csrc.DeviceMel:
    """Return the CUDA kernels for `spec`, in the current CUDA context.

    Raises EngineError if the extension was compiled without them, or without code for this GPU.
    """
    require_cuda_kernels()
    try:
        return _csrc.make_cuda_mel(_options(spec, silence_dbfs))
    except RuntimeError as exc:
        raise EngineError(str(exc)) from exc


def emulated_mel(spec: ModelSpec, silence_dbfs: float = DEFAULT_SILENCE_DBFS, *, order: int = 0) -> _csrc.EmulatedMel:
    """Return the same kernels emulated on the host, thread by thread, with host addresses. For tests.

    `order` of the threads between barriers: 0 ascending, 1 descending, else the seed of a shuffle.
    """
    return _csrc.EmulatedMel(_options(spec, silence_dbfs), order=order)


def available_isas() -> list[str]:
    """Return the instruction sets that extension and processor support, narrowest first."""
    return _csrc.available_isas()


def mel_basis(spec: ModelSpec) -> NDArray[np.float32]:
    """Return the mel basis, [n_mels, n_fft / 2 + 1], in 1/Hz: triangles of equal area on Slaney's mel scale."""
    return MelExtractor(spec).basis


def as_float(pcm: Pcm) -> NDArray[np.float32]:
    """Return `pcm` as float32, full scale 1: decoders of one recording give one or the other."""
    return pcm.astype(np.float32) / np.float32(32768) if pcm.dtype == np.int16 else pcm  # type: ignore[return-value]


def mix_down(pcm: NDArray[np.float32], segment: int) -> tuple[NDArray[np.float32], int]:
    """Average the channels, or take the loudest if they cancel: float32 [frames, channels] to float32 [frames].

    Channels cancel in a segment of `segment` frames if the energy of their mean is below 1 % of what it would be with
    only the second loudest channel. Return the signal, and the number of segments in which they cancel.
    """
    return _csrc.mix_down(pcm, segment)
