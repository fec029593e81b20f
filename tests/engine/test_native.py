"""The encoder in C++: against torch layer by layer, on every instruction set, alone and in company."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tolerances
from conftest import Golden
from numpy.typing import NDArray
from onnx import numpy_helper

from singerembed.engine import build, native
from singerembed.engine.build import BuildOptions, build_engine, compare, export_onnx
from singerembed.engine.file import EngineFile, read_engine_file
from singerembed.engine.load import bundled_engine_path, open_engine
from singerembed.engine.native import NativeEngine, flat_weights
from singerembed.engine.onnx_tensors import read_layers
from singerembed.engine.onnxruntime import OnnxRuntimeEngine
from singerembed.engine.torch import TorchEngine, load_encoder
from singerembed.errors import EngineError, UsageError
from singerembed.model.checkpoint import Checkpoint, load_checkpoint
from singerembed.model.encoder import CompiledEncoder
from singerembed.model.mel import INVALID, LOUD, SILENT, MelExtractor, available_isas


@pytest.fixture(scope="module")
def checkpoint(release_folder: Path) -> Checkpoint:
    return load_checkpoint(str(release_folder))


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> bytes:
    return export_onnx(checkpoint)


@pytest.fixture(scope="module")
def file(checkpoint: Checkpoint, model: bytes) -> EngineFile:
    return EngineFile(checkpoint.spec, "native", model, {}, {})


@pytest.fixture(scope="module")
def engine(file: EngineFile) -> NativeEngine:
    return NativeEngine(file)


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint, log_mel: NDArray[np.float32]) -> NDArray[np.float32]:
    return TorchEngine(checkpoint).encode(log_mel)


@pytest.fixture(scope="module")
def log_mel(checkpoint: Checkpoint, golden: Golden) -> NDArray[np.float32]:
    return MelExtractor(checkpoint.spec).log_mel(golden.pcm).mel


def assert_near(embedding: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    reached = compare(embedding, expected)
    assert reached.cosine >= tolerances.NATIVE_COSINE
    assert reached.difference <= tolerances.NATIVE_DIFFERENCE


def test_official_embeddings(engine: NativeEngine, golden: Golden) -> None:
    reached = compare(engine.embed(golden.pcm).embedding, golden.embedding)
    assert reached.cosine >= tolerances.EMBEDDING_COSINE
    assert reached.difference <= tolerances.EMBEDDING_DIFFERENCE


@pytest.mark.parametrize("isa", available_isas())
def test_embeddings_of_torch_on_every_instruction_set(
    file: EngineFile, expected: NDArray[np.float32], log_mel: NDArray[np.float32], isa: str
) -> None:
    compiled = NativeEngine(file, isa=isa)
    assert compiled.encoder.isa == isa
    assert_near(compiled.encoder.encode(log_mel), expected)


def test_random_crops(engine: NativeEngine, checkpoint: Checkpoint) -> None:
    """Noise of two colours and all levels.

    Not spectrograms that no sound has: there torch differs from float64 by as much as by one per cent.
    """
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((8, checkpoint.spec.crop_samples))
    noise[::2] = noise[::2].cumsum(axis=1)
    noise -= noise.mean(axis=1, keepdims=True)
    levels = 10 ** rng.uniform(-2, 0, (8, 1))
    crops = (noise / np.abs(noise).max(axis=1, keepdims=True) * levels).astype(np.float32)
    assert_near(engine.embed(crops).embedding, TorchEngine(checkpoint).embed(crops).embedding)


@pytest.mark.parametrize("isa", available_isas())
def test_every_bottleneck(file: EngineFile, checkpoint: Checkpoint, log_mel: NDArray[np.float32], isa: str) -> None:
    import torch

    expected: list[NDArray[np.float32]] = []
    encoder = load_encoder(checkpoint)
    stages: Any = encoder.net.features
    for stage in list(stages)[1:8]:
        for bottleneck in stage:
            bottleneck.register_forward_hook(lambda _module, _given, out: expected.append(out[0].numpy()))
    with torch.inference_mode():
        encoder(torch.from_numpy(log_mel[:1]))
    traced = NativeEngine(file, isa=isa).encoder.trace(log_mel[0])
    assert len(traced) == len(expected) == 16
    for number, ((out, seconds), wanted) in enumerate(zip(traced, expected, strict=True)):
        assert out.shape == wanted.shape
        assert np.abs(out - wanted).max() <= tolerances.NATIVE_MAP * np.abs(wanted).max(), f"bottleneck {number}"
        assert seconds > 0


@pytest.mark.parametrize(("n_mels", "samples"), [(127, 176_400), (128, 176_400 - 512), (97, 100_000)])
def test_other_sizes_and_their_borders(
    checkpoint: Checkpoint, model: bytes, log_mel: NDArray[np.float32], n_mels: int, samples: int
) -> None:
    """Odd and even sides: the stem's border lies on other pixels."""
    spec = replace(checkpoint.spec, n_mels=n_mels, crop_samples=samples)
    compiled = CompiledEncoder(spec, flat_weights(model, spec))
    part = log_mel[:2, :n_mels, : spec.n_frames].copy()
    assert_near(compiled.encode(part), TorchEngine(replace(checkpoint, spec=spec)).encode(part))
    with pytest.raises(ValueError, match=f"{n_mels} x {spec.n_frames}"):
        compiled.encode(part[:, :, 1:].copy())


@pytest.mark.parametrize("isa", available_isas())
def test_a_crop_gives_the_same_bits_in_any_company(file: EngineFile, golden: Golden, isa: str) -> None:
    engine = NativeEngine(file, isa=isa)
    together = engine.embed(golden.pcm).embedding
    for size in (1, 2, 3, 5):
        for start in range(0, 8, size):
            part = engine.embed(golden.pcm[start : start + size]).embedding
            assert np.array_equal(part, together[start : start + size])
    assert np.array_equal(engine.embed(golden.pcm[::-1].copy()).embedding[::-1], together)


def test_threads_share_one_engine(engine: NativeEngine, golden: Golden) -> None:
    together = engine.embed(golden.pcm).embedding
    with ThreadPoolExecutor(5) as pool:
        results = list(pool.map(lambda i: engine.embed(golden.pcm[i % 6 : i % 6 + 3]).embedding, range(24)))
    for i, embedding in enumerate(results):
        assert np.array_equal(embedding, together[i % 6 : i % 6 + 3])


def test_silent_and_invalid_crops_are_left_out(engine: NativeEngine, golden: Golden) -> None:
    loud = (golden.pcm[:2] / 32768).astype(np.float32)
    silent = np.zeros_like(loud[0])
    crops = np.stack([silent, loud[0], silent, loud[1]]).astype(np.float32)
    crops[2] = np.nan
    result = engine.embed(crops)
    assert result.state.tolist() == [SILENT, LOUD, INVALID, LOUD]
    assert np.array_equal(result.embedding, engine.embed(loud).embedding)
    levels = MelExtractor(engine.spec).log_mel(crops)
    assert np.array_equal(result.peak, levels.peak, equal_nan=True)
    assert np.array_equal(result.rms, levels.rms, equal_nan=True)
    assert engine.embed(crops[:1]).embedding.shape == (0, 1000)
    with pytest.raises(ValueError, match="samples"):
        engine.embed(crops[:, 1:].copy())


def test_an_engine_built_for_it_says_so_and_was_verified(
    release_folder: Path, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "native.engine")
    build_engine(str(release_folder), path, BuildOptions("native"))
    built = read_engine_file(path)
    assert built.backend == "native"
    assert built.verification["cosine"] >= tolerances.NATIVE_COSINE
    here = native.has_kernels()
    opened = open_engine(built)
    assert isinstance(opened, NativeEngine if here else OnnxRuntimeEngine)
    monkeypatch.setattr(native, "has_kernels", lambda: False)
    elsewhere = open_engine(built)
    assert isinstance(elsewhere, OnnxRuntimeEngine)
    assert_near(opened.embed(golden.pcm).embedding, elsewhere.embed(golden.pcm).embedding)


@pytest.mark.parametrize(
    ("kernels", "ratio", "precision", "backend"),
    [
        (True, 1.2, "fp32", "native"),
        (True, 1.05, "fp32", "onnxruntime"),
        (False, 9.0, "fp32", "onnxruntime"),
        (True, 9.0, "fp16", "onnxruntime"),
    ],
)
def test_it_is_the_default_where_it_is_faster(
    file: EngineFile, monkeypatch: pytest.MonkeyPatch, kernels: bool, ratio: float, precision: str, backend: str
) -> None:
    monkeypatch.setattr(build, "has_kernels", lambda: kernels)
    monkeypatch.setattr(build, "uses_onnxruntime_gpu", lambda: False)
    monkeypatch.setattr(build, "times_as_fast", lambda _file, _crops: ratio)
    said: list[str] = []
    network = replace(file, spec=replace(file.spec, precision=precision))
    assert build._faster_on_this_cpu(network, lambda what, text: said.append(what + text)) == backend
    assert len(said) == (1 if kernels and precision == "fp32" else 0)


def test_the_trial_compares_the_two(file: EngineFile, golden: Golden) -> None:
    assert 0 < native.times_as_fast(file, golden.pcm[:1]) < 1000


def test_what_it_cannot_run(release_folder: Path, file: EngineFile, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fp32 or int8"):
        build_engine(str(release_folder), str(tmp_path / "x"), BuildOptions("native", precision="fp16"))
    with pytest.raises(UsageError, match="onnxruntime does not compute in int8"):
        build_engine(str(release_folder), str(tmp_path / "x"), BuildOptions("onnxruntime", precision="int8"))
    with pytest.raises(EngineError, match="fp16"):
        NativeEngine(replace(file, spec=replace(file.spec, precision="fp16")))
    with pytest.raises(EngineError, match="more weights than were given"):
        NativeEngine(replace(file, spec=replace(file.spec, embedding_dim=1001)))
    with pytest.raises(EngineError, match="cannot be read"):
        NativeEngine(replace(file, payload=file.payload[:-1000]))
    with pytest.raises(EngineError, match="not the encoder's network"):
        NativeEngine(replace(file, payload=b""))


def test_equal_weights_that_the_exporter_stores_once(checkpoint: Checkpoint, log_mel: NDArray[np.float32]) -> None:
    """As in a network whose biases have not been trained."""
    import torch

    state = {name: torch.zeros_like(t) if name.endswith("bias") else t for name, t in checkpoint.state_dict.items()}
    state |= {name: torch.zeros_like(t) for name, t in state.items() if name.endswith("running_mean")}
    untrained = replace(checkpoint, state_dict=state)
    model = export_onnx(untrained)
    stored = onnx.load_from_string(model).graph.initializer
    assert sum(tensor.data_type == onnx.TensorProto.FLOAT for tensor in stored) < len(read_layers(model)) * 2
    encoder = NativeEngine(EngineFile(checkpoint.spec, "native", model, {}, {})).encoder
    assert_near(encoder.encode(log_mel[:2]), TorchEngine(untrained).encode(log_mel[:2]))


@pytest.mark.parametrize("halved", [False, True])
def test_weights_are_read_as_onnx_reads_them(model: bytes, halved: bool) -> None:
    stored = read_engine_file(bundled_engine_path()).payload if halved else model
    tensors = onnx.load_from_string(stored).graph.initializer
    expected = {numpy_helper.to_array(tensor).astype(np.float32).tobytes() for tensor in tensors}
    layers = read_layers(stored)
    assert {value.tobytes() for layer in layers for value in layer} <= expected
    assert len(layers) == sum(tensor.name.removesuffix("_fp16").endswith("bias") for tensor in tensors)
