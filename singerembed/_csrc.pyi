import numpy as np
from numpy.typing import NDArray

FFT_SIZE: int
HOP_SAMPLES: int
LOUD: int
SILENT: int
INVALID: int
HAS_CUDA: bool

def available_isas() -> list[str]: ...
def available_int8_isas() -> list[str]: ...
def mix_down(pcm: NDArray[np.float32], segment: int) -> tuple[NDArray[np.float32], int]: ...

class MelOptions:
    def __init__(
        self,
        *,
        crop_samples: int,
        n_mels: int,
        mel_sample_rate: float,
        mel_fmin: float,
        mel_fmax: float,
        log_offset: float,
        log_divisor: float,
        silence_peak: float,
    ) -> None: ...

class MelPlan:
    def __init__(self, options: MelOptions, *, isa: str = "") -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def mel_basis(self) -> NDArray[np.float32]: ...
    def run(
        self, pcm: NDArray[np.int16] | NDArray[np.float32], *, power: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]: ...

class Encoder:
    def __init__(
        self,
        weights: NDArray[np.float32],
        *,
        n_mels: int,
        n_frames: int,
        embedding_dim: int,
        int8: bool = False,
        isa: str = "",
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    def embed(
        self, plan: MelPlan, pcm: NDArray[np.int16] | NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]: ...
    def encode(self, log_mel: NDArray[np.float32]) -> NDArray[np.float32]: ...
    def trace(self, log_mel: NDArray[np.float32]) -> list[tuple[NDArray[np.float32], float]]: ...

class DeviceMel:
    def scratch_bytes(self, crops: int) -> int: ...
    def level(self, pcm: int, *, is_int16: bool, crops: int, levels: int, stream: int) -> None: ...
    def mel(
        self, list: int, *, crops: int, scratch: int, out: int, stream: int, half: bool, power: bool = False
    ) -> None: ...

class EmulatedMel(DeviceMel):
    def __init__(self, options: MelOptions, *, order: int = 0) -> None: ...
    def traffic(self) -> dict[str, tuple[int, int]]: ...

def emulate_mix_voice(
    *,
    voice: int,
    channels: int,
    stride: int,
    first: int,
    samples: int,
    crop_samples: int,
    segment: int,
    mono: int,
    energies: int,
    order: int,
) -> None: ...
def emulate_missing_barrier() -> None: ...

# Only where HAS_CUDA.
def mix_voice(
    *,
    voice: int,
    channels: int,
    stride: int,
    first: int,
    samples: int,
    crop_samples: int,
    segment: int,
    mono: int,
    energies: int,
    stream: int,
) -> None: ...
def make_cuda_mel(options: MelOptions) -> DeviceMel: ...

class CapturedGraph:
    def __init__(self, stream: int) -> None: ...
    def finish(self) -> None: ...
    def abandon(self) -> None: ...
    def launch(self, stream: int) -> None: ...
