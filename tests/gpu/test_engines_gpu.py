"""The engines on a GPU: embeddings against the official ones, callers at once, batches of every kind."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import Golden
from numpy.typing import NDArray
from tolerances import EMBEDDING_COSINE, EMBEDDING_COSINE_FP16

from singerembed.engine.build import BuildOptions, build_engine
from singerembed.engine.cuda_driver import CudaDevice
from singerembed.engine.gpu import GpuEngine
from singerembed.engine.load import load_engine
from singerembed.engine.tensorrt_build import PlanOptions
from singerembed.model.mel import LOUD, SILENT

PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx", "onnxruntime": "onnxruntime", "torch": "torch"}
KINDS = [
    ("tensorrt", "fp16"),
    ("tensorrt", "fp32"),
    ("tensorrt-rtx", "fp16"),
    ("onnxruntime", "fp32"),  # in FP16 on CUDA its cosine is 0.99935, and build-engine refuses it
    ("torch", "fp16"),
]

pytest_plugins = ["gpu_device"]  # no conftest.py here: it would take the place of tests/conftest.py in imports


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def engine(
    gpu: None, request: pytest.FixtureRequest, release_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GpuEngine]:
    backend, precision = request.param
    if importlib.util.find_spec(PACKAGES[backend]) is None:
        pytest.skip(f"{PACKAGES[backend]} is not installed")
    if backend == "onnxruntime" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    if backend == "torch":
        by_torch = through_torch(str(release_folder))
        yield by_torch
        by_torch.close()
        return
    path = str(tmp_path_factory.mktemp("engine") / "gpu.engine")
    options = BuildOptions(backend, precision=precision, plan=PlanOptions(max_batch=16))
    build_engine(str(release_folder), path, options, say=lambda _what, _text: None)
    engine = load_engine(path)
    assert isinstance(engine, GpuEngine), f"{backend} did not go to the GPU: {engine.description}"
    yield engine
    engine.close()


def through_torch(checkpoint: str) -> GpuEngine:
    """The engine of a checkpoint whose network runs in torch; kernels, ring and worker are the real ones."""
    import torch
    from torch_network import TorchNetwork

    from singerembed.model.checkpoint import load_checkpoint

    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here")
    loaded = load_checkpoint(checkpoint)
    spec = replace(loaded.spec, precision="fp16")
    return GpuEngine(spec, CudaDevice, lambda device: TorchNetwork(loaded, device.index))


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def at_least(engine: GpuEngine) -> float:
    return EMBEDDING_COSINE_FP16 if engine.spec.precision == "fp16" else EMBEDDING_COSINE


@pytest.mark.parametrize("sample_type", [np.int16, np.float32])
def test_equals_the_official_pipeline(engine: GpuEngine, golden: Golden, sample_type: type) -> None:
    pcm = golden.pcm if sample_type is np.int16 else golden.pcm.astype(np.float32) / np.float32(32768)
    assert cosine(engine.embed(pcm).embedding, golden.embedding) >= at_least(engine)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
def test_any_number_of_crops(engine: GpuEngine, golden: Golden, n: int) -> None:
    """Full batches go through a captured graph, ragged ones do not; both give what a crop gives alone."""
    which = np.arange(n) % len(golden.pcm)
    assert cosine(engine.embed(golden.pcm[which]).embedding, golden.embedding[which]) >= at_least(engine)


def test_many_callers(engine: GpuEngine, golden: Golden) -> None:
    def call(i: int) -> None:
        which = (np.arange(1 + 5 * i % 37) + i) % len(golden.pcm)
        pcm = golden.pcm[which]
        pcm[i % 3 :: 3] = 0
        result = engine.embed(pcm)
        np.testing.assert_array_equal(result.state == SILENT, (pcm == 0).all(axis=1))
        if (result.state == LOUD).any():
            assert cosine(result.embedding, golden.embedding[which][result.state == LOUD]) >= at_least(engine)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(call, range(48)))
