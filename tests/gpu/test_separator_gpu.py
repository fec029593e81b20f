"""A separator on a GPU: its voices against those on the CPU. torch stands in for TensorRT where that is not."""

from __future__ import annotations

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tolerances
from test_engines_gpu import cosine
from test_engines_gpu import through_torch as engine_by_torch

from singerembed.audio.crops import CropBlock
from singerembed.engine import onnxruntime_cuda
from singerembed.engine import separator as separators
from singerembed.engine.build_separator import (
    SeparatorOptions,
    build_separator,
    difference_db,
    kept_samples,
    made_mixture,
    verification_segment,
)
from singerembed.engine.cuda_driver import CudaDevice
from singerembed.engine.file import SeparatorFile, read_separator_file
from singerembed.engine.separation import Separation, open_separation
from singerembed.engine.separator import Separator
from singerembed.engine.separator_gpu import LANES, CropMix, SegmentRunner, separator_tensors
from singerembed.model.mel import DEFAULT_SILENCE_DBFS
from singerembed.model.separator_spec import SpectrogramSpec
from singerembed.model.tensorflow_checkpoint import read_tensorflow_checkpoint

ALL_DB = -199.0  # every voice counts
PREFIX = str(Path(__file__).parents[1] / "engine" / "data" / "spleeter-tiny" / "model")

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


@pytest.mark.parametrize("backend", ["torch", "tensorrt", "tensorrt-rtx"])
def test_plans_and_their_runtime(
    gpu: None, backend: str, separator_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In FP16, from more callers than lanes, segments of two sizes."""
    file = read_separator_file(separator_path)
    if importlib.util.find_spec(backend.replace("-", "_")) is None:
        pytest.skip(f"{backend} is not installed")
    if backend == "torch":
        on_gpu = Separator(through_torch(file, monkeypatch))
    else:
        build_separator(PREFIX, str(tmp_path / "plan.engine"), SeparatorOptions(backend))
        on_gpu = Separator(read_separator_file(str(tmp_path / "plan.engine")))
    monkeypatch.setattr(onnxruntime_cuda, "is_usable", lambda: False)
    on_cpu = Separator(file)
    assert isinstance(file.spec, SpectrogramSpec)
    mixture = made_mixture(file.spec.stem_segment_samples, file.spec.sample_rate)
    crop = file.spec.segment_samples(4 * file.spec.sample_rate)
    segments = [np.roll(mixture, 1000 * i, axis=0)[: None if i % 8 == 7 else crop] for i in range(24)]
    with ThreadPoolExecutor(LANES + 4) as pool:
        found = list(pool.map(on_gpu.vocals, segments))
    for vocals, segment in zip(found, segments, strict=True):
        assert difference_db(vocals, on_cpu.vocals(segment)) < tolerances.SEPARATED_FP16_DB
    np.testing.assert_array_equal(on_gpu.vocals(segments[3]), found[3])  # alone and in company
    on_gpu.close()


def through_torch(file: SeparatorFile, monkeypatch: pytest.MonkeyPatch) -> SeparatorFile:
    """A separator whose network runs in torch; device, buffers and runtime are the real ones."""
    import torch
    from torch_network import TorchSegments

    from singerembed.engine.spleeter import load_spleeter

    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here")
    network, tensors = load_spleeter(read_tensorflow_checkpoint(PREFIX)).in_fp16(), separator_tensors(file.spec)

    def open_plan(_file: SeparatorFile, _device: int, crop_mix: CropMix | None) -> SegmentRunner:
        assert isinstance(file.spec, SpectrogramSpec)
        spec = file.spec
        return SegmentRunner(
            tensors, CudaDevice, lambda device: TorchSegments(network, spec, tensors, device.index), crop_mix
        )

    monkeypatch.setattr(separators, "open_plan", open_plan)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # TensorRT is
    return replace(file, backend="tensorrt")


def test_voices_stay_on_the_gpu(
    gpu: None, separator_path: str, release_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From several callers, the embeddings are those of voices that went by way of the host."""
    engine = engine_by_torch(str(release_folder))
    file = through_torch(read_separator_file(separator_path), monkeypatch)
    there = open_separation(file, engine.spec, ALL_DB, DEFAULT_SILENCE_DBFS)
    assert isinstance(file.spec, SpectrogramSpec)
    n, crop = file.spec.segment_samples(engine.spec.crop_samples), engine.spec.crop_samples
    mixture = made_mixture(n, file.spec.sample_rate)
    pcm = np.stack([np.roll(mixture, 1000 * i, axis=0) for i in range(4)])
    start = np.arange(4) * crop
    block = CropBlock(pcm, list(range(4)), start, start + n)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: there.embed(block, engine), range(12)))
    there.close()
    here = Separation(Separator(file), engine.spec, ALL_DB, DEFAULT_SILENCE_DBFS)
    _, expected, ratio = here.embed(block, engine)
    here.close()
    engine.close()
    for _, embedded, of_voices in found:
        np.testing.assert_array_equal(embedded.state, expected.state)
        np.testing.assert_allclose(of_voices, ratio, atol=1e-3)
        assert cosine(embedded.embedding, expected.embedding) >= tolerances.EMBEDDING_COSINE_FP16
