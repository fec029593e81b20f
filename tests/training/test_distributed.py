"""Two processes compute what one would on their batches joined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel
from training_config import small_config

from training.config import TrainConfig
from training.data import PairBatch
from training.methods import METHODS, build_method

BATCH, SAMPLES = 3, 8_192
# The last layer of the encoder and one in its middle.
WATCHED = ("projection.net.1.weight", "encoder.net.2.features.4.0.block.0.0.weight")


class _Loss(nn.Module):
    """The loss of a method as DDP wants it: a forward pass.

    Batch norm uses its running statistics, as each process would have statistics of its own: synchronising them is
    torch's affair (trainer.sync_batchnorm), and it does so on GPUs only.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.method = build_method(config, steps_per_epoch=1).eval()

    def forward(self, batch: PairBatch) -> Tensor:
        return torch.stack(list(self.method.pair_terms(batch)[0].values())).sum()


def joined_batch() -> PairBatch:
    clips = torch.randn(2 * BATCH, 2, SAMPLES, generator=torch.Generator().manual_seed(1))
    return {"clips": clips, "groups": torch.tensor([0, 1, 2, 0, 3, 4])}


def loss_and_gradients(module: nn.Module, method: nn.Module, batch: PairBatch) -> dict[str, Tensor]:
    loss = module(batch)
    torch.autograd.backward(loss)
    parameters = dict(method.named_parameters())
    gradients = {name: parameters[name].grad for name in WATCHED}
    return {"loss": loss.detach(), **{name: each.clone() for name, each in gradients.items() if each is not None}}


def one_of_two(rank: int, config: TrainConfig, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    whole = joined_batch()
    mine = slice(rank * BATCH, (rank + 1) * BATCH)
    module = _Loss(config)
    parallel = DistributedDataParallel(module)
    result = loss_and_gradients(
        parallel, module.method, {"clips": whole["clips"][mine], "groups": whole["groups"][mine]}
    )
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_two_processes_give_the_loss_and_gradients_of_one(name: str, tmp_path: Path) -> None:
    config = small_config(tmp_path, name)
    single = _Loss(config)
    expected = loss_and_gradients(single, single.method, joined_batch())
    start_processes(one_of_two, (config, str(tmp_path)), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    results: list[dict[str, Any]] = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    # BYOL's is a mean over pairs, each process has its own half; the others' is over all pairs in both processes.
    losses = [float(result["loss"]) for result in results]
    assert sum(losses) / 2 == pytest.approx(float(expected["loss"]), rel=tolerances.DISTRIBUTED_RELATIVE)
    if name != "byol":
        assert losses[0] == losses[1]
    for result in results:
        for gradient in WATCHED:
            scale = float(expected[gradient].abs().max())
            difference = (result[gradient] - expected[gradient]).abs().max()
            assert float(difference) <= tolerances.DISTRIBUTED_RELATIVE * scale
