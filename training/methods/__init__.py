"""The five methods by name, which are the folder names of the official release."""

from __future__ import annotations

from singerembed.errors import UsageError
from training.config import TrainConfig
from training.methods.base import Method
from training.methods.byol import Byol
from training.methods.contrastive import Contrastive
from training.methods.contrastive_vc import ContrastiveVC
from training.methods.unif_align import UniformityAlignment
from training.methods.vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    "byol": Byol,
    "contrastive": Contrastive,
    "contrastive-vc": ContrastiveVC,
    "unif-align": UniformityAlignment,
    "vicreg": VICReg,
}


def build_method(config: TrainConfig, steps_per_epoch: int) -> Method:
    """Return the method of `config`, with initialised networks. Raises UsageError for an unknown method."""
    if config.method not in METHODS:
        raise UsageError(f"method {config.method!r} is unknown; there are {', '.join(METHODS)}")
    return METHODS[config.method](config, steps_per_epoch)
