"""Decoupled contrastive learning of singers: COLA (arXiv 2010.10915) with the loss of arXiv 2110.06848."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from training import losses
from training.config import Count, Positive
from training.methods.base import Method, Options


class ContrastiveOptions(Options):
    """The paper's settings."""

    temperature: Positive = 0.2
    negatives: Count = 250  # at most; a batch of n pairs has n - 1
    decoupled: bool = True


class Contrastive(Method):
    """Contrasts pairs with other recordings, or other singers."""

    options_type: ClassVar[type[Options]] = ContrastiveOptions

    def terms(self, z1: Tensor, z2: Tensor, groups: Tensor) -> dict[str, Tensor]:
        """Return the contrastive loss."""
        options: ContrastiveOptions = self.options
        loss = losses.contrastive(
            z1,
            z2,
            temperature=options.temperature,
            negatives=options.negatives,
            decoupled=options.decoupled,
            singers=groups,
        )
        return {"contrastive": loss}
