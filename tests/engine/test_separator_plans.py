"""Separators as TensorRT plans: built for real by TensorRT for RTX where it is installed, run on a fake device."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerances
from gpu_fakes import Buffer, FakeDevice, view
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper
from test_gpu import PATIENCE, check_released, within
from test_tensorrt import FACTS, FakeTrt
from test_waveform_separator import SEGMENT, model, spec_file, stems_model

from singerembed.engine import separator as separators
from singerembed.engine import tensorrt_build
from singerembed.engine.build_separator import (
    SeparatorOptions,
    build_separator,
    difference_db,
    export_of_samples,
    made_mixture,
)
from singerembed.engine.build_waveform_separator import build_waveform_separator
from singerembed.engine.device import OutOfDeviceMemory
from singerembed.engine.file import SeparatorFile, read_separator_file
from singerembed.engine.onnxruntime import new_session
from singerembed.engine.separator import Separator, network_input
from singerembed.engine.separator_gpu import LANES, CropMix, SegmentRunner, separator_tensors
from singerembed.engine.spleeter import load_spleeter
from singerembed.engine.tensorrt import Plan, PlanFacts, Tensors
from singerembed.engine.tensorrt_build import PlanOptions
from singerembed.errors import EngineError, MissingDependencyError, SingerEmbedError
from singerembed.model.separator_spec import SpectrogramSpec
from singerembed.model.tensorflow_checkpoint import read_tensorflow_checkpoint

PREFIX = str(Path(__file__).parent / "data" / "spleeter-tiny" / "model")
SPEC = SpectrogramSpec(name="tiny", weights_sha256="")
SMALL = Tensors(
    input_name="in", input_shape=(1, -1, 5), output_name="out", output_shape=(1, -1, 5), smallest=2, usual=4, largest=8
)


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'singerembed[rtx]'")


# --- building ---------------------------------------------------------------------------------------------------------


def test_spleeter_becomes_an_fp16_plan_without_a_gpu(rtx: Any, tmp_path: Path) -> None:
    said: list[str] = []
    options = SeparatorOptions("tensorrt-rtx", plan=PlanOptions(max_batch=64))
    path = str(tmp_path / "s.engine")
    build_separator(PREFIX, path, options, say=lambda what, text: said.append(f"{what} {text}"))
    file = read_separator_file(path)
    assert (file.backend, file.build["precision"]) == ("tensorrt-rtx", "fp16")
    facts = PlanFacts.from_file(file)
    assert (facts.version, facts.compute_capabilities, facts.max_batch) == (rtx.__version__, ("8.6", "8.9", "12.0"), 1)
    assert "on the CPU (no GPU here to run the plan)" in file.verification["what"]
    assert file.verification["difference_db"] < tolerances.SEPARATED_FP16_DB
    assert any(line.startswith("verify its network on the CPU") for line in said)


def rest_and_voice(path: Path) -> str:
    """Write a model with two outputs, of which the second is the voice."""
    nodes = [helper.make_node("Neg", ["mix"], ["rest"]), helper.make_node("Abs", ["mix"], ["voice"])]
    sizes: list[Any] = ["batch", "channels", "samples"]
    return model(path, nodes, sizes, {"rest": sizes, "voice": sizes})


@pytest.mark.parametrize(
    ("make", "text", "output"),
    [
        (stems_model, "stem = 1", (1, 2, 2, SEGMENT)),
        (rest_and_voice, "output = 'voice'\nsegment_seconds = 6.0\nchannels = 2", (1, 2, SEGMENT)),
    ],
)
def test_a_model_of_samples_becomes_a_plan_for_its_one_length(
    rtx: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], str],
    text: str,
    output: tuple[int, ...],
) -> None:
    """Also where the model leaves its sizes open, and has more outputs than are wanted."""
    seen: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    check = tensorrt_build.check_network

    def spy(trt: Any, network: Any, wanted: Tensors, precision: str) -> None:
        check(trt, network, wanted, precision)
        seen.append((network.num_outputs, tuple(network.get_input(0).shape), tuple(network.get_output(0).shape)))

    monkeypatch.setattr(tensorrt_build, "check_network", spy)
    path, said = str(tmp_path / "s.engine"), spec_file(tmp_path, f"sample_rate = 44100\n{text}")
    build_waveform_separator(make(tmp_path / "m.onnx"), said, path, SeparatorOptions("tensorrt-rtx"))
    assert seen == [(1, (1, 2, SEGMENT), output)]
    file = read_separator_file(path)
    assert (file.backend, file.build["precision"]) == ("tensorrt-rtx", "fp32")
    assert PlanFacts.from_file(file).version == rtx.__version__


def test_fp16_changes_the_voice_a_little(separator_path: str, tmp_path: Path) -> None:
    """And stays finite beyond full scale, where magnitudes are clamped."""
    path = str(tmp_path / "half.engine")
    build_separator(PREFIX, path, SeparatorOptions(precision="fp16"))
    half, full = Separator(read_separator_file(path)), Separator(read_separator_file(separator_path))
    mixture = made_mixture(SPEC.segment_samples(100_000), SPEC.sample_rate)
    found, expected = half.vocals(mixture), full.vocals(mixture)
    assert tolerances.SEPARATED_DB < difference_db(found, expected) < tolerances.SEPARATED_FP16_DB
    assert np.isfinite(half.vocals(1000 * np.sign(mixture))).all()


# --- running, on a fake device ----------------------------------------------------------------------------------------


def reversed_and_doubled(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return 2 * values[..., ::-1]


@dataclass
class FakeSegments:
    """A separator's network on the fake device. Refuses what TensorRT leaves undefined."""

    device: FakeDevice
    tensors: Tensors
    compute: Callable[[NDArray[np.float32]], NDArray[np.float32]] = reversed_and_doubled
    output_shape: tuple[int, ...] | None = None  # None: that of the input
    description: str = "fake network"
    closed: bool = False
    sizes: list[int] = field(default_factory=list)  # that were prepared
    asked: threading.Event = field(default_factory=threading.Event)  # a caller has filled its lane
    gate: threading.Event = field(default_factory=threading.Event)  # callers that have may go on

    def __post_init__(self) -> None:
        self._contexts: dict[tuple[int, int], list[bool]] = {}  # whether each is destroyed
        self._memory: Buffer | None = None
        self.gate.set()

    def output_of(self, size: int) -> tuple[int, ...]:
        self.asked.set()
        assert self.gate.wait(PATIENCE)
        return self.output_shape or self.tensors.input_of(size)

    def prepare(self, lanes: int, batches: Sequence[int]) -> None:
        self.device.require(not self.device.works_for(self), "the network is prepared while it computes")
        for destroyed in self._contexts.values():
            destroyed[0] = True
        self.close_memory()
        self._memory = self.device.allocate(64)
        self._contexts = {(lane, size): [False] for lane in range(lanes) for size in batches}
        self.sizes += batches

    def execute(self, lane: int, size: int, source: int, result: int, stream: int) -> None:
        self.device.require((lane, size) in self._contexts, f"size {size} was not prepared in lane {lane}")
        destroyed, memory, shape = self._contexts[lane, size], self._memory, self.tensors.input_of(size)

        def run() -> None:
            assert memory is not None
            self.device.require(not destroyed[0] and not memory.freed, "the context or its memory is gone")
            output = self.output_shape or shape
            for address, of in ((source, shape), (result, output)):
                self.device.check_memory(address, int(np.prod(of)) * 4, pinned=False)
            view(result, output, np.dtype(np.float32))[:] = self.compute(view(source, shape, np.dtype(np.float32)))

        self.device.enqueue(stream, run, owner=self)

    def close_memory(self) -> None:
        if self._memory is not None:
            self._memory.free()
            self._memory = None

    def close(self) -> None:
        assert not self.device.closed
        self.closed = True
        self.close_memory()


@contextmanager
def running(device: FakeDevice, tensors: Tensors = SMALL) -> Iterator[tuple[SegmentRunner, FakeSegments]]:
    networks: list[FakeSegments] = []

    def open_network(fake: FakeDevice) -> FakeSegments:
        networks.append(FakeSegments(fake, tensors))
        return networks[0]

    runner = SegmentRunner(tensors, lambda: device, open_network)
    try:
        yield runner, networks[0]
    finally:
        within(PATIENCE, runner.close)
    check_released(device)
    assert networks[0].closed


def values(size: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(SMALL.input_of(size)).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_many_callers_get_their_own_segments(seed: int) -> None:
    """More callers than lanes, and all sizes; the network is prepared for another only when nothing runs."""
    device = FakeDevice(seed=seed)
    sizes = np.random.default_rng(seed).integers(SMALL.smallest, SMALL.largest + 1, 60)
    with running(device) as (runner, network), ThreadPoolExecutor(LANES + 3) as pool:
        segments = [values(int(size), i) for i, size in enumerate(sizes)]
        for segment, result in zip(segments, pool.map(runner.run, segments), strict=True):
            np.testing.assert_array_equal(result, reversed_and_doubled(segment))
    assert network.sizes[0] == SMALL.usual
    assert set(network.sizes) == set(sizes.tolist()) | {SMALL.usual}


def test_copies_and_network_overlap() -> None:
    device = FakeDevice(seed=1)
    with running(device) as (runner, network), ThreadPoolExecutor(LANES) as pool:
        list(pool.map(lambda i: runner.run(values(4, i)), range(100)))
    assert device.overlaps > 0
    assert network.sizes == [4]


def test_a_size_that_the_plan_does_not_take_is_refused_alone() -> None:
    with running(FakeDevice()) as (runner, _):
        for size in (1, 9):
            with pytest.raises(EngineError, match=f"2 to 8 hops, and one of {size} was asked for.*onnxruntime"):
                runner.run(values(size, 0))
        with pytest.raises(ValueError, match="a segment is"):
            runner.run(values(4, 0)[:, :, :3])
        np.testing.assert_array_equal(runner.run(values(4, 1)), reversed_and_doubled(values(4, 1)))


def test_memory_is_not_freed_while_a_caller_copies_into_it() -> None:
    device = FakeDevice()
    with running(device) as (runner, network), ThreadPoolExecutor(2) as pool:
        network.asked.clear()
        network.gate.clear()
        call = pool.submit(runner.run, values(4, 0))
        assert network.asked.wait(PATIENCE)
        closing = pool.submit(runner.close)
        assert not wait([closing], 0.3).done
        assert not any(buffer.freed for buffer in device.buffers if buffer.pinned)
        network.gate.set()
        with pytest.raises(EngineError, match="the separator was closed"):
            call.result(PATIENCE)
        closing.result(PATIENCE)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(SMALL.smallest, SMALL.largest), min_size=1, max_size=12),
    seed=st.integers(0, 1 << 16),
    no_memory_at=st.frozensets(st.integers(1, 40), max_size=2),
    lost_at_call=st.one_of(st.none(), st.integers(0, 250)),
    fail_after=st.one_of(st.none(), st.integers(0, 100)),
    close_after=st.one_of(st.none(), st.integers(0, 8)),
    threads=st.integers(1, LANES + 2),
)
def test_every_call_ends_with_its_result_or_an_error(
    sizes: list[int],
    seed: int,
    no_memory_at: frozenset[int],
    lost_at_call: int | None,
    fail_after: int | None,
    close_after: int | None,
    threads: int,
) -> None:
    device = FakeDevice(seed=seed, lost_at_call=lost_at_call, fail_after=fail_after, no_memory_at=no_memory_at)
    may_fail = bool(no_memory_at) or any(number is not None for number in (lost_at_call, fail_after, close_after))
    try:
        runner = within(PATIENCE, lambda: SegmentRunner(SMALL, lambda: device, lambda fake: FakeSegments(fake, SMALL)))
    except SingerEmbedError:
        assert may_fail
        check_released(device)
        return

    def call(i: int) -> None:
        segment = values(sizes[i], seed + i)
        try:
            result = runner.run(segment)
        except EngineError:
            assert may_fail
            return
        np.testing.assert_array_equal(result, reversed_and_doubled(segment))

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(call, i) for i in range(len(sizes))]
        if close_after is not None:
            within(PATIENCE, lambda: wait(futures[:close_after]))
            within(PATIENCE, runner.close)
        assert not wait(futures, PATIENCE).not_done, "deadlock"
        for future in futures:
            future.result()
    within(PATIENCE, runner.close)
    check_released(device)


def test_voices_are_those_of_the_network_itself(separator_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A separator with a plan, whose network is the ONNX model of it on the CPU, from many threads.

    That model, with transforms by products of matrices, gives the voice that the transforms of numpy give.
    """
    file, device = read_separator_file(separator_path), FakeDevice(seed=3)
    session = new_session(export_of_samples(load_spleeter(read_tensorflow_checkpoint(PREFIX)), SPEC))
    tensors = separator_tensors(file.spec)
    assert (tensors.smallest, tensors.usual, tensors.largest) == (67, 259, 515)

    def compute(mixture: NDArray[np.float32]) -> NDArray[np.float32]:
        voice: NDArray[np.float32] = session.run(["voice"], {"mixture": mixture})[0]
        return voice

    def open_plan(_file: SeparatorFile, index: int, _crop_mix: CropMix | None) -> SegmentRunner:
        assert index == 1
        return SegmentRunner(tensors, lambda: device, lambda fake: FakeSegments(fake, tensors, compute))

    monkeypatch.setattr(separators, "open_plan", open_plan)
    planned = Separator(replace(file, backend="tensorrt", build={"precision": "fp16"}), device=1)
    assert planned.description == "spleeter-2stems, fp16, fake network on fake GPU"
    alone = Separator(file)
    mixture = made_mixture(SPEC.segment_samples(20_000), SPEC.sample_rate)
    mixtures = [np.roll(mixture, 1000 * i, axis=0) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for vocals, one in zip(pool.map(planned.vocals, mixtures), mixtures, strict=True):
            assert difference_db(vocals, alone.vocals(one)) < tolerances.SEPARATED_DB
    planned.close()
    check_released(device)
    with pytest.raises(EngineError, match="the separator was closed"):
        planned.vocals(mixture)


def test_spleeter_by_torch_on_the_fake(separator_path: str) -> None:
    """What tests/gpu runs where there is no TensorRT, here in FP32 on the host's memory."""
    from torch_network import TorchSegments

    class OnTheFake(TorchSegments):
        def execute(self, lane: int, size: int, source: int, result: int, stream: int) -> None:
            device.enqueue(stream, partial(super().execute, lane, size, source, result, stream))

    network, device = load_spleeter(read_tensorflow_checkpoint(PREFIX)), FakeDevice()
    tensors = separator_tensors(SPEC)
    runner = SegmentRunner(tensors, lambda: device, lambda _device: OnTheFake(network, SPEC, tensors, device="cpu"))
    mixture = made_mixture(tensors.smallest * SPEC.hop_samples, SPEC.sample_rate)
    voice = within(PATIENCE, lambda: runner.run(network_input(mixture, SPEC))).reshape(2, -1).T
    runner.close()
    expected = Separator(read_separator_file(separator_path)).vocals(mixture)
    assert difference_db(voice, expected) < tolerances.SEPARATED_DB
    check_released(device)


# --- a separator's plan, on a fake of the library ---------------------------------------------------------------------


def planned_file(payload: bytes = b"plan") -> SeparatorFile:
    return SeparatorFile(SPEC, "tensorrt", payload, {"tensorrt": asdict(replace(FACTS, max_batch=1))}, {})


def test_a_plan_has_the_separators_tensors_and_a_shape_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = FakeTrt()
    trt.shapes = {"mixture": (2, -1, 1024), "voice": (2, -1, 1024)}
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    device: Any = FakeDevice()
    device.compute_capability = (8, 9)
    plan = Plan(planned_file(), separator_tensors(SPEC), device)
    assert plan.output_of(259) == (2, 259, 1024)
    plan.prepare(2, [259])
    plan.execute(1, 259, 4096, 8192, 7)
    shape = ("shape", "mixture", (2, 259, 1024))
    told = [("address", "mixture", 4096), ("address", "voice", 8192), ("execute", 7)]
    assert [context.told for context in trt.contexts] == [[shape, ("memory", 1000)], [shape, ("memory", 1000), *told]]
    plan.prepare(1, [515])  # the largest, whose memory the plan itself states
    assert trt.contexts[-1].told == [("shape", "mixture", (2, 515, 1024)), ("memory", 4000)]
    trt.failure = "Error Code 2: OutOfMemory (Requested size was 232292352 bytes.)"
    with pytest.raises(OutOfDeviceMemory, match="232292352"):
        plan.execute(0, 515, 4096, 8192, 7)
    plan.close()
    trt.shapes = {"magnitude": (1, 2, -1, 1024), "mask": (1, 2, -1, 1024)}  # as plans were at first
    with pytest.raises(EngineError, match=r"mask.*Build it again"):
        Plan(planned_file(), separator_tensors(SPEC), device)


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"tensorrt: pip install 'singerembed\[gpu\]'"):
        Separator(planned_file())
