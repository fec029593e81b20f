"""Two processes compute what one would on their batches joined."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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
from training.metrics import METRICS

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs"
BATCH, SAMPLES = 3, 8_192
# The projection's layer, and one in the middle of the encoder.
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


# --- whole runs -----------------------------------------------------------------------------------------------------

# `python -m training.train` whose batch norm always uses its running statistics, for the reason above. It is killed as
# soon as the checkpoint of the step KILL_AT is there.
PROGRAM = """
import os, signal
import torch
from training import train
from training.callbacks import WholeCheckpoints

class DyingCheckpoints(WholeCheckpoints):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path, storage_options)
        if checkpoint["global_step"] == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)

def forward(norm, x):
    return torch.nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

torch.nn.BatchNorm2d.forward = forward
train.WholeCheckpoints = DyingCheckpoints
train.main()
"""


def run(corpus: Path, out: Path, devices: int, kill_at: int = 0) -> dict[str, Any]:
    """Run two epochs of two steps of four pairs, shared by `devices` processes; return last.ckpt."""
    settings = (
        f"model.initialise={ROOT / 'training' / 'recipes' / 'free_voices.pt'}",  # running statistics that fit
        f"data.batch_size={4 // devices}", "data.workers=0", "data.pairs=recording", "data.pairs_per_recording=1",
        "data.validation_fraction=0.3", "data.crop_seconds=0.5", "augment.pitch_probability=0", "trainer.threads=1",
        f"trainer.devices={devices}", "trainer.accelerator=cpu", "trainer.deterministic=true", "trainer.max_epochs=2",
        "trainer.validate_every_epochs=1", "trainer.checkpoint_every_steps=3",
        "optimiser.learning_rate=1e-7",  # Adam's steps have a size whatever the gradient, and would magnify rounding
    )  # fmt: skip
    configs = [CONFIGS / "contrastive.yaml", CONFIGS / "small.yaml"]
    options = [word for path in configs for word in ("--config", str(path))]
    options += [word for setting in settings for word in ("--set", setting)]
    out.parent.mkdir(exist_ok=True)
    (out.parent / "program.py").write_text(PROGRAM)
    finished = subprocess.run(
        # As a module, as `python -m training.train` is: Lightning starts the second process by the first one's command.
        [sys.executable, "-m", "program", "--data", str(corpus), "--out", str(out), *options],
        cwd=out.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "KILL_AT": str(kill_at), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert finished.returncode == (-signal.SIGKILL if kill_at else 0), finished.stderr.decode()
    content: dict[str, Any] = torch.load(out / "last.ckpt", weights_only=True)
    return content


def test_a_run_of_two_processes_that_is_killed_and_goes_on_gives_what_one_gives(corpus: Path, tmp_path: Path) -> None:
    one, out = run(corpus, tmp_path / "1" / "run", devices=1), tmp_path / "2" / "run"
    assert run(corpus, out, devices=2, kill_at=3)["global_step"] == 3
    two = run(corpus, out, devices=2)
    assert (two["devices"], two["global_step"]) == (2, 4)
    for name in ("loss", *(f"validation/{each}" for each in METRICS)):
        expected = pytest.approx(one["training"]["metrics"][name], rel=tolerances.DISTRIBUTED_RELATIVE)
        assert two["training"]["metrics"][name] == expected, name
    # Adam's mean gradients; the weights it makes of those near 0 may go either way.
    means, expected_means = (
        [state["exp_avg"] for state in content["optimizer_states"][0]["state"].values()] for content in (two, one)
    )
    for mean, expected_mean in zip(means, expected_means, strict=True):
        difference = float((mean - expected_mean).abs().max())
        assert difference <= tolerances.DISTRIBUTED_RELATIVE * float(expected_mean.abs().max())
    steps = [torch.load(out.parents[1] / each / "run" / "best.ckpt", weights_only=True)["global_step"] for each in "12"]
    assert steps[0] == steps[1]
