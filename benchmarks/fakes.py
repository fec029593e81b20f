"""A fake engine and a fake decoder that return at once, for this process and for the workers of a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from singerembed.engine.base import EmbeddedCrops
from singerembed.engine.file import EngineFile
from singerembed.model.mel import Pcm

SAMPLES = 4_410  # per recording: one crop, padded


class InstantEngine:
    """A fake engine that returns at once, to measure everything else."""

    description = "instant"
    batch = 4
    waits = False

    def __init__(self, file: EngineFile, _silence_dbfs: float, _device: int) -> None:
        self.spec = file.spec

    def embed(self, crops: Pcm) -> EmbeddedCrops:
        n = len(crops)
        ones = np.ones(n, np.float32)
        return EmbeddedCrops(np.zeros((n, self.spec.embedding_dim), np.float32), ones, ones, np.zeros(n, np.uint8))

    def close(self) -> None: ...


class _Recording:
    sample_rate = 44_100
    n_samples = SAMPLES

    def __init__(self) -> None:
        self._position = 0

    def read(self, n: int) -> Pcm:
        n = min(n, SAMPLES - self._position)
        self._position += n
        return np.full(n, 1_000, np.int16)

    def seek(self, sample: int) -> None:
        self._position = min(sample, SAMPLES)

    def check_complete(self) -> None: ...
    def close(self) -> None: ...


@contextlib.contextmanager
def _open_recording(_location: str, *_rest: Any, **_options: Any) -> Iterator[_Recording]:
    yield _Recording()


def install() -> None:
    """Replace engine and decoder of this process by the fakes."""
    from singerembed.jobs import track as embedding
    from singerembed.jobs import units

    units.open_engine = InstantEngine  # type: ignore[attr-defined, assignment]
    embedding.open_recording = _open_recording  # type: ignore[attr-defined, assignment]


def start_ray(*, fake: bool, workers: int | None = None) -> Any:
    """Start a local Ray cluster as `--ray` does, for runs of this process. `fake`: its workers use the fakes."""
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }  # Ray's default of 15 would slow workers down beside other work
    import ray

    from singerembed.engine.machine import available_cores

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module
    ray.init(
        address="local", num_cpus=workers or available_cores(), include_dashboard=False, object_store_memory=256 << 20,
        log_to_driver=False, logging_level=logging.CRITICAL,
        runtime_env={"worker_process_setup_hook": install} if fake else None,
    )  # fmt: skip
    return ray
