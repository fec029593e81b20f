"""The native encoder in int8: near FP32 on every instruction set, the same bits in any company, on the CPU alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tolerances
from conftest import Golden

from singerembed.engine import native, onnxruntime_cuda
from singerembed.engine.build import BuildOptions, build_engine, compare, verification_crops
from singerembed.engine.file import EngineFile, read_engine_file
from singerembed.engine.load import bundled_engine_path, devices_for, open_engine
from singerembed.engine.native import NativeEngine
from singerembed.model.encoder import available_int8_isas
from singerembed.model.mel import available_isas

EVERY_ISA = [*available_isas(), ""]  # the last: the widest, which may have no FP32 kernels of its own


@pytest.fixture(scope="module")
def fp32() -> EngineFile:
    """The bundled engine: ranges of trained activations, unlike those of random weights."""
    return read_engine_file(bundled_engine_path())


@pytest.fixture(scope="module")
def int8(fp32: EngineFile) -> EngineFile:
    return replace(fp32, backend="native", spec=replace(fp32.spec, precision="int8"))


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_embeddings_near_those_of_fp32(fp32: EngineFile, int8: EngineFile, isa: str) -> None:
    engine = NativeEngine(int8, isa=isa)
    assert engine.encoder.isa == (isa or available_int8_isas()[-1])
    crops = verification_crops(int8.spec)
    exact = NativeEngine(fp32).embed(crops).embedding
    rounded = engine.embed(crops).embedding
    assert compare(rounded, exact).cosine >= tolerances.INT8_COSINE
    assert compare(rounded, exact).cosine < tolerances.NATIVE_COSINE, "these are not 8 bits"
    between = compare(rounded, NativeEngine(int8).embed(crops).embedding)
    assert between.cosine >= tolerances.INT8_BETWEEN_ISAS_COSINE


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_a_crop_gives_the_same_bits_in_any_company(int8: EngineFile, golden: Golden, isa: str) -> None:
    """A range is the crop's own, so a loud neighbour makes no difference."""
    engine = NativeEngine(int8, isa=isa)
    crops = golden.pcm.copy()
    crops[1] //= 50
    together = engine.embed(crops).embedding
    for size in (1, 3):
        for start in range(0, 8, size):
            part = engine.embed(crops[start : start + size]).embedding
            assert np.array_equal(part, together[start : start + size])


def test_an_engine_in_int8_runs_on_the_cpu_wherever_it_is(
    fp32: EngineFile, int8: EngineFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where FP32 would take a GPU, or ONNX Runtime for want of vector kernels."""
    monkeypatch.setattr(onnxruntime_cuda, "is_usable", lambda: True)
    monkeypatch.setattr(native, "has_kernels", lambda: False)
    assert isinstance(open_engine(int8), NativeEngine)
    assert devices_for(int8) == 0
    assert int8.sha256 != replace(fp32, backend="native").sha256


def test_building_one_says_how_near_it_is(tmp_path: Path) -> None:
    checkpoint = Path(__file__).parents[2] / "training" / "recipes" / "free_voices.pt"
    said: dict[str, str] = {}
    path = str(tmp_path / "int8.engine")
    build_engine(str(checkpoint), path, BuildOptions(precision="int8"), say=said.__setitem__)
    built = read_engine_file(path)
    assert (built.backend, built.spec.precision) == ("native", "int8")
    assert said["target"] == "native, int8"
    assert "cosine" in said["verify"]
    assert tolerances.INT8_COSINE <= built.verification["cosine"] < tolerances.NATIVE_COSINE
    assert open_engine(built).description.startswith(f"{built.spec.name}, int8, native (")
