"""A fake engine and a fake decoder that return at once, for this process and for the workers of a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from singerembed.engine.base import EmbeddedCrops
from singerembed.engine.file import EngineFile
from singerembed.model.mel import INVALID, LOUD, SILENT, Pcm

SAMPLES = 4_410  # per recording: one crop, padded


class InstantEngine:
    """Measures levels and returns zeros at once, so that everything else of a run can be measured."""

    description = "instant"
    batch = 4
    waits = False
    first_crop: ClassVar[float] = 0.0  # time.perf_counter() at the first call

    def __init__(self, file: EngineFile, _silence_dbfs: float, _device: int) -> None:
        self.spec = file.spec

    def embed(self, crops: Pcm) -> EmbeddedCrops:
        InstantEngine.first_crop = InstantEngine.first_crop or time.perf_counter()
        peak = np.abs(crops.astype(np.float32)).max(axis=1)
        state = np.where(np.isnan(peak), INVALID, np.where(peak > 0, LOUD, SILENT)).astype(np.uint8)
        embedding = np.zeros((int((state == LOUD).sum()), self.spec.embedding_dim), np.float32)
        return EmbeddedCrops(embedding, peak, peak, state)

    def close(self) -> None: ...


class _Recording:
    sample_rate = 44_100
    notes: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self._position = 0

    def read(self, n: int) -> Pcm:
        n = min(n, SAMPLES - self._position)
        self._position += n
        return np.full(n, 1_000, np.int16)

    def seek(self, sample: int) -> None:
        self._position = min(sample, SAMPLES)

    def length(self) -> int:
        return SAMPLES

    def check_complete(self) -> None: ...
    def close(self) -> None: ...


@contextlib.contextmanager
def _open_recording(_location: str, *_rest: Any, **_options: Any) -> Iterator[_Recording]:
    yield _Recording()


def install_engine(engine: type[InstantEngine] = InstantEngine) -> None:
    """Replace the engine of runs in this process."""
    from singerembed.jobs import units

    vars(units)["open_engine"] = engine


def install() -> None:
    """Replace the engine and the decoder of runs in this process."""
    from singerembed.jobs import track

    install_engine()
    track.open_recording = _open_recording  # type: ignore[attr-defined, assignment]


def start_ray(*, fake: bool, workers: int | None = None) -> Any:
    """Start a local Ray cluster as `--ray` does, for runs of this process. `fake`: its workers use the fakes."""
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }  # not Ray's 15
    import ray

    from singerembed.engine.machine import available_cores

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module
    ray.init(
        address="local", num_cpus=workers or available_cores(), include_dashboard=False, object_store_memory=256 << 20,
        log_to_driver=False, logging_level=logging.CRITICAL,
        runtime_env={"worker_process_setup_hook": install} if fake else None,
    )  # fmt: skip
    return ray
