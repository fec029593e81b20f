import numpy as np
from numpy.typing import NDArray

FFT_SIZE: int
HOP_SAMPLES: int
LOUD: int
SILENT: int
INVALID: int

def available_isas() -> list[str]: ...
def mix_down(pcm: NDArray[np.float32]) -> NDArray[np.float32]: ...

class MelPlan:
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
        isa: str = "",
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def mel_basis(self) -> NDArray[np.float32]: ...
    def run(
        self, pcm: NDArray[np.int16] | NDArray[np.float32], *, power: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]: ...
