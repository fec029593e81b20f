"""This project's encoders as compared models: engine files, checkpoints, and the untrained network."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from singerembed.engine.base import Engine
from singerembed.engine.load import load_engine
from singerembed.evaluation.baselines.base import ONLY_LAYER, Crops, ModelFacts, require
from singerembed.model.checkpoint import Checkpoint, encoder_template, load_checkpoint, parameter_count
from singerembed.model.mel import MelExtractor
from singerembed.model.spec import ModelSpec

POSTER = "5.0 M / 44.1 kHz / 1000"
UNTRAINED_SEED = 0


class EngineModel:
    """An engine as a `Model`."""

    def __init__(self, engine: Engine, name: str, *, workers: int = 1) -> None:
        self._engine = engine
        spec = engine.spec
        self.facts = ModelFacts(
            name=name,
            sample_rate=spec.sample_rate,
            n_parameters=_n_parameters(),
            description=f"{spec.name} ({spec.method}), {engine.description}",
            poster=POSTER,
        )
        self.batch = engine.batch
        self.workers = workers

    def embed(self, crops: Crops) -> dict[str, NDArray[np.float32]]:
        """See `Model.embed`."""
        return {ONLY_LAYER: self._engine.embed(crops).embedding}

    def close(self) -> None:
        """See `Model.close`."""
        self._engine.close()


def engine_model(path: str | None, name: str, workers: int) -> EngineModel:
    """Open the engine file `path` (None: the bundled one). Raises EngineError."""
    return EngineModel(load_engine(path, silence_dbfs=-np.inf), name, workers=workers)


def checkpoint_model(source: str, name: str) -> EngineModel:
    """Load a checkpoint, named as for `build-engine`, and run it in torch. Raises CheckpointError."""
    _require_torch("running a checkpoint")
    from singerembed.engine.torch import TorchEngine

    return EngineModel(TorchEngine(load_checkpoint(source), silence_dbfs=-np.inf), name)


def untrained_model(name: str) -> EngineModel:
    """Return the encoder with random weights, to show what the architecture alone achieves."""
    _require_torch("the untrained encoder")
    import torch

    from singerembed.engine.torch import TorchEngine

    with torch.random.fork_rng(devices=[]):  # torch's encoder is made with weights that are drawn
        return EngineModel(TorchEngine(untrained_checkpoint(), silence_dbfs=-np.inf), name)


def untrained_checkpoint() -> Checkpoint:
    """Return random weights of a fixed seed. Needs torch.

    The statistics of its batch norms are computed on synthetic tones. With the initial ones (mean 0, variance 1) the
    signal vanishes from layer to layer, until all embeddings are equal up to rounding.
    """
    import torch
    from torchvision.models import efficientnet_b0

    from singerembed.engine.torch import load_encoder

    spec = ModelSpec(name=f"random weights, seed {UNTRAINED_SEED}", method="untrained")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        weights = efficientnet_b0(num_classes=spec.embedding_dim).state_dict()
        encoder = load_encoder(Checkpoint(spec, weights, "untrained", {})).train()
        for module in encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.inference_mode():
            encoder(torch.from_numpy(MelExtractor(spec, -np.inf).log_mel(_tones(spec)).mel))
        return Checkpoint(spec, encoder.net.state_dict(), "untrained", {})


def _tones(spec: ModelSpec) -> NDArray[np.float32]:
    """Return harmonic tones of eight pitches with vibrato and some noise, float32 [8, crop_samples]."""
    rng = np.random.default_rng(UNTRAINED_SEED)
    seconds = np.arange(spec.crop_samples) / spec.sample_rate
    tones = []
    for pitch in 110 * 2 ** (np.arange(8) / 3):
        phase = 2 * np.pi * pitch * seconds + 2 * np.sin(2 * np.pi * 5.5 * seconds)
        harmonics = np.arange(1, max(2, int(8000 / pitch)))
        tone = sum(np.sin(k * phase) / k ** rng.uniform(0.5, 2) for k in harmonics)
        tones.append(tone + 0.01 * rng.standard_normal(len(seconds)))
    return np.stack(tones).astype(np.float32)


def _require_torch(purpose: str) -> None:
    require("torch", purpose)
    require("torchvision", purpose)


def _n_parameters() -> int | None:
    """Count the parameters of the encoder, the same in all engines; None if torch is not installed."""
    try:
        return parameter_count(encoder_template())
    except ImportError:
        return None
