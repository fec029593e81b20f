"""A CUDA device, or a skip; a failure where SINGEREMBED_REQUIRE_GPU=1 says that there must be one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from singerembed.engine.cuda_driver import CudaDevice, device_count
from singerembed.errors import SingerEmbedError
from singerembed.model.mel import require_cuda_kernels


@pytest.fixture(scope="session")
def gpu() -> None:
    """Pass where the GPU path can work."""
    reason = "there is no CUDA device"
    try:
        require_cuda_kernels()
        if device_count() > 0:
            return
    except SingerEmbedError as exc:
        reason = str(exc)
    if os.environ.get("SINGEREMBED_REQUIRE_GPU") == "1":
        pytest.fail(f"SINGEREMBED_REQUIRE_GPU=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture
def device(gpu: None) -> Iterator[CudaDevice]:
    """The first device, open in this thread."""
    device = CudaDevice()
    yield device
    device.close()
