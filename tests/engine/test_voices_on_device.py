"""Voices that go from the separator to the encoder on the device they share: two runtimes on fakes of one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from gpu_fakes import Buffer, FakeDevice, FakeNetwork
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_gpu import PATIENCE, check_released, within
from test_separator_plans import FakeSegments

from singerembed.audio.crops import CropBlock
from singerembed.audio.mono import segment_samples
from singerembed.engine import separator as separators
from singerembed.engine.base import EmbeddedCrops
from singerembed.engine.file import SeparatorFile
from singerembed.engine.gpu import GpuEngine
from singerembed.engine.separation import VOICELESS, Separation
from singerembed.engine.separator import Separator
from singerembed.engine.separator_gpu import LANES, CropMix, SegmentRunner, separator_tensors
from singerembed.errors import EngineError, SingerEmbedError
from singerembed.model.mel import INVALID, LOUD, SILENT
from singerembed.model.separator_spec import WaveformSpec
from singerembed.model.spec import ModelSpec

CROP, CONTEXT = 10_000, 1000  # samples; a crop is mixed down in three segments, of which the last is shorter
SPEC = ModelSpec(name="small", method="untrained", crop_samples=CROP, n_mels=16, embedding_dim=8)
SEPARATOR = WaveformSpec(
    name="fake",
    weights_sha256="",
    segment=CROP + 2 * CONTEXT,
    context=CONTEXT,
    input_name="mix",
    output_name="stems",
    batch_axis=True,
    stem=1,
)
FILE = SeparatorFile(SEPARATOR, "tensorrt", b"", {"precision": "fp32"}, {})
OUTPUT_SHAPE = (1, 2, SEPARATOR.channels, SEPARATOR.segment)
QUIET = 0.3  # in mixtures whose peak is below this nobody sings


def stems(mixture: NDArray[np.float32]) -> NDArray[np.float32]:
    """Accompaniment and voice of [1, channels, samples]."""
    voice = mixture * (0.5 if np.abs(mixture).max() > QUIET else 1e-3)
    return np.stack([mixture - voice, voice], axis=1)


@dataclass
class Both:
    """A separator and an encoder, each with its own thread, context and streams on one fake GPU."""

    devices: tuple[FakeDevice, FakeDevice]
    networks: list[Any]
    runner: SegmentRunner
    engine: GpuEngine

    def close(self, *, engine_first: bool = False) -> None:
        for closed in (self.engine, self.runner) if engine_first else (self.runner, self.engine):
            within(PATIENCE, closed.close)

    def check_released(self) -> None:
        for device in self.devices:
            check_released(device)
        assert all(network.closed for network in self.networks)


def open_both(
    *, seed: int = 0, separating: dict[str, Any] | None = None, encoding: dict[str, Any] | None = None, index: int = 0
) -> Both:
    """Open both, on devices with these failures. `index`: of the encoder's device. Raises SingerEmbedError."""
    memory: list[Buffer] = []
    devices = (
        FakeDevice(seed=seed, buffers=memory, **separating or {}),
        FakeDevice(seed=seed + 1, buffers=memory, index=index, **encoding or {}),
    )
    networks: list[Any] = []

    def keep(network: Any) -> Any:
        networks.append(network)
        return network

    crop_mix = CropMix(SEPARATOR, CROP, segment_samples(SPEC.sample_rate))
    tensors = separator_tensors(SEPARATOR)
    runner = SegmentRunner(
        tensors, lambda: devices[0], lambda fake: keep(FakeSegments(fake, tensors, stems, OUTPUT_SHAPE)), crop_mix
    )
    try:
        engine = GpuEngine(SPEC, lambda: devices[1], lambda fake: keep(FakeNetwork(fake, SPEC)))
    except BaseException:
        within(PATIENCE, runner.close)
        for device in devices:
            check_released(device)
        raise
    return Both(devices, networks, runner, engine)


@contextmanager
def both(**how: Any) -> Iterator[Both]:
    opened = open_both(**how)
    try:
        yield opened
    finally:
        opened.close()
    opened.check_released()


def new_separation(runner: SegmentRunner, monkeypatch: pytest.MonkeyPatch) -> Separation:
    monkeypatch.setattr(separators, "open_plan", lambda *_: runner)
    return Separation(Separator(FILE), SPEC, -20.0, -60.0)


def block_of(seed: int) -> CropBlock:
    """Crops of every kind, the last of them cut by the recording's end, each with the context around it."""
    rng = np.random.default_rng(seed)
    pcm = rng.uniform(-0.9, 0.9, (8, CROP + 2 * CONTEXT, 2)).astype(np.float32)
    kinds = rng.permutation(7)
    pcm[kinds[0]] *= 0.2  # nobody sings
    pcm[kinds[1]] = 0
    pcm[kinds[2], CONTEXT + 5, 1] = np.nan
    pcm[kinds[3], :6000, 1] = -pcm[kinds[3], :6000, 0]  # the channels cancel
    pcm[kinds[4], CONTEXT:-CONTEXT] *= 1e-4  # loud only in what surrounds it
    start = np.arange(8) * CROP
    stop = start + CROP + 2 * CONTEXT
    stop[7] -= 3000
    pcm[7, -3000 - CONTEXT :] = 0
    return CropBlock(pcm, list(range(8)), start, stop)


Embedded = tuple[CropBlock, EmbeddedCrops, NDArray[np.float32]]


def check_equal(found: Embedded, expected: Embedded) -> None:
    """Equal to the last bit, but for the energy, which is summed in another precision."""
    for field in ("embedding", "peak", "rms", "state"):
        np.testing.assert_array_equal(getattr(found[1], field), getattr(expected[1], field))
    np.testing.assert_allclose(found[2], expected[2], atol=1e-4)
    np.testing.assert_array_equal(found[0].stop, expected[0].stop)


def expected_of(blocks: list[CropBlock], monkeypatch: pytest.MonkeyPatch) -> list[Embedded]:
    """What comes of them where each voice is copied to the host and back."""
    with both(index=1) as opened:
        separation = new_separation(opened.runner, monkeypatch)
        return [separation.embed(block, opened.engine) for block in blocks]


def test_results_are_those_by_way_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of(0)
    expected = expected_of([block], monkeypatch)[0]
    assert set(expected[1].state.tolist()) == {LOUD, SILENT, INVALID, VOICELESS}
    with both() as opened:
        check_equal(new_separation(opened.runner, monkeypatch).embed(block, opened.engine), expected)


def test_nothing_but_energies_levels_and_embeddings_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    down: list[int] = []
    with both() as opened:
        for device in opened.devices:
            download = device.download

            def spy(destination: Any, source: int, stream: int, download: Any = download) -> None:
                down.append(destination.nbytes)
                download(destination, source, stream)

            monkeypatch.setattr(device, "download", spy)
        new_separation(opened.runner, monkeypatch).embed(block_of(1), opened.engine)
    assert down
    assert max(down) <= 4 * SPEC.embedding_dim * opened.networks[1].max_batch


def test_many_callers_hold_more_voices_than_there_are_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that waited for a lane while its own voices wait to be embedded would wait for ever."""
    blocks = [block_of(seed) for seed in range(12)]
    expected = expected_of(blocks, monkeypatch)
    with both(seed=5) as opened, ThreadPoolExecutor(LANES + 2) as pool:
        separation = new_separation(opened.runner, monkeypatch)
        found = within(PATIENCE, lambda: list(pool.map(lambda block: separation.embed(block, opened.engine), blocks)))
    for one, other in zip(found, expected, strict=True):
        check_equal(one, other)


FAILURES = st.fixed_dictionaries(
    {},
    optional={
        "no_memory_at": st.frozensets(st.integers(1, 60), max_size=2),
        "lost_at_call": st.integers(0, 300),
        "fail_after": st.integers(0, 200),
    },
)
EXPECTED: dict[int, Embedded] = {}


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 5),
    seed=st.integers(0, 1 << 16),
    separating=st.one_of(st.just({}), FAILURES),
    encoding=st.one_of(st.just({}), FAILURES),
    close_after=st.one_of(st.none(), st.integers(0, 4)),
    engine_first=st.booleans(),
    threads=st.integers(1, 4),
)
def test_every_call_ends_with_its_result_or_an_error(
    n: int,
    seed: int,
    separating: dict[str, Any],
    encoding: dict[str, Any],
    close_after: int | None,
    engine_first: bool,
    threads: int,
) -> None:
    """And all memory is given back, whichever of the two fails or is closed first."""
    may_fail = bool(separating or encoding or close_after is not None)
    with pytest.MonkeyPatch.context() as monkeypatch:
        missing = [number for number in range(n) if number not in EXPECTED]
        EXPECTED.update(zip(missing, expected_of([block_of(number) for number in missing], monkeypatch), strict=True))
        try:
            opened = within(PATIENCE, lambda: open_both(seed=seed, separating=separating, encoding=encoding))
        except (SingerEmbedError, RuntimeError):
            assert may_fail
            return
        separation = new_separation(opened.runner, monkeypatch)

        def call(number: int) -> None:
            try:
                found = separation.embed(block_of(number), opened.engine)
            except EngineError:
                assert may_fail
                return
            check_equal(found, EXPECTED[number])

        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(call, number) for number in range(n)]
            if close_after is not None:
                within(PATIENCE, lambda: wait(futures[:close_after]))
                opened.close(engine_first=engine_first)
            assert not wait(futures, PATIENCE).not_done, "deadlock"
            for future in futures:
                future.result()
        opened.close(engine_first=engine_first)
        opened.check_released()
