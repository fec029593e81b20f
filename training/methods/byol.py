"""BYOL, bootstrap your own latent: arXiv 2006.07733."""

from __future__ import annotations

import copy
import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from singerembed.errors import UsageError
from training import losses
from training.config import Positive, TrainConfig
from training.data import PairBatch
from training.methods.base import Method, Options
from training.model import Predictor


class ByolOptions(Options):
    """The paper's settings."""

    tau: Annotated[float, Field(ge=0, le=1)] = 0.99  # decay of the moving average at the start
    tau_epochs: Positive = 1000.0  # tau reaches 1 after this many
    # Factor on the predictor's learning rate. Short runs collapse if the predictor lags behind the encoder; according
    # to appendix J of arXiv 2006.07733 a near-optimal predictor prevents collapse.
    predictor_rate: Positive = 1.0


class Byol(Method):
    """Predicts the projection of one view by a moving average of the encoder (the teacher) from the other view."""

    options_type: ClassVar[type[Options]] = ByolOptions
    on_sphere: ClassVar[bool] = True

    def __init__(self, config: TrainConfig, steps_per_epoch: int) -> None:
        super().__init__(config, steps_per_epoch)
        if config.teacher.targets:
            raise UsageError("teacher.targets: byol has a teacher of its own; use another method")
        self.predictor = Predictor()
        networks = {"encoder": copy.deepcopy(self.encoder), "projection": copy.deepcopy(self.projection)}
        self.teacher = nn.ModuleDict(networks).requires_grad_(False)

    def pair_terms(self, batch: PairBatch) -> tuple[dict[str, Tensor], Tensor]:
        """Return the symmetric loss: mean squared difference of unit vectors, each view predicting the other.

        It is a mean over pairs, so DDP's mean over devices needs no gathering.
        """
        mels = [self._mel(batch["clips"][:, view]) for view in (0, 1)]
        online = [self.projection(self.encoder(mel)) for mel in mels]
        with torch.no_grad():
            # As in the official code the teacher is in training mode: batch norms use batch statistics.
            targets = [self.teacher["projection"](self.teacher["encoder"](mel)) for mel in mels]
        forward = losses.invariance(self.predictor(online[0]), targets[1])
        backward = losses.invariance(self.predictor(online[1]), targets[0])
        return {"byol": (forward + backward) / 2}, online[0]

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """See `Method.parameter_groups`."""
        online = [*self.encoder.parameters(), *self.projection.parameters()]
        predictor = list(self.predictor.parameters())
        return [
            {"name": "online", "params": online},
            {"name": "predictor", "params": predictor, "lr": learning_rate * self.options.predictor_rate},
        ]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then update the teacher. A batch-end hook would run after checkpoints are written."""
        super().optimizer_step(*args, **kwargs)
        epochs = self.global_step / self.steps_per_epoch
        update_moving_average(self.teacher, self, moving_average_rate(epochs, self.options))


def moving_average_rate(epochs: float, options: ByolOptions) -> float:
    """Return the decay of the moving average: from tau to 1 on a cosine (arXiv 2006.07733, section 3.2)."""
    progress = min(epochs / options.tau_epochs, 1.0)
    return 1 - (1 - options.tau) * (math.cos(math.pi * progress) + 1) / 2


@torch.no_grad()
def update_moving_average(teacher: nn.Module, online: nn.Module, tau: float) -> None:
    """Update the parameters of `teacher` towards those of the same names in `online`. Buffers are not changed."""
    sources = dict(online.named_parameters())
    for name, target in teacher.named_parameters():
        target.lerp_(sources[name], 1 - tau)
