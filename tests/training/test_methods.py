from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_config import small_config

from singerembed.errors import UsageError
from training import losses
from training.callbacks import COLLAPSED_SPREAD, LOW_RANK, CollapseWatch
from training.config import SHORTEST_CROP_SECONDS
from training.data import PairBatch, PairDataset, PairKey
from training.methods import METHODS, build_method
from training.methods.base import learning_rate_factor
from training.methods.byol import Byol, ByolOptions, moving_average_rate, update_moving_average
from training.methods.contrastive import Contrastive
from training.recordings import TRAIN, build_index


@pytest.fixture(scope="module")
def batch(corpus: Path) -> PairBatch:
    config = small_config(corpus, data={"validation_fraction": 0})
    dataset = PairDataset(build_index(config), config)
    items = [dataset[PairKey(0, position, position)] for position in range(6)]
    clips = torch.from_numpy(np.stack([np.asarray(item["clips"]) for item in items]))
    return {"clips": clips, "groups": torch.arange(6)}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_few_steps_lower_the_loss_and_every_weight_takes_part(name: str, corpus: Path, batch: PairBatch) -> None:
    torch.manual_seed(0)
    method = build_method(small_config(corpus, name, model={"initialise": "random"}), steps_per_epoch=10)
    optimiser = torch.optim.Adam([each for each in method.parameters() if each.requires_grad], lr=3e-4)
    values = []
    for _ in range(8):
        torch.manual_seed(1)  # the same dropout, so that steps can be compared
        loss = torch.stack(list(method.pair_terms(batch)[0].values())).sum()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        values.append(float(loss.detach()))
    assert values[-1] < values[0]
    without = [key for key, each in method.named_parameters() if each.requires_grad and each.grad is None]
    assert not without
    assert all(torch.isfinite(each).all() for each in method.parameters())


def test_the_shortest_crops_that_are_allowed_can_be_trained_on(corpus: Path) -> None:
    config = small_config(corpus, data={"crop_seconds": SHORTEST_CROP_SECONDS})
    dataset = PairDataset([each for each in build_index(config) if each.split == TRAIN], config)
    clips = torch.from_numpy(np.stack([dataset[PairKey(0, 0, group)]["clips"] for group in range(2)]))
    terms, _ = build_method(config, steps_per_epoch=1).pair_terms({"clips": clips, "groups": torch.arange(2)})
    assert torch.isfinite(terms["contrastive"])


@pytest.mark.parametrize("name", sorted(METHODS))
def test_configurations_of_the_paper_are_read(name: str) -> None:
    from training.config import load_config

    config = load_config([Path(__file__).parents[2] / "training" / "configs" / f"{name}.yaml"])
    assert config.method == name
    options = METHODS[name].options_type.model_validate(config.loss)
    assert options == METHODS[name].options_type()  # what a file spells out are the defaults
    assert config.data.batch_size == 140
    byol = name == "byol"
    assert config.optimiser.learning_rate == pytest.approx(3e-5 if byol else 1e-4)
    assert config.optimiser.weight_decay == pytest.approx(1.5e-6 if byol else 1e-5)
    assert (config.optimiser.warmup_epochs, config.optimiser.cosine_epochs) == ((10, 1000) if byol else (0, 0))


def terms_of(name: str, corpus: Path, *, l2: bool = True) -> dict[str, float]:
    method = build_method(small_config(corpus, name, model={"l2_normalise": l2}), steps_per_epoch=1)
    generator = torch.Generator().manual_seed(2)
    z1, z2 = (torch.nn.functional.normalize(torch.randn(8, 128, generator=generator), dim=1) for _ in range(2))
    return {key: float(value) for key, value in method.terms(z1, z2, torch.arange(8)).items()}


def test_terms_carry_the_papers_weights(corpus: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    z1, z2 = (torch.nn.functional.normalize(torch.randn(8, 128, generator=generator), dim=1) for _ in range(2))
    contrastive = losses.contrastive(z1, z2, temperature=0.2, negatives=250, decoupled=True)
    variance, covariance = losses.variance(z1, z2, gamma=128**-0.5), losses.covariance(z1, z2)
    expected = {
        "contrastive": {"contrastive": contrastive},
        "contrastive-vc": {"contrastive": contrastive, "variance": 25 * variance, "covariance": 100 * covariance},
        "vicreg": {
            "invariance": 25 * losses.invariance(z1, z2),
            "variance": 25 * variance,
            "covariance": 100 * covariance,
        },
        "unif-align": {
            "alignment": losses.alignment(z1, z2),
            "uniformity": (losses.uniformity(z1) + losses.uniformity(z2)) / 2,
        },
    }
    for name, terms in expected.items():
        assert terms_of(name, corpus) == pytest.approx({key: float(value) for key, value in terms.items()})


def test_gamma_is_what_unit_vectors_can_reach(corpus: Path) -> None:
    assert terms_of("vicreg", corpus)["variance"] < 1
    assert terms_of("vicreg", corpus, l2=False)["variance"] > 20  # against a deviation of 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=[1,", "not YAML"),
        ("augment.noise_amplitude=[0.05, 0.001]", "augment.noise_amplitude.*smaller"),
        ("augment.gain_db=[0, -6]", "augment.gain_db.*smaller"),
        ("seed=4294967296", "seed"),
        ("optimiser.cosine_epochs=10", "optimiser.*warmup_epochs is to be less"),  # byol.yaml's own is 10
        ("data.crop_seconds=0.02", r"data\.crop_seconds.*0\.1"),
        ("trainer.precision=16-true", r"trainer\.precision"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_a_line(override: str, message: str) -> None:
    from training.config import load_config

    with pytest.raises(UsageError, match=message) as caught:
        load_config([Path(__file__).parents[2] / "training" / "configs" / "byol.yaml"], [override])
    assert "\n" not in str(caught.value)


def test_a_setting_that_is_left_away_is_a_difference(corpus: Path) -> None:
    plain, other = small_config(corpus), small_config(corpus, loss={"gather": False})
    assert plain.differences(other) == ["loss.gather: None here, False there"]
    assert other.differences(plain) == ["loss.gather: False here, None there"]
    assert plain.differences(small_config(corpus, data={"workers": 3}, trainer={"max_epochs": 9})) == []
    renamed = plain.model_copy(update={"name": "another"})  # the name of its folder, which may be moved
    assert plain.differences(renamed) == []


@pytest.mark.parametrize("name", ["byol", "unif-align"])
def test_a_loss_of_unit_vectors_refuses_others(corpus: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"model\.l2_normalise: the loss of .* is one of unit vectors"):
        build_method(small_config(corpus, name, model={"l2_normalise": False}), steps_per_epoch=1)


def test_unknown_methods_and_options_are_refused(corpus: Path) -> None:
    with pytest.raises(UsageError, match=r"simclr.*byol, contrastive"):
        build_method(small_config(corpus, "simclr"), 1)
    with pytest.raises(UsageError, match=r"loss\.temprature"):
        build_method(small_config(corpus, loss={"temprature": 0.1}), 1)


# --- BYOL -----------------------------------------------------------------------------------------------------------


def test_the_predictor_may_learn_faster(corpus: Path) -> None:
    method = build_method(small_config(corpus, "byol", loss={"predictor_rate": 10.0}), steps_per_epoch=1)
    optimiser = cast(dict[str, Any], method.configure_optimizers())["optimizer"]
    initial = {group["name"]: group["initial_lr"] for group in optimiser.param_groups}
    assert initial == {
        "online": pytest.approx(method.config.optimiser.learning_rate),
        "predictor": pytest.approx(10 * method.config.optimiser.learning_rate),
    }
    taken = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    assert len(taken) == len(set(taken))
    assert set(taken) == {parameter for parameter in method.parameters() if parameter.requires_grad}


def test_byol_loss_is_the_symmetric_error_against_the_teacher(corpus: Path, batch: PairBatch) -> None:
    method = build_method(small_config(corpus, "byol"), 1).eval()  # no dropout: both can be computed again
    assert isinstance(method, Byol)
    terms, z1 = method.pair_terms(batch)
    online = [method.projection(method.embed(batch["clips"][:, view])) for view in (0, 1)]
    torch.testing.assert_close(z1, online[0])
    # At the start the teacher is the online network.
    expected = sum(float(losses.invariance(method.predictor(online[i]), online[1 - i])) for i in (0, 1)) / 2
    assert float(terms["byol"]) == pytest.approx(expected, rel=1e-4)


def test_no_gradient_reaches_the_teacher(corpus: Path, batch: PairBatch) -> None:
    method = cast(Byol, build_method(small_config(corpus, "byol"), 1))
    torch.autograd.backward(method.pair_terms(batch)[0]["byol"])
    assert all(each.grad is None for each in method.teacher.parameters())
    assert all(each.grad is not None for each in method.predictor.parameters())


def test_moving_average_is_its_formula(corpus: Path) -> None:
    method = cast(Byol, build_method(small_config(corpus, "byol"), 1))
    key = "encoder.net.2.features.0.0.weight"
    teacher, online = (dict(module.named_parameters())[key] for module in (method.teacher, method))
    before = teacher.clone()
    online.data.add_(1.0)
    update_moving_average(method.teacher, method, 0.9)
    expected = 0.9 * before + 0.1 * online
    torch.testing.assert_close(teacher, nn.Parameter(expected, requires_grad=False))


def test_tau_rises_to_one_on_a_cosine() -> None:
    options = ByolOptions(tau=0.99, tau_epochs=1000)
    values = [moving_average_rate(epoch, options) for epoch in (0, 500, 1000, 2000)]
    assert values == pytest.approx([0.99, 0.995, 1.0, 1.0])


def test_learning_rate_warms_up_and_decays() -> None:
    factors = [learning_rate_factor(epoch, 10, 1000) for epoch in (0, 5, 10, 505, 1000, 1500)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    assert [learning_rate_factor(epoch, 0, 0) for epoch in (0, 3.5, 1e6)] == [1, 1, 1]


# --- collapse -------------------------------------------------------------------------------------------------------


def watch(spreads: list[float]) -> list[str]:
    callback = CollapseWatch(threshold=1e-3, patience_steps=3)
    module = cast(lightning.LightningModule, SimpleNamespace(log=lambda *_: None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for spread in spreads:
            trainer: Any = SimpleNamespace(callback_metrics={"spread": torch.tensor(spread)}, global_step=7)
            callback.on_train_batch_end(trainer, module, None, None, 0)
    return [str(each.message) for each in caught]


def test_a_collapse_is_said_once() -> None:
    messages = watch([0.5, 1e-4, 1e-5, 1e-6, 1e-6, 1e-6])
    assert len(messages) == 1
    assert "collapse" in messages[0]
    assert watch([1e-4, 1e-4, 0.5, 1e-4, 1e-4]) == []


def test_a_collapse_of_the_validations_embeddings_is_said_once() -> None:
    callback = CollapseWatch(threshold=1e-3)
    module = cast(lightning.LightningModule, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for spread in (1e-4, 0.3, 1e-4, 1e-5, 1e-5):
            trainer: Any = SimpleNamespace(callback_metrics={"validation/spread": torch.tensor(spread)}, global_step=7)
            callback.on_validation_end(trainer, module)
    assert ["embeddings of validation crops" in str(each.message) for each in caught] == [True]


def test_a_low_rank_of_the_validations_embeddings_is_said_once() -> None:
    callback = CollapseWatch()
    module = cast(lightning.LightningModule, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rank in (3.0, 20.0, float("nan"), LOW_RANK - 0.1, 3.3, 3.0):
            metrics = {"validation/spread": torch.tensor(0.9), "validation/effective_rank": torch.tensor(rank)}
            trainer: Any = SimpleNamespace(callback_metrics=metrics, global_step=7)
            callback.on_validation_end(trainer, module)
    assert ["use 3.3, fewer than 4" in str(each.message) for each in caught] == [True]


def test_a_resumed_run_goes_on_counting_low_ranks() -> None:
    before, after = CollapseWatch(), CollapseWatch()
    module = cast(lightning.LightningModule, None)
    metrics = {"validation/effective_rank": torch.tensor(3.0)}
    trainer: Any = SimpleNamespace(callback_metrics=metrics, global_step=7)
    before.on_validation_end(trainer, module)
    after.load_state_dict(before.state_dict())
    with pytest.warns(UserWarning, match="use 3.0, fewer than 4"):
        after.on_validation_end(trainer, module)


class _AlignmentOnly(Contrastive):
    """A loss that a constant minimises."""

    def terms(self, z1: Tensor, z2: Tensor, groups: Tensor) -> dict[str, Tensor]:
        return {"alignment": losses.alignment(z1, z2)}


def test_a_loss_without_negatives_collapses_and_its_spread_shows_it(corpus: Path, batch: PairBatch) -> None:
    from training.metrics import spread

    torch.manual_seed(0)
    method = _AlignmentOnly(small_config(corpus), 1)
    optimiser = torch.optim.Adam(method.parameters(), lr=1e-3)
    for _ in range(25):
        terms, z1 = method.pair_terms(batch)
        optimiser.zero_grad()
        torch.autograd.backward(terms["alignment"])
        optimiser.step()
    assert float(spread(z1.detach())) < COLLAPSED_SPREAD
