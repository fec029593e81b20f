"""From checkpoint to engine: parity with the official embeddings, whatever the batch, order and threads."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tolerances
from conftest import Golden
from numpy.typing import NDArray

from singerembed.engine import build
from singerembed.engine.base import Engine
from singerembed.engine.build import BuildOptions, build_engine, compare, export_onnx, verification_crops
from singerembed.engine.file import EngineFile, read_engine_file
from singerembed.engine.load import load_engine, open_engine
from singerembed.engine.torch import TorchEngine
from singerembed.errors import EngineError, OutputError, UsageError
from singerembed.model.checkpoint import load_checkpoint
from singerembed.model.mel import LOUD, SILENT


@pytest.fixture(scope="module")
def engine(reference_engine: str) -> Engine:
    return load_engine(reference_engine)


def check_parity(embedding: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    reached = compare(embedding, expected)
    assert reached.cosine >= tolerances.EMBEDDING_COSINE
    assert reached.difference <= tolerances.EMBEDDING_DIFFERENCE


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_official_embeddings_at_every_batch_size(engine: Engine, golden: Golden, size: int) -> None:
    batches = [engine.embed(golden.pcm[i : i + size]).embedding for i in range(0, 8, size)]
    check_parity(np.concatenate(batches), golden.embedding)


def test_official_embeddings_with_the_oracle(release_folder: Path, golden: Golden) -> None:
    check_parity(TorchEngine(load_checkpoint(str(release_folder))).embed(golden.pcm).embedding, golden.embedding)


def test_a_crop_gives_the_same_bits_in_any_company(engine: Engine, golden: Golden) -> None:
    together = engine.embed(golden.pcm).embedding
    for i in range(8):
        assert np.array_equal(engine.embed(golden.pcm[i : i + 1]).embedding[0], together[i])
    assert np.array_equal(engine.embed(golden.pcm[::-1].copy()).embedding[::-1], together)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_share_one_engine(engine: Engine, golden: Golden, threads: int) -> None:
    together = engine.embed(golden.pcm).embedding
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(lambda i: engine.embed(golden.pcm[i % 8][np.newaxis]).embedding[0], range(24)))
    for i, embedding in enumerate(results):
        assert np.array_equal(embedding, together[i % 8])


def test_silent_crops_cost_no_inference(engine: Engine, golden: Golden) -> None:
    crops = np.concatenate([np.zeros_like(golden.pcm[:2]), golden.pcm[:1], np.zeros_like(golden.pcm[:1])])
    result = engine.embed(crops)
    assert result.state.tolist() == [SILENT, SILENT, LOUD, SILENT]
    assert result.embedding.shape == (1, 1000)
    assert engine.embed(crops[:1]).embedding.shape == (0, 1000)


def test_normalising_by_a_constant(release_folder: Path, golden: Golden, tmp_path: Path) -> None:
    """Equals the oracle with log-mel divided by that constant; and is recorded."""
    path = str(tmp_path / "constant.engine")
    build_engine(str(release_folder), path, BuildOptions(normalise=9.2))
    assert read_engine_file(path).spec.normalise == 9.2
    checkpoint = load_checkpoint(str(release_folder))
    log_mel = np.log(golden.mel + checkpoint.spec.log_offset) / np.float32(9.2)
    check_parity(load_engine(path).embed(golden.pcm).embedding, TorchEngine(checkpoint).encode(log_mel))


def test_batch_norm_is_folded(reference_engine: str) -> None:
    model = onnx.load_from_string(read_engine_file(reference_engine).payload)
    operators = {node.op_type for node in model.graph.node}
    assert "Conv" in operators
    assert "BatchNormalization" not in operators
    (given,), (result,) = model.graph.input, model.graph.output
    assert [d.dim_value for d in given.type.tensor_type.shape.dim][1:] == [128, 345]
    assert [d.dim_value for d in result.type.tensor_type.shape.dim][1:] == [1000]


def test_what_the_file_says_of_itself(reference_engine: str) -> None:
    engine = read_engine_file(reference_engine)
    assert engine.build["layout"] == "official release"
    assert engine.build["versions"].keys() >= {"torch", "torchvision", "onnx", "singerembed"}
    assert engine.verification["cosine"] >= tolerances.EMBEDDING_COSINE
    assert engine.verification["crops"] == 16
    assert json.dumps(engine.spec.to_dict())


def test_a_build_below_tolerance_fails_and_writes_nothing(
    release_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_tensors: dict[str, object]
) -> None:
    def export_something_else(checkpoint: object) -> bytes:
        import torch

        spoilt = load_checkpoint(str(release_folder))
        spoilt.state_dict["classifier.1.bias"] = spoilt.state_dict["classifier.1.bias"] + torch.linspace(0, 1, 1000)
        return export_onnx(spoilt)

    monkeypatch.setattr(build, "export_onnx", export_something_else)
    path = tmp_path / "bad.engine"
    with pytest.raises(EngineError, match="too far from the FP32 torch encoder"):
        build_engine(str(release_folder), str(path))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_engine_is_kept(release_folder: Path, reference_engine: str) -> None:
    with pytest.raises(OutputError, match="--force"):
        build_engine(str(release_folder), reference_engine)


def test_unknown_back_ends_are_said(release_folder: Path, tmp_path: Path, engine: Engine) -> None:
    with pytest.raises(UsageError, match=r"'tpu'.*onnxruntime"):
        build_engine(str(release_folder), str(tmp_path / "x"), BuildOptions("tpu"))
    with pytest.raises(EngineError, match="no back end 'tpu'"):
        open_engine(EngineFile(engine.spec, "tpu", b"", {}, {}))


def test_a_payload_that_onnx_runtime_refuses(engine: Engine) -> None:
    with pytest.raises(EngineError, match="cannot load this engine"):
        open_engine(EngineFile(engine.spec, "onnxruntime", b"junk", {}, {}))


def test_verification_crops_are_loud_and_unlike_each_other(engine: Engine) -> None:
    crops = verification_crops(engine.spec)
    result = engine.embed(crops)
    assert (result.state == LOUD).all()
    unit = result.embedding / np.linalg.norm(result.embedding, axis=1, keepdims=True)
    likeness = unit @ unit.T - np.eye(len(crops))
    assert likeness.max() < 0.9999


def test_the_bundled_engine_is_there_and_says_what_it_is() -> None:
    engine = load_engine()
    assert engine.spec.name in engine.description
    assert replace(engine.spec, name="") != engine.spec
