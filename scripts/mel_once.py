"""Launches the mel kernels once on a batch of crops, for a profiler: ncu ... python scripts/mel_once.py"""

from __future__ import annotations

import sys

import numpy as np
from gpu_kernels import NoiseBatch

from singerembed.engine.cuda_driver import CudaDevice
from singerembed.errors import SingerEmbedError

CROPS = 64


def main() -> int:
    """Upload, measure levels, launch, and wait."""
    try:
        device = CudaDevice()
        batch = NoiseBatch(device, CROPS, np.int16)
        batch.upload()
        batch.level()
        batch.list_crops()
        batch.mel()
        device.synchronize()
        batch.free()
        device.close()
    except SingerEmbedError as exc:
        print(f"Error: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
