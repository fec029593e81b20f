"""Whitens the last layer of a trained encoder, so that directions of which it is unsure count as well."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from singerembed.model.checkpoint import Checkpoint
from training.export import LAST_BIAS, LAST_WEIGHT

# Share of the mean variance of the directions that were learnt, below which one counts less and less: what the two
# passes of the bundled checkpoint come to, which were chosen on the eight singers of docs/model-card.md.
_FLOOR = 5e-4


def whitened(checkpoint: Checkpoint, embeddings: NDArray[np.float32], rank: int) -> Checkpoint:
    """Return the encoder with mean and covariance of its `embeddings`, [n, embedding_dim], taken out.

    A network that learns to give another one's embeddings gives the mean of what they may be, so a direction that it
    cannot tell for sure comes out small. `rank`: dimensions of what it learnt; the others hold something too. The
    whitening is symmetric: each dimension stays as near as may be to what it was.
    """
    rows = embeddings.astype(np.float64)
    mean = rows.mean(axis=0)
    variance, axes = np.linalg.eigh(np.cov(rows.T, bias=True))
    relative = variance.clip(min=0) / (variance.sum() / rank)  # so that lengths stay about what they were
    whitening = (axes / np.sqrt(relative + _FLOOR)) @ axes.T
    tensors = dict(checkpoint.state_dict)
    weight, bias = (tensors[name].double().numpy() for name in (LAST_WEIGHT, LAST_BIAS))
    tensors[LAST_WEIGHT] = torch.from_numpy(whitening @ weight).float()
    tensors[LAST_BIAS] = torch.from_numpy(whitening @ (bias - mean)).float()
    words = f"{len(rows)} crops of the training"
    return replace(checkpoint, state_dict=tensors, spec=replace(checkpoint.spec, centred_on=words))
