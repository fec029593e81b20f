"""The GPU runtime on a fake device: order, back-pressure, ragged batches, memory, failures, closing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Golden
from gpu_fakes import FakeDevice, FakeNetwork, fake_embedding
from mel_kernels import levels, noise, spectrograms
from numpy.typing import NDArray
from tolerances import EMBEDDING_COSINE, EMBEDDING_DIFFERENCE

from singerembed.engine.gpu import GpuEngine
from singerembed.engine.gpu_worker import SLOTS
from singerembed.errors import EngineError, MissingDependencyError
from singerembed.model.mel import INVALID, LOUD, SILENT, Pcm, emulated_mel
from singerembed.model.spec import ModelSpec

SMALL = ModelSpec(name="small", method="untrained", crop_samples=4096, n_mels=16, embedding_dim=8)
PATIENCE = 30  # seconds until a wait counts as a deadlock


@contextmanager
def running(device: FakeDevice, spec: ModelSpec = SMALL, **network: Any) -> Iterator[tuple[GpuEngine, FakeNetwork]]:
    made: list[FakeNetwork] = []

    def open_network(fake: FakeDevice) -> FakeNetwork:
        made.append(FakeNetwork(fake, spec, **network))
        return made[0]

    engine = GpuEngine(spec, lambda: device, open_network)
    try:
        yield engine, made[0]
    finally:
        engine.close()
    check_released(device, made[0])


def check_released(device: FakeDevice, network: FakeNetwork | None = None) -> None:
    assert device.closed
    assert device.undefined == []
    assert all(buffer.freed for buffer in device.buffers)
    assert network is None or network.closed


def alone(pcm: Pcm, spec: ModelSpec = SMALL) -> NDArray[np.float32]:
    """What each crop of `pcm`, all loud, is worth by itself, with no runtime in between."""
    return fake_embedding(spectrograms(emulated_mel(spec), spec, pcm), spec.embedding_dim)


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of `work`, which must not hang."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as exc:
            result.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, "deadlock"
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 4 * SLOTS, 4 * SLOTS + 1, 40])
@pytest.mark.parametrize("sample_type", [np.int16, np.float32])
def test_one_caller_gets_its_crops_in_order(n: int, sample_type: type) -> None:
    """Below, at and above the batch of 4, the ring of 16 and twice that."""
    pcm: Any = noise(SMALL, n)
    pcm = (pcm * 32767).astype(np.int16) if sample_type is np.int16 else pcm
    with running(FakeDevice(seed=n)) as (engine, _):
        result = within(PATIENCE, lambda: engine.embed(pcm))
    np.testing.assert_array_equal(result.embedding, alone(pcm))
    found = levels(emulated_mel(SMALL), pcm)
    np.testing.assert_array_equal(result.peak, found["peak"])
    np.testing.assert_array_equal(result.rms, found["rms"])
    assert (result.state == LOUD).all()


@pytest.mark.parametrize("seed", range(6))
def test_many_callers_get_their_own_crops(seed: int) -> None:
    """Sizes, sample types, silence and NaN at random; streams run in random order."""
    rng = np.random.default_rng(seed)
    device = FakeDevice(seed=seed)

    def call(i: int) -> None:
        n = int(rng_sizes[i])
        pcm: Any = noise(SMALL, n, seed=100 * seed + i)
        kind = np.random.default_rng(i).integers(0, 3, n)
        pcm[kind == SILENT] = 0
        if i % 2:
            pcm, kind = (pcm * 32767).astype(np.int16), np.where(kind == INVALID, LOUD, kind)
        else:
            pcm[kind == INVALID, 5] = np.nan
        result = engine.embed(pcm)
        np.testing.assert_array_equal(result.state, kind)
        loud = pcm[kind == LOUD]
        np.testing.assert_array_equal(result.embedding, alone(loud) if len(loud) else np.empty((0, 8)))

    rng_sizes = rng.integers(1, 12, 24)
    with running(device) as (engine, network), ThreadPoolExecutor(8) as pool:
        within(PATIENCE, lambda: list(pool.map(call, range(24))))
    assert max(network.batches) == 4
    assert device.replays > 0
    assert device.overlaps > 0


def test_batches_are_gathered_across_callers() -> None:
    """Eight callers of one crop each make fewer batches than eight once the device has something to do."""
    device = FakeDevice()
    with running(device, capturable=False) as (engine, network), ThreadPoolExecutor(8) as pool:
        pcm = [noise(SMALL, 1, seed=i) for i in range(64)]
        results = within(PATIENCE, lambda: list(pool.map(engine.embed, pcm)))
    for one, result in zip(pcm, results, strict=True):
        np.testing.assert_array_equal(result.embedding, alone(one))
    assert len(network.batches) < 48


def test_silent_crops_cost_no_inference() -> None:
    pcm = noise(SMALL, 12)
    pcm[1::2] = 0
    with running(FakeDevice(), capturable=False) as (engine, network):
        result = within(PATIENCE, lambda: engine.embed(pcm))
        silent = within(PATIENCE, lambda: engine.embed(pcm[1::2].copy()))
    assert sum(network.batches) == 6
    np.testing.assert_array_equal(result.embedding, alone(pcm[::2].copy()))
    assert silent.embedding.shape == (0, SMALL.embedding_dim)
    assert (silent.state == SILENT).all()


def test_callers_wait_for_room() -> None:
    """A device that does not move lets in what the ring holds and no more, and nothing is lost when it moves again."""
    device = FakeDevice()
    moves = threading.Event()
    is_done = device.is_done
    device.is_done = lambda event: moves.is_set() and is_done(event)  # type: ignore[method-assign]
    pcm = noise(SMALL, 60)
    with running(device) as (engine, _), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.embed, pcm)
        time.sleep(0.1)
        assert not waiting.done()
        assert device.used == sum(buffer.array.nbytes for buffer in device.buffers)  # no buffer but those of the start
        moves.set()
        np.testing.assert_array_equal(waiting.result(PATIENCE).embedding, alone(pcm))


def test_no_memory_at_the_start_halves_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    pcm = noise(SMALL, 9)
    with running(FakeDevice(memory=600_000), max_batch=16) as (engine, network):
        np.testing.assert_array_equal(within(PATIENCE, lambda: engine.embed(pcm)).embedding, alone(pcm))
    assert max(network.batches) < 16
    assert "out of memory, going on with batches of 8 crops" in caplog.text


def test_no_memory_later_halves_the_batch_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    pcm = noise(SMALL, 21)
    with running(FakeDevice(), max_batch=8, capturable=False) as (engine, network):
        np.testing.assert_array_equal(within(PATIENCE, lambda: engine.embed(pcm)).embedding, alone(pcm))
        network.largest = 3
        np.testing.assert_array_equal(within(PATIENCE, lambda: engine.embed(pcm)).embedding, alone(pcm))
        assert network.batches[-1] <= 2
    assert [r.getMessage().split()[-2] for r in caplog.records if "out of memory" in r.getMessage()] == ["4", "2"]


def test_no_memory_for_one_crop_is_an_error() -> None:
    device = FakeDevice(memory=10_000)
    with pytest.raises(EngineError, match="fake GPU has too little free memory for even one crop"):
        GpuEngine(SMALL, lambda: device, lambda fake: FakeNetwork(fake, SMALL))
    check_released(device)


@pytest.mark.parametrize("operations", [0, 1, 7, 40])
def test_a_lost_device_fails_all_callers_with_the_cause(operations: int) -> None:
    device = FakeDevice(fail_after=operations)
    with running(device) as (engine, _), ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(engine.embed, noise(SMALL, 30, seed=i)) for i in range(6)]
        for future in futures:
            with pytest.raises(EngineError, match="CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
                future.result(PATIENCE)
            assert "Lost" in str(caught.value)
        with pytest.raises(EngineError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):  # and so it stays
            within(PATIENCE, lambda: engine.embed(noise(SMALL, 1)))


def test_a_network_that_fails_says_so() -> None:
    def fails(lane: int, batch: int, log_mel: int, embedding: int, stream: int) -> None:
        raise EngineError("TensorRT failed: reason")

    with running(FakeDevice()) as (engine, network):
        network.enqueue = fails  # type: ignore[method-assign]
        with pytest.raises(EngineError, match="TensorRT failed: reason"):
            within(PATIENCE, lambda: engine.embed(noise(SMALL, 3)))


def test_what_cannot_be_opened_is_raised_where_the_engine_is_made() -> None:
    def no_device() -> FakeDevice:
        raise MissingDependencyError("the GPU path", "pycuda", "gpu")

    with pytest.raises(MissingDependencyError, match=r"pip install 'singerembed\[gpu\]'"):
        GpuEngine(SMALL, no_device, lambda fake: FakeNetwork(fake, SMALL))

    device = FakeDevice()

    def no_network(_: FakeDevice) -> FakeNetwork:
        raise EngineError("built for another GPU")

    with pytest.raises(EngineError, match="built for another GPU"):
        GpuEngine(SMALL, lambda: device, no_network)
    check_released(device)


def test_closing_fails_who_still_waits_and_frees_all() -> None:
    device = FakeDevice()
    device.is_done = lambda event: False  # type: ignore[method-assign]
    with running(device) as (engine, _), ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(engine.embed, noise(SMALL, 30)) for _ in range(4)]
        time.sleep(0.05)
        within(PATIENCE, engine.close)
        for future in futures:
            with pytest.raises(EngineError, match="the engine was closed"):
                future.result(PATIENCE)
    with pytest.raises(EngineError, match="the engine was closed"):
        engine.embed(noise(SMALL, 1))


@pytest.mark.parametrize("begins", [False, True])
def test_a_graph_that_cannot_be_captured_is_done_without(begins: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Whether the capture cannot begin, or cannot end."""
    device = FakeDevice()
    capture = device.capture

    def not_permitted() -> None:
        raise RuntimeError("operation not permitted")

    def fails(stream: int) -> Any:
        if not begins:
            not_permitted()
        graph = capture(stream)
        graph.finish = not_permitted  # type: ignore[method-assign]
        return graph

    device.capture = fails  # type: ignore[method-assign]
    pcm = noise(SMALL, 40)
    with running(device) as (engine, _):
        np.testing.assert_array_equal(within(PATIENCE, lambda: engine.embed(pcm)).embedding, alone(pcm))
    assert device.replays == 0
    assert "going on without CUDA graphs: operation not permitted" in caplog.text


def test_ragged_batches_are_filled_up_to_a_few_sizes() -> None:
    """So that each size has a graph, and no shape is set while the engine runs."""
    device = FakeDevice()
    with running(device, max_batch=16) as (engine, network):
        for n in (1, 3, 5, 7, 11, 16, 2, 6, 13):
            pcm = noise(SMALL, n, seed=n)
            np.testing.assert_array_equal(within(PATIENCE, partial(engine.embed, pcm)).embedding, alone(pcm))
    assert set(network.batches) == {4, 8, 16}
    assert device.replays > 0


def test_what_is_not_a_crop_is_refused() -> None:
    with running(FakeDevice()) as (engine, _):
        wrong: Any
        for wrong in (np.zeros((1, 4095), np.float32), np.zeros(4096, np.float32), np.zeros((1, 4096), np.float64)):
            with pytest.raises(ValueError, match=r"crops must be int16 or float32 \[n, 4096\]"):
                engine.embed(wrong)
        assert engine.embed(np.zeros((0, 4096), np.float32)).embedding.shape == (0, 8)


def test_description_and_batch_are_there_from_the_start(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with running(FakeDevice(), max_batch=64) as (engine, _):
        assert engine.description == "small, fp32, fake network on fake GPU"
        assert engine.batch == 16


def test_the_whole_engine_on_the_fake_equals_the_official_pipeline(
    golden: Golden, spec: ModelSpec, reference_engine: str
) -> None:
    """Emulated kernels and ONNX Runtime on the runtime's buffers: PCM in, official embeddings out."""
    from singerembed.engine.file import read_engine_file

    model = read_engine_file(reference_engine).payload
    pcm = np.concatenate([golden.pcm, np.zeros_like(golden.pcm[:1])])
    with running(FakeDevice(), replace(spec), model=model) as (engine, _):
        result = within(10 * PATIENCE, lambda: engine.embed(pcm))
    cosine = (result.embedding * golden.embedding).sum(axis=1) / (
        np.linalg.norm(result.embedding, axis=1) * np.linalg.norm(golden.embedding, axis=1)
    )
    assert cosine.min() >= EMBEDDING_COSINE
    difference = np.abs(result.embedding - golden.embedding).max(axis=1) / np.linalg.norm(golden.embedding, axis=1)
    assert difference.max() <= EMBEDDING_DIFFERENCE
    assert result.state.tolist() == [LOUD] * 8 + [SILENT]


def test_the_encoder_by_torch_on_the_fake(golden: Golden, release_folder: Path) -> None:
    """What scripts/gpu_check.sh runs where there is no TensorRT, here in FP32 on the host's memory."""
    import torch
    from torch_network import TorchNetwork

    from singerembed.model.checkpoint import load_checkpoint

    class OnTheFake(TorchNetwork):
        def enqueue(self, lane: int, batch: int, log_mel: int, embedding: int, stream: int) -> None:
            device.enqueue(stream, partial(super().enqueue, lane, batch, log_mel, embedding, stream))

    checkpoint, device = load_checkpoint(str(release_folder)), FakeDevice()
    engine = GpuEngine(
        checkpoint.spec, lambda: device, lambda _device: OnTheFake(checkpoint, device="cpu", dtype=torch.float32)
    )
    try:
        found = within(10 * PATIENCE, lambda: engine.embed(golden.pcm)).embedding
    finally:
        engine.close()
    difference = np.abs(found - golden.embedding).max(axis=1) / np.linalg.norm(golden.embedding, axis=1)
    assert difference.max() <= EMBEDDING_DIFFERENCE
    assert device.undefined == []
