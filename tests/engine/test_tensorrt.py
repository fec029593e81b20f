"""TensorRT plans: built for real by TensorRT for RTX where it is installed; what they ask of a machine, anywhere."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tolerances import EMBEDDING_COSINE_FP16

from singerembed.engine import cuda_driver, tensorrt, tensorrt_build
from singerembed.engine.build import BuildOptions, build_engine
from singerembed.engine.file import EngineFile, read_engine_file
from singerembed.engine.load import open_engine
from singerembed.engine.precision import to_fp16
from singerembed.engine.tensorrt import TENSORRT, TENSORRT_RTX, Library, PlanFacts, Tensors
from singerembed.engine.tensorrt_build import PlanOptions, build_plan
from singerembed.errors import EngineError, MissingDependencyError, UsageError
from singerembed.model.spec import ModelSpec

FACTS = PlanFacts(
    version="10.9.0.34",
    compute_capabilities=("8.9",),
    hardware_compatible=False,
    version_compatible=False,
    max_batch=64,
)
FP16 = ModelSpec(name="reference", method="untrained", precision="fp16")


@pytest.fixture(scope="module")
def fp32(reference_engine: str) -> bytes:
    return read_engine_file(reference_engine).payload


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'singerembed[rtx]'")


# --- building ---------------------------------------------------------------------------------------------------------


def test_builds_an_fp16_plan_without_a_gpu(rtx: Any, fp32: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    profiles: list[list[tuple[int, ...]]] = []
    configure = tensorrt_build._configure

    def spy(trt: Any, builder: Any, tensors: Tensors, facts: PlanFacts) -> Any:
        config = configure(trt, builder, tensors, facts)
        assert config.num_optimization_profiles == 1
        assert not config.get_flag(trt.BuilderFlag.TF32)
        profiles.append([tensors.input_of(size) for size in (tensors.smallest, tensors.usual, tensors.largest)])
        return config

    monkeypatch.setattr(tensorrt_build, "_configure", spy)
    plan, facts = build_plan(to_fp16(fp32), FP16, TENSORRT_RTX, PlanOptions(max_batch=32))
    assert profiles == [[(1, 128, 345), (32, 128, 345), (32, 128, 345)]]
    assert 8e6 < len(plan) < 40e6  # 5.3 million weights of two bytes, and the graph for three targets
    assert facts == PlanFacts(
        version=rtx.__version__,
        compute_capabilities=("8.6", "8.9", "12.0"),
        hardware_compatible=False,
        version_compatible=False,
        max_batch=32,
    )


def test_checks_tensors_and_precision(rtx: Any, fp32: bytes) -> None:
    """An FP32 network under an FP16 spec, and the other way round, is found before the build."""
    with pytest.raises(EngineError, match=r"convolutions are .*FLOAT.*; the spec wants fp16"):
        build_plan(fp32, FP16, TENSORRT_RTX, PlanOptions())
    with pytest.raises(EngineError, match=r"convolutions are .*HALF.*; the spec wants fp32"):
        build_plan(to_fp16(fp32), replace(FP16, precision="fp32"), TENSORRT_RTX, PlanOptions())
    with pytest.raises(EngineError, match="wants"):
        build_plan(to_fp16(fp32), replace(FP16, crop_samples=88_200), TENSORRT_RTX, PlanOptions())


def test_what_is_not_a_network_is_refused_with_the_librarys_reason(rtx: Any) -> None:
    with pytest.raises(EngineError, match=r"TensorRT for RTX cannot read the network: .+"):
        build_plan(b"not a network", FP16, TENSORRT_RTX, PlanOptions())


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="--max-batch must be at least 1"):
        build_plan(b"", FP16, TENSORRT_RTX, PlanOptions(max_batch=0))
    for options in (PlanOptions(hardware_compatible=True), PlanOptions(version_compatible=True)):
        with pytest.raises(UsageError, match="are for RTX 30 and newer as they are"):
            build_plan(b"", FP16, TENSORRT_RTX, options)


# --- loading ----------------------------------------------------------------------------------------------------------


def engine_file(library: Library, facts: dict[str, Any]) -> EngineFile:
    return EngineFile(FP16, library.backend, b"plan", {"tensorrt": facts}, {})


@pytest.mark.parametrize("library", [TENSORRT, TENSORRT_RTX])
def test_a_library_that_is_not_installed_is_named(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library.package, None)
    with pytest.raises(
        MissingDependencyError, match=rf"{library.package}: pip install 'singerembed\[{library.extra}\]'"
    ):
        open_engine(engine_file(library, asdict(FACTS)))


def test_a_driver_package_that_is_not_installed_is_named(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_is_there", lambda _module: False)
    cuda_driver._load.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"cuda-bindings: pip install 'singerembed\[gpu\]'"):
        open_engine(engine_file(TENSORRT_RTX, asdict(FACTS)))


def test_an_old_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        __version__ = "8.6.1"

    monkeypatch.setitem(sys.modules, "tensorrt", Old)
    with pytest.raises(EngineError, match=r"TensorRT 8\.6\.1 is too old: 10 or later"):
        tensorrt.load_library(TENSORRT)


def refusal(facts: PlanFacts, version: str, compute_capability: tuple[int, int]) -> str:
    """Why the plan is refused; empty if it is not."""
    try:
        facts.check(TENSORRT, version, compute_capability)
    except EngineError as exc:
        return str(exc)
    return ""


@pytest.mark.parametrize(
    ("facts", "version", "compute_capability"),
    [
        (FACTS, "10.9.0.34", (8, 9)),
        (replace(FACTS, hardware_compatible=True), "10.9.0.34", (8, 0)),
        (replace(FACTS, hardware_compatible=True), "10.9.0.34", (12, 0)),
        (replace(FACTS, version_compatible=True), "10.10.0.2", (8, 9)),
        (replace(FACTS, compute_capabilities=("8.6", "8.9", "12.0")), "10.9.0.34", (12, 0)),
    ],
)
def test_a_plan_runs_where_it_was_built_for(
    facts: PlanFacts, version: str, compute_capability: tuple[int, int]
) -> None:
    assert refusal(facts, version, compute_capability) == ""


@pytest.mark.parametrize(
    ("facts", "version", "compute_capability", "message"),
    [
        (
            FACTS,
            "10.9.0.34",
            (9, 0),
            "built for compute capability 8.9; this GPU has 9.0. Build it again on this machine",
        ),
        (replace(FACTS, hardware_compatible=True), "10.9.0.34", (7, 5), "this GPU has 7.5"),
        (
            FACTS,
            "11.4.0.106",
            (8, 9),
            "built by TensorRT 10.9.0.34; here is 11.4.0.106. Install that version, or build",
        ),
        (replace(FACTS, version_compatible=True), "10.8.0.43", (8, 9), "here is 10.8.0.43"),
    ],
)
def test_another_gpu_or_version_is_refused_with_both(
    facts: PlanFacts, version: str, compute_capability: tuple[int, int], message: str
) -> None:
    assert message in refusal(facts, version, compute_capability)


def test_facts_travel_in_the_engine_file(tmp_path: Any) -> None:
    path = str(tmp_path / "plan.engine")
    EngineFile(FP16, "tensorrt", b"plan", tensorrt_build.facts_entry(FACTS), {}).write(path)
    assert PlanFacts.from_file(read_engine_file(path)) == FACTS


@pytest.mark.parametrize("facts", [{}, {**asdict(FACTS), "colour": "green"}, None])
def test_an_engine_without_facts_is_refused(facts: Any) -> None:
    with pytest.raises(EngineError, match="does not say what its plan was built for"):
        PlanFacts.from_file(engine_file(TENSORRT, facts))


# --- running, on a fake of the library --------------------------------------------------------------------------------


class FakeTrt:
    """As much of tensorrt as TensorRtNetwork uses, with one engine that notes what it is told."""

    __version__ = FACTS.version
    float16, float32 = "half", "float"

    class ILogger:
        ERROR, INTERNAL_ERROR = 1, 0

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = "user managed"

    def __init__(self) -> None:
        self.contexts: list[FakeContext] = []
        self.shapes: dict[str, tuple[int, ...]] = {"log_mel": (-1, 128, 345), "embedding": (-1, 1000)}
        self.failure: str | None = None
        self.log: Any = None

    def Runtime(self, log: Any) -> FakeTrt:
        self.log = log
        return self

    @property
    def num_io_tensors(self) -> int:
        return len(self.shapes)

    def deserialize_cuda_engine(self, plan: bytes) -> FakeTrt | None:
        if plan != b"plan":
            self.log.log(1, "magic tag does not match")
            return None
        return self

    def get_tensor_name(self, i: int) -> str:
        return list(self.shapes)[i]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get_tensor_dtype(self, name: str) -> str:
        return "float"

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "user managed"
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]

    device_memory_size_v2 = 4000
    size_for_shapes = 1000


class FakeContext:
    """An execution context, which notes what it is told."""

    def __init__(self, trt: FakeTrt) -> None:
        self._trt = trt
        self.told: list[tuple[Any, ...]] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.told, "a context keeps its shape: a captured graph depends on it"
        self.told.append(("shape", name, shape))
        return shape[0] <= FACTS.max_batch

    def update_device_memory_size_for_shapes(self) -> int:
        return self._trt.size_for_shapes

    def set_device_memory(self, address: int, size: int) -> None:
        self.told.append(("memory", size))

    def set_tensor_address(self, name: str, address: int) -> None:
        self.told.append(("address", name, address))

    def execute_async_v3(self, stream: int) -> bool:
        self.told.append(("execute", stream))
        if self._trt.failure:
            self._trt.log.log(1, self._trt.failure)
        return self._trt.failure is None


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTrt:
    fake = FakeTrt()
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return fake


def network(payload: bytes = b"plan") -> tensorrt.TensorRtNetwork:
    from gpu_fakes import FakeDevice

    device: Any = FakeDevice()
    device.compute_capability = (8, 9)
    return tensorrt.TensorRtNetwork(replace(engine_file(TENSORRT, asdict(FACTS)), payload=payload), device)


def test_each_size_in_each_lane_has_a_context_that_keeps_its_shape(trt: FakeTrt) -> None:
    running = network()
    assert (running.half_input, running.max_batch, running.capturable) == (False, 64, True)
    running.prepare(2, [16, 64])
    running.enqueue(0, 64, 4096, 8192, 7)
    running.enqueue(1, 16, 4096, 8192, 7)
    running.enqueue(1, 16, 4096, 8192, 7)
    run = [("address", "log_mel", 4096), ("address", "embedding", 8192), ("execute", 7)]
    shapes = [("shape", "log_mel", (batch, 128, 345)) for batch in (16, 64, 16, 64)]
    runs = [[], run, [*run, *run], []]
    # All work in one memory, which the largest needs.
    assert [context.told for context in trt.contexts] == [
        [shape, ("memory", 4000), *told] for shape, told in zip(shapes, runs, strict=True)
    ]
    running.prepare(1, [16])
    assert trt.contexts[-1].told == [("shape", "log_mel", (16, 128, 345)), ("memory", 1000)]
    running.close()


def test_failures_carry_the_librarys_reason(trt: FakeTrt) -> None:
    from singerembed.engine.device import OutOfDeviceMemory

    running = network()
    running.prepare(1, [1])
    trt.failure = "Error Code 1: Cuda Runtime (an illegal memory access was encountered)"
    with pytest.raises(EngineError, match=r"TensorRT failed: Error Code 1.*illegal memory access"):
        running.enqueue(0, 1, 0, 0, 0)
    trt.failure = "Error Code 2: OutOfMemory (Requested size was 232292352 bytes.)"
    with pytest.raises(OutOfDeviceMemory, match="232292352"):
        running.enqueue(0, 1, 0, 0, 0)
    with pytest.raises(EngineError, match=r"TensorRT refuses an input of \[65, 128, 345\]: no reason given"):
        running.prepare(1, [65])


def test_memory_whose_size_is_not_known_is_not_used(trt: FakeTrt) -> None:
    """The library says 0 where it cannot say."""
    running = network()
    trt.size_for_shapes = 0
    trt.log.log(1, "shapes are not set")
    with pytest.raises(EngineError, match=r"cannot prepare an input of \[32, 128, 345\]: shapes are not set"):
        running.prepare(1, [32])


def test_timings_of_another_gpu_are_not_used(tmp_path: Path) -> None:
    """Where the library refuses saved timings, it starts with none, and those of this build are saved."""
    path = tmp_path / "gpu.timing"
    path.write_bytes(b"another GPU")

    class Config:
        cache = b"never set"

        def create_timing_cache(self, saved: bytes) -> bytes:
            return saved or b"none"

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if cache == b"another GPU":
                return False
            self.cache = cache
            return True

        def get_timing_cache(self) -> Any:
            class Serialized:
                @staticmethod
                def serialize() -> bytes:
                    return b"of this build"

            return Serialized

    config = Config()
    with tensorrt_build._timing_cache(config, path):
        assert config.cache == b"none"
    assert path.read_bytes() == b"of this build"


def test_a_plan_that_does_not_load_or_fit_is_refused(trt: FakeTrt) -> None:
    with pytest.raises(EngineError, match="TensorRT cannot load the engine: magic tag does not match"):
        network(b"other")
    trt.shapes["embedding"] = (-1, 512)
    with pytest.raises(EngineError, match=r"512.*Build it again"):
        network()


# --- the whole build --------------------------------------------------------------------------------------------------


def test_build_engine_makes_an_rtx_engine_without_a_gpu(rtx: Any, release_folder: Any, tmp_path: Any) -> None:
    """Where no GPU runs the plan, its FP16 network is verified on the CPU, and the engine file says so."""
    said: list[str] = []
    path = str(tmp_path / "rtx.engine")
    options = BuildOptions("tensorrt-rtx", plan=PlanOptions(max_batch=16))
    build_engine(str(release_folder), path, options, say=lambda what, text: said.append(f"{what} {text}"))
    engine = read_engine_file(path)
    assert (engine.backend, engine.spec.precision) == ("tensorrt-rtx", "fp16")
    assert PlanFacts.from_file(engine).max_batch == 16
    assert "on the CPU (no GPU here to run the plan)" in engine.verification["what"]
    assert engine.verification["cosine"] >= EMBEDDING_COSINE_FP16
    assert any(line.startswith("verify its network on the CPU") for line in said)


def test_build_engine_refuses_an_unknown_precision(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="unknown precision 'int4'; there are: auto, fp32, fp16, int8"):
        build_engine("none", str(tmp_path / "x"), BuildOptions(precision="int4"), say=lambda *_: None)
