"""Alignment and uniformity on the hypersphere: arXiv 2005.10242."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from training import losses
from training.config import Positive
from training.methods.base import Method, Options
from training.methods.vicreg import Weight


class UniformityAlignmentOptions(Options):
    """The paper's settings."""

    alignment: Weight = 1.0
    uniformity: Weight = 1.0
    alpha: Positive = 2.0
    t: Positive = 2.0


class UniformityAlignment(Method):
    """Minimises the distance within pairs, and spreads each view uniformly over the sphere."""

    options_type: ClassVar[type[Options]] = UniformityAlignmentOptions
    on_sphere: ClassVar[bool] = True

    def terms(self, z1: Tensor, z2: Tensor, groups: Tensor) -> dict[str, Tensor]:
        """Return both terms; uniformity is the mean over the views."""
        del groups
        options: UniformityAlignmentOptions = self.options
        uniformity = (losses.uniformity(z1, t=options.t) + losses.uniformity(z2, t=options.t)) / 2
        return {
            "alignment": options.alignment * losses.alignment(z1, z2, alpha=options.alpha),
            "uniformity": options.uniformity * uniformity,
        }
