"""The GPU runtime under schedules that are drawn: whatever fails when, results are right or errors are raised.

The fake device refuses what CUDA and TensorRT leave undefined (gpu_fakes.py), and a schedule may not make it do so.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from gpu_fakes import FakeDevice, FakeNetwork
from hypothesis import given, settings
from hypothesis import strategies as st
from mel_kernels import noise
from test_gpu import PATIENCE, SMALL, alone, check_released, within

from singerembed.engine.gpu import GpuEngine
from singerembed.errors import EngineError, SingerEmbedError
from singerembed.model.mel import LOUD, SILENT

CALLS = st.lists(
    st.tuples(st.integers(1, 24), st.booleans(), st.integers(1, 7)), min_size=1, max_size=8
)  # crops, int16, and every which crop is silent


def crops_of(n: int, is_int16: bool, silent: int, seed: int) -> Any:
    pcm: Any = noise(SMALL, n, seed=seed)
    pcm[silent - 1 :: silent * 2] = 0
    return (pcm * 32767).astype(np.int16) if is_int16 else pcm


@settings(max_examples=120, deadline=None)
@given(
    calls=CALLS,
    seed=st.integers(0, 1 << 16),
    max_batch=st.sampled_from([1, 2, 3, 4, 8, 13]),
    capturable=st.booleans(),
    no_memory_at=st.frozensets(st.integers(1, 60), max_size=3),
    largest=st.one_of(st.none(), st.integers(1, 8)),
    lost_at_call=st.one_of(st.none(), st.integers(0, 400)),
    fail_after=st.one_of(st.none(), st.integers(0, 200)),
    close_after=st.one_of(st.none(), st.integers(0, 8)),
    threads=st.integers(1, 4),
)
def test_every_call_ends_with_its_result_or_an_error(
    calls: list[tuple[int, bool, int]],
    seed: int,
    max_batch: int,
    capturable: bool,
    no_memory_at: frozenset[int],
    largest: int | None,
    lost_at_call: int | None,
    fail_after: int | None,
    close_after: int | None,
    threads: int,
) -> None:
    device = FakeDevice(seed=seed, lost_at_call=lost_at_call, fail_after=fail_after, no_memory_at=no_memory_at)
    networks: list[FakeNetwork] = []

    def open_network(fake: FakeDevice) -> FakeNetwork:
        networks.append(FakeNetwork(fake, SMALL, max_batch=max_batch, capturable=capturable))
        return networks[0]

    may_fail = lost_at_call is not None or fail_after is not None or close_after is not None
    try:
        engine = within(PATIENCE, lambda: GpuEngine(SMALL, lambda: device, open_network))
    except SingerEmbedError:
        assert may_fail or no_memory_at
        check_released(device)
        return
    except RuntimeError:
        assert lost_at_call is not None
        check_released(device)
        return
    if largest is not None:
        networks[0].largest = largest  # from now on: another process takes the memory

    def call(i: int) -> None:
        n, is_int16, silent = calls[i]
        pcm = crops_of(n, is_int16, silent, seed=seed + i)
        try:
            result = engine.embed(pcm)
        except EngineError:
            assert may_fail
            return
        loud = (pcm != 0).any(axis=1)
        np.testing.assert_array_equal(result.state, np.where(loud, LOUD, SILENT))
        np.testing.assert_array_equal(result.embedding, alone(pcm[loud]) if loud.any() else np.empty((0, 8)))

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(call, i) for i in range(len(calls))]
        if close_after is not None:
            within(PATIENCE, lambda: wait(futures[:close_after]))
            within(PATIENCE, engine.close)
        done = wait(futures, PATIENCE)
        assert not done.not_done, "deadlock"
        for future in futures:
            future.result()
    within(PATIENCE, engine.close)
    check_released(device, networks[0])
