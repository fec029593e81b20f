"""The CUDA kernels as the compiler made them: what spills pays, and shared memory needs no special request."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from cuda_resources import ARCHITECTURES, MOST_SPILLED, NVCC, compile_report, parse

REPORT = """\
ptxas info    : Compiling entry function '_ZN11singerembed44_GLOBAL__N__a6ec61b5_11_mel_cuda_cu_6be1596b10mel_kernelENS_6MelJobE' for 'sm_90'
ptxas info    : Function properties for _ZN11singerembed
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size, 34304 bytes smem
"""  # noqa: E501


def test_a_report_is_read() -> None:
    assert parse(REPORT) == [
        {"kernel": "mel", "compute_capability": "9.0", "registers": 128, "spill_bytes": 20, "shared_bytes": 34304}
    ]


@pytest.mark.skipif(shutil.which(NVCC) is None, reason="no nvcc on the PATH, or as CUDACXX (pip: nvidia-cuda-nvcc)")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_suffice(architecture: str) -> None:
    kernels = parse(compile_report(architecture))
    assert {kernel["kernel"].split()[0] for kernel in kernels} == {"level", "mel", "normalise", "voice"}
    assert len(kernels) == 6
    for kernel in kernels:
        assert kernel["spill_bytes"] <= MOST_SPILLED, kernel
        assert kernel["shared_bytes"] <= 48 * 1024, kernel
