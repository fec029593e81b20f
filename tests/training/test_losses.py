from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tolerances
import torch
import torch.nn.functional as F
from torch import Tensor

from training import losses

GOLDEN = Path(__file__).parents[1] / "golden"
INPUTS = np.load(GOLDEN / "losses_in.npz")
EXPECTED: dict[str, dict[str, float]] = json.loads((GOLDEN / "losses.json").read_text())
DIM = 128

Loss = Callable[[Tensor, Tensor], Tensor]


def contrastive(negatives: int = 250, decoupled: bool = True, singers: Tensor | None = None) -> Loss:
    return lambda z1, z2: losses.contrastive(
        z1, z2, temperature=0.2, negatives=negatives, decoupled=decoupled, singers=singers
    )


def vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    gamma = DIM**-0.5
    terms = (losses.invariance(z1, z2), losses.variance(z1, z2, gamma=gamma), losses.covariance(z1, z2))
    return 25 * terms[0] + 25 * terms[1] + 100 * terms[2]


LOSSES: dict[str, Loss] = {
    "contrastive_decoupled": contrastive(),
    "contrastive_coupled": contrastive(decoupled=False),
    "contrastive_8_negatives": contrastive(negatives=8),
    "invariance": losses.invariance,
    "variance_gamma_1": lambda z1, z2: losses.variance(z1, z2, gamma=1.0),
    "variance_gamma_l2": lambda z1, z2: losses.variance(z1, z2, gamma=DIM**-0.5),
    "covariance": losses.covariance,
    "vicreg_25_25_100_gamma_l2": vicreg,
    "align": losses.alignment,
    "uniform_z1": lambda z1, _: losses.uniformity(z1),
    "uniform_z2": lambda _, z2: losses.uniformity(z2),
    "byol_mse": losses.invariance,
}


def projections(kind: str) -> tuple[Tensor, Tensor]:
    z1, z2 = (torch.from_numpy(INPUTS[name]) for name in ("z1", "z2"))
    return (F.normalize(z1, dim=-1), F.normalize(z2, dim=-1)) if kind == "l2" else (z1, z2)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, values in EXPECTED.items() for name in values])
def test_equals_the_official_code(kind: str, name: str) -> None:
    assert float(LOSSES[name](*projections(kind))) == pytest.approx(
        EXPECTED[kind][name], rel=tolerances.LOSS_RELATIVE, abs=tolerances.LOSS_ABSOLUTE
    )


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_mixed_precision_does_not_round_the_loss(name: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        mixed = LOSSES[name](*projections("l2"))
    assert mixed.dtype == torch.float32
    assert float(mixed) == pytest.approx(float(LOSSES[name](*projections("l2"))), rel=1e-6)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradient_equals_finite_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    # Deviations below every gamma in use, or the hinge has no gradient to check.
    z1, z2 = (0.05 * torch.randn(6, DIM, dtype=torch.float64, generator=generator) for _ in range(2))
    z1.requires_grad_(), z2.requires_grad_()
    assert torch.autograd.gradcheck(LOSSES[name], (z1, z2))
    assert LOSSES[name](z1, z2).requires_grad


def test_contrastive_equals_a_loop_over_rows() -> None:
    z1, z2 = projections("raw")
    singers = torch.arange(len(z1)) % 5
    rows = []
    for i in range(len(z1)):
        cosines = F.cosine_similarity(z1[i : i + 1], z2) / 0.2
        negatives = [
            cosines[(i - shift) % len(z1)] for shift in range(1, 9) if singers[i] != singers[(i - shift) % len(z1)]
        ]
        rows.append(torch.stack(negatives).logsumexp(0) - cosines[i])
    assert float(contrastive(8, singers=singers)(z1, z2)) == pytest.approx(float(torch.stack(rows).mean()), rel=1e-5)


@pytest.mark.parametrize("n", [2, 5])
def test_contrastive_of_equal_projections(n: int) -> None:
    z = torch.ones(n, DIM)
    assert float(contrastive()(z, z)) == pytest.approx(math.log(n - 1), abs=1e-5)
    assert float(contrastive(decoupled=False)(z, z)) == pytest.approx(math.log(n), abs=1e-5)


def test_a_pair_of_the_same_singer_is_no_negative() -> None:
    z1, z2 = projections("raw")
    singers = torch.arange(len(z1))
    singers[7] = singers[3]
    moved = z2.clone()
    moved[3] += 100.0  # row 7 must not see it; only row 3's own positive and the others' negatives do
    loss = contrastive(singers=singers)
    z1.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z1, z2), z1)
    (gradient_moved,) = torch.autograd.grad(loss(z1, moved), z1)
    torch.testing.assert_close(gradient[7], gradient_moved[7])
    assert not torch.allclose(gradient[8], gradient_moved[8])


def test_rows_without_negatives_do_not_count() -> None:
    z1, z2 = projections("raw")
    singers = torch.tensor([0, 0, 0, 1])
    full = contrastive(singers=singers)(z1[:4], z2[:4])
    assert math.isfinite(float(full))


def test_a_batch_of_one_singer_teaches_nothing() -> None:
    z1, z2 = (z[:4].requires_grad_() for z in projections("raw"))
    loss = contrastive(singers=torch.zeros(4))(z1, z2)
    assert float(loss.detach()) == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (z1, z2)))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_refuses_a_single_row_and_unlike_shapes(name: str) -> None:
    z1, z2 = projections("raw")
    with pytest.raises(ValueError, match="a batch of 1"):
        LOSSES[name](z1[:1], z2[:1])
    if not name.startswith("uniform"):
        with pytest.raises(ValueError, match="alike"):
            LOSSES[name](z1, z2[:5])


def test_uniformity_of_vectors_far_apart_is_finite() -> None:
    z = (30 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss = losses.uniformity(z)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_uniformity_of_orthogonal_vectors() -> None:
    assert float(losses.uniformity(torch.eye(8))) == pytest.approx(-4.0)  # squared distance 2, t = 2


def test_terms_are_symmetric_in_the_views() -> None:
    z1, z2 = projections("l2")
    for name in ("invariance", "variance_gamma_1", "covariance", "align"):
        assert float(LOSSES[name](z1, z2)) == pytest.approx(float(LOSSES[name](z2, z1)))


def test_neighbours_are_those_of_the_target() -> None:
    torch.manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(50, 8), dim=1)
    targets = bank[:6]
    exact = losses.neighbours(3 * targets, targets, bank, temperature=0.1)  # lengths do not count
    assert float(exact) == pytest.approx(0, abs=1e-6)
    other = bank[6:12]
    # The definition, term by term.
    wanted, found = (torch.softmax(z @ bank.T / 0.1, 1).double() for z in (targets, other))
    expected = (wanted * (wanted / found).log()).sum() / 6
    assert float(losses.neighbours(other, targets, bank, temperature=0.1)) == pytest.approx(float(expected), rel=1e-4)
    near = targets + 0.1 * torch.randn(6, 8)
    assert 0 < float(losses.neighbours(near, targets, bank, temperature=0.1)) < 0.2 * float(expected)
