"""A separator on a GPU: its voices against those on the CPU."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
import tolerances

from singerembed.engine import onnxruntime_cuda
from singerembed.engine.build_separator import difference_db, kept_samples, verification_segment
from singerembed.engine.file import read_separator_file
from singerembed.engine.separator import Separator
from singerembed.model.separator_spec import SpectrogramSpec

pytest_plugins = ["gpu_device"]


def test_voices_are_those_of_the_cpu(gpu: None, separator_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        required = os.environ.get("SINGEREMBED_REQUIRE_GPU") == "1"
        (pytest.fail if required else pytest.skip)("onnxruntime-gpu is not installed")
    file = read_separator_file(separator_path)
    on_gpu = Separator(file)
    assert on_gpu.description.endswith("(CUDA)")
    monkeypatch.setattr(onnxruntime_cuda, "is_usable", lambda: False)
    on_cpu = Separator(file)
    assert isinstance(file.spec, SpectrogramSpec)
    segment = verification_segment(file.spec)
    segments = [np.roll(segment, 1000 * i, axis=0) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(on_gpu.vocals, segments))
    for vocals, mixture in zip(found, segments, strict=True):
        expected = kept_samples(on_cpu.vocals(mixture), file.spec)
        assert difference_db(kept_samples(vocals, file.spec), expected) < tolerances.SEPARATED_DB
    np.testing.assert_array_equal(on_gpu.vocals(segments[3]), found[3])  # alone and in company
