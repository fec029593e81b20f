"""Loss terms of the five methods, as functions of projections, and of learning from a teacher's embeddings.

Each takes the projections of two views of a batch, `z1` and `z2`, float [batch, dim], where rows of equal index are a
positive pair, and returns a scalar. Epsilons that the papers do not give are those of the official code (github
SonyCSLParis/ssl-singer-identity, losses.py), whose values the tests reproduce.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from singerembed.errors import UsageError

_COSINE_EPS = 1e-8
_VARIANCE_EPS = 1e-8


def contrastive(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float,
    negatives: int,
    decoupled: bool,
    singers: Tensor | None = None,
) -> Tensor:
    """Return NT-Xent (arXiv 2002.05709) in one direction, from z1 to z2, with `negatives` negatives per row.

    The negatives of row i are rows i - 1, i - 2, ... of `z2`, wrapping around, as in the official code. `decoupled`
    leaves the positive out of the denominator (arXiv 2110.06848). With `singers`, int [batch], rows of the same singer
    are no negatives (arXiv 2407.08647), and rows without negatives do not count. For a batch of one singer the loss and
    its gradients are 0.
    """
    _check_pair(z1, z2)
    with _full_precision(z1):
        similarity = F.normalize(z1, dim=1, eps=_COSINE_EPS) @ F.normalize(z2, dim=1, eps=_COSINE_EPS).T / temperature
    rows = torch.arange(len(z1), device=z1.device)
    shift = (rows[:, None] - rows[None, :]) % len(z1)
    is_negative = (shift >= 1) & (shift <= negatives)
    if singers is not None:
        is_negative &= singers[:, None] != singers[None, :]
    counts = is_negative.any(dim=1)
    if not counts.any():
        return 0 * similarity.sum()
    in_denominator = is_negative if decoupled else is_negative | (shift == 0)
    denominator = similarity.masked_fill(~in_denominator, -math.inf)[counts].logsumexp(dim=1)
    return (denominator - similarity.diagonal()[counts]).mean()


def invariance(z1: Tensor, z2: Tensor) -> Tensor:
    """Return the mean squared difference over all elements: VICReg (arXiv 2105.04906), equation 5, divided by dim."""
    _check_pair(z1, z2)
    return F.mse_loss(z1, z2)


def variance(z1: Tensor, z2: Tensor, *, gamma: float) -> Tensor:
    """Return the hinge loss on the standard deviation of each dimension, mean of both views: VICReg, equation 1.

    It is 0 if all standard deviations reach `gamma`. Raises ValueError for a batch below 2.
    """
    _check_pair(z1, z2)

    def hinge(z: Tensor) -> Tensor:
        return F.relu(gamma - (z.var(dim=0) + _VARIANCE_EPS).sqrt()).mean()

    return (hinge(z1) + hinge(z2)) / 2


def covariance(z1: Tensor, z2: Tensor) -> Tensor:
    """Return the squared off-diagonal covariances over the dimension, summed over both views: VICReg, equations 3, 4.

    Raises ValueError for a batch below 2.
    """
    _check_pair(z1, z2)

    def off_diagonal(z: Tensor) -> Tensor:
        centred = z - z.mean(dim=0)
        with _full_precision(z):
            covariances = centred.T @ centred / (len(z) - 1)
        return (covariances - covariances.diagonal().diag()).square().sum() / z.shape[1]

    return off_diagonal(z1) + off_diagonal(z2)


def alignment(z1: Tensor, z2: Tensor, *, alpha: float = 2.0) -> Tensor:
    """Return the mean distance within pairs to the power `alpha`: arXiv 2005.10242, section 4.1."""
    _check_pair(z1, z2)
    distances: Tensor = torch.linalg.vector_norm(z1 - z2, dim=1)
    return distances.pow(alpha).mean()


def uniformity(z: Tensor, *, t: float = 2.0) -> Tensor:
    """Return the log of the mean Gaussian potential over all pairs of one view: arXiv 2005.10242, section 4.1.

    On a unit sphere of many dimensions its minimum is about -2 t. Raises ValueError for a batch below 2.
    """
    _check_pair(z, z)
    exponents: Tensor = -t * torch.pdist(z).square()
    return torch.logsumexp(exponents, 0) - math.log(exponents.numel())


def towards(embeddings: Tensor, targets: Tensor) -> Tensor:
    """Return 1 minus the mean cosine of each row of `embeddings`, [batch, dim], with the same row of `targets`."""
    _check_pair(embeddings, targets)
    return 1 - F.cosine_similarity(embeddings, targets, dim=1, eps=_COSINE_EPS).mean()


@cache
def orthonormal_map(inputs: int, outputs: int) -> Tensor:
    """Return a fixed random matrix, float32 [inputs, outputs], whose rows are orthonormal: it keeps all cosines.

    Raises UsageError if there are more inputs than outputs.
    """
    if inputs > outputs:
        raise UsageError(f"the teacher's embedding has {inputs} dimensions, more than the encoder's {outputs}")
    columns, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((outputs, inputs)))
    return torch.from_numpy(columns.T.astype(np.float32).copy())


def relations(embeddings: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared difference of the cosine similarities between rows (arXiv 1904.05068, as matrices).

    `embeddings`, [batch, dim], and `targets`, [batch, any dim], have as many rows. The diagonal does not count.
    """
    _check_pair(embeddings, embeddings)

    def similarities(z: Tensor) -> Tensor:
        unit = F.normalize(z.float(), dim=1, eps=_COSINE_EPS)
        with _full_precision(z):
            return unit @ unit.T

    count = len(embeddings) * (len(embeddings) - 1)
    return (similarities(embeddings) - similarities(targets)).fill_diagonal_(0).square().sum() / count


def neighbours(embeddings: Tensor, targets: Tensor, bank: Tensor, *, temperature: float) -> Tensor:
    """Return how far the embeddings' neighbours among many targets are from those of their own targets.

    It is the mean divergence (Kullback-Leibler, in nats) of the softmax of the cosines over `bank` (as arXiv 2101.04731
    with a fixed teacher). `embeddings` and `targets`: [batch, dim]; `bank`: [n, dim], of length 1. A small
    `temperature` asks for the nearest ones only.
    """
    _check_pair(embeddings, targets)
    with _full_precision(embeddings):
        wanted, found = (
            F.normalize(z.float(), dim=1, eps=_COSINE_EPS) @ bank.T / temperature for z in (targets, embeddings)
        )
        return F.kl_div(found.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)


def _full_precision(z: Tensor) -> torch.autocast:
    """Disable autocast, which would round matrix products to half precision: a similarity of 5 to within 0.03."""
    return torch.autocast(z.device.type, enabled=False)


def _check_pair(z1: Tensor, z2: Tensor) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(
            f"projections must be two [batch, dim] tensors alike, got {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
    if len(z1) < 2:
        raise ValueError(f"a batch of {len(z1)} has nothing to compare with; give at least 2")
