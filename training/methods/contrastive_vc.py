"""Contrastive learning with VICReg's variance and covariance terms: arXiv 2401.05064, section 3.2."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from training.methods.base import Options
from training.methods.contrastive import Contrastive, ContrastiveOptions
from training.methods.vicreg import RegularisationOptions, regularisation_terms


class ContrastiveVCOptions(ContrastiveOptions, RegularisationOptions):
    """Options of the contrastive loss and of the regularisation."""


class ContrastiveVC(Contrastive):
    """The contrastive loss with variance and covariance regularisation."""

    options_type: ClassVar[type[Options]] = ContrastiveVCOptions

    def terms(self, z1: Tensor, z2: Tensor, groups: Tensor) -> dict[str, Tensor]:
        """Return the contrastive, variance and covariance terms."""
        regularisation = regularisation_terms(z1, z2, self.options, l2_normalised=self.projection.l2_normalise)
        return super().terms(z1, z2, groups) | regularisation
