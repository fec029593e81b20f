"""VICReg, variance-invariance-covariance regularisation: arXiv 2105.04906."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from training import losses
from training.config import Positive
from training.methods.base import Method, Options

Weight = Annotated[float, Field(ge=0)]


class RegularisationOptions(Options):
    """Options of the terms that prevent collapse."""

    variance: Weight = 25.0
    covariance: Weight = 100.0
    gamma: Positive = 1.0  # target standard deviation; ignored for unit vectors, where it is 1 / sqrt(dim)


class VICRegOptions(RegularisationOptions):
    """The paper's settings."""

    invariance: Weight = 25.0


class VICReg(Method):
    """Minimises the distance within pairs, with variance and covariance regularisation."""

    options_type: ClassVar[type[Options]] = VICRegOptions

    def terms(self, z1: Tensor, z2: Tensor, groups: Tensor) -> dict[str, Tensor]:
        """Return the three terms."""
        del groups
        invariance = {"invariance": self.options.invariance * losses.invariance(z1, z2)}
        return invariance | regularisation_terms(z1, z2, self.options, l2_normalised=self.projection.l2_normalise)


def regularisation_terms(
    z1: Tensor, z2: Tensor, options: RegularisationOptions, *, l2_normalised: bool
) -> dict[str, Tensor]:
    """Return the weighted variance and covariance terms.

    For unit vectors the target standard deviation is 1 / sqrt(dim), the largest that all dimensions can have.
    """
    gamma = z1.shape[1] ** -0.5 if l2_normalised else options.gamma
    return {
        "variance": options.variance * losses.variance(z1, z2, gamma=gamma),
        "covariance": options.covariance * losses.covariance(z1, z2),
    }
