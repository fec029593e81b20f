"""What several test modules need: golden values, the reference checkpoint and its engine, and recordings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from singerembed.mel import available_isas
from singerembed.spec import ModelSpec

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))


def pytest_report_header() -> str:
    return f"mel kernels: {', '.join(available_isas())}"


@dataclass(frozen=True)
class Golden:
    """The official pipeline's values, see tests/golden/README.md."""

    names: list[str]
    pcm: NDArray[np.int16]  # [8, 176400]
    mel: NDArray[np.float32]  # [8, 128, 345], power
    embedding: NDArray[np.float32]  # [8, 1000]


@pytest.fixture(scope="session")
def golden() -> Golden:
    values = np.load(GOLDEN / "expected.npz")
    names = [str(name) for name in values["names"]]
    pcm = [soundfile.read(GOLDEN / "crops" / f"{name}.wav", dtype="int16")[0] for name in names]
    return Golden(names, np.stack(pcm), values["mel"], values["embedding"])


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    return ModelSpec(name="reference", method="untrained")


@pytest.fixture(scope="session")
def reference_tensors() -> dict[str, Any]:
    """The reference weights as torch tensors under torchvision's names."""
    import torch
    import weights

    return {name: torch.from_numpy(np.array(value)) for name, value in weights.state_dict().items()}


@pytest.fixture(scope="session")
def release_folder(tmp_path_factory: pytest.TempPathFactory, reference_tensors: dict[str, Any]) -> Path:
    """A folder as the official release has it, holding the reference weights."""
    import torch

    folder = tmp_path_factory.mktemp("official") / "byol"
    folder.mkdir()
    torch.save({f"encoder.net.2.{name}": tensor for name, tensor in reference_tensors.items()}, folder / "model.pt")
    (folder / "hyperparams.yaml").write_bytes((GOLDEN / "hyperparams.yaml").read_bytes())
    return folder


@pytest.fixture(scope="session")
def reference_engine(tmp_path_factory: pytest.TempPathFactory, release_folder: Path) -> str:
    """Path of the engine built from the reference weights."""
    from singerembed.engine.build import build_engine

    path = str(tmp_path_factory.mktemp("engine") / "reference.engine")
    build_engine(str(release_folder), path)
    return path


@pytest.fixture(scope="session")
def voice() -> Callable[..., NDArray[np.float32]]:
    """A function that makes a voice-like mono signal, float32, peak 0.5."""

    def make(seconds: float, sample_rate: int = 44_100, f0: float = 220.0) -> NDArray[np.float32]:
        t = np.arange(round(seconds * sample_rate)) / sample_rate
        phase = 2 * np.pi * f0 * t + 0.3 * np.sin(2 * np.pi * 5.5 * t)
        tone = sum(np.sin(k * phase) / k for k in range(1, 12)) * (1.2 + np.sin(2 * np.pi * 0.7 * t))
        return (0.5 * tone / max(1e-9, np.abs(tone).max())).astype(np.float32) if len(t) else np.empty(0, np.float32)

    return make
