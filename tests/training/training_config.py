"""A fast configuration for tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.config import TrainConfig, parse_config


def small_config(source: Path, method: str = "contrastive", **sections: dict[str, Any]) -> TrainConfig:
    """A configuration on the CPU with crops of half a second and three pairs a batch; `sections` override."""
    base: dict[str, dict[str, Any]] = {
        "model": {"initialise": "random"},
        "data": {"source": str(source), "crop_seconds": 0.5, "batch_size": 3, "workers": 0, "validation_fraction": 0.3},
        "augment": {"pitch_probability": 0.0},
        "trainer": {"accelerator": "cpu", "devices": 1, "threads": 1, "deterministic": True, "max_epochs": 1},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in base.keys() | sections.keys()}
    return parse_config({"method": method, "name": "small", **merged}, "small_config")
