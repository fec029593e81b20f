"""Trains an encoder: `python -m training.train --config training/configs/byol.yaml --data DIR --out runs/byol`."""

from __future__ import annotations

import ctypes
import sys
import warnings
from pathlib import Path

import click
import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from singerembed.errors import CheckpointError, OutputError, UsageError
from singerembed.storage import absolute
from training.callbacks import CollapseWatch, LastCheckpoint, Throughput, WholeCheckpoints
from training.command import command
from training.config import TrainConfig, load_config, parse_config
from training.data import PairData
from training.methods import build_method
from training.recordings import Recording, build_index, is_index_of, read_index, write_index

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
LAST, BEST, INDEX = "last.ckpt", "best.ckpt", "recordings.parquet"


@command
@click.option(
    "--config",
    "config_paths",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="One of training/configs/. A second one goes over it.",
)
@click.option(
    "--data",
    required=True,
    help="A folder SINGER/**/*.wav (or flac, ...), a catalogue, or an output of singerembed run.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The run's folder: checkpoints and TensorBoard."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override, e.g. --set data.batch_size=32.")
def main(config_paths: tuple[Path, ...], data: str, out: Path, overrides: tuple[str, ...]) -> None:
    """Train a singer encoder with one of five self-supervised methods.

    Writes last.ckpt (every few hundred steps and every epoch), best.ckpt (lowest error rate on the validation singers),
    the list of recordings, and TensorBoard events to the run's folder. After a crash or a kill the same command resumes
    from last.ckpt, bit for bit with --set trainer.deterministic=true.

    \b
    python -m training.train --config training/configs/contrastive.yaml --data vocals/ --out runs/contrastive
    python -m training.export runs/contrastive/last.ckpt contrastive.pt
    singerembed build-engine contrastive.pt
    """
    config = load_config(config_paths, overrides)
    source = config.data.model_copy(update={"source": absolute(data)})
    train(config.model_copy(update={"data": source, "name": config.name or out.absolute().name}), out)


def train(config: TrainConfig, out: Path) -> None:
    """Run `config` in the folder `out`, resuming from its `last.ckpt` if there is one.

    Raises UsageError, naming the differences, if `last.ckpt` was made with another configuration or number of devices.
    """
    last = out / LAST
    devices = _refuse_differences(config, last) if last.exists() else None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(f"{out} cannot be made a folder: {exc.strerror}. Give another --out") from exc
    _remove_half_checkpoints(out)
    keep_freed_memory()
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    # torch uses TF32 in convolutions by default. In matrix products it would round the mel spectrogram, which must
    # equal the engine's, and the similarities in the losses.
    torch.set_float32_matmul_precision("highest")
    lightning.seed_everything(config.seed, verbose=False)
    recordings = _recordings(config, out / INDEX, going_on=last.exists())
    try:
        trainer = build_trainer(config, out)
    except (MisconfigurationException, ValueError, TypeError) as exc:
        raise UsageError(f"the trainer section does not work on this machine: {exc}") from exc
    if devices not in {None, trainer.world_size}:
        raise UsageError(
            f"{last} was made on {devices} device(s), here are {trainer.world_size}: that changes the steps"
            " of an epoch, learning rate and moving average. Use as many devices, or give another --out"
        )
    data = PairData(recordings, config, trainer.world_size)
    if not data.can_validate:
        trainer.limit_val_batches = 0
    method = build_method(config, data.steps_per_epoch)
    # The sampler resumes at the checkpoint's step, which Lightning does not know; the folder holds the recordings'
    # index.
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")  # Lightning's own
    trainer.fit(method, data, ckpt_path=last if last.exists() else None, weights_only=True)


@rank_zero_only
def _remove_half_checkpoints(out: Path) -> None:
    """Remove temporary files of checkpoints whose writing was interrupted."""
    for leftover in out.glob(".*.ckpt.*.tmp"):
        leftover.unlink()


def keep_freed_memory() -> None:
    """Make glibc keep freed memory. Otherwise a step on a CPU spends half of its time on page faults."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)


def build_trainer(config: TrainConfig, out: Path) -> lightning.Trainer:
    """Return Lightning's Trainer for `config`, which writes to the folder `out`."""
    settings = config.trainer
    on_cuda = torch.cuda.is_available() and settings.accelerator in {"auto", "gpu", "cuda"}
    precision = ("bf16-mixed" if on_cuda else "32-true") if settings.precision == "auto" else settings.precision
    best = ModelCheckpoint(
        dirpath=out,
        filename=Path(BEST).stem,
        monitor="validation/eer",
        mode="min",
        save_on_train_epoch_end=False,  # after validation instead, so that last.ckpt, saved later, has its state
        enable_version_counter=False,
    )
    callbacks: list[Callback] = [
        CollapseWatch(),
        Throughput(),
        LearningRateMonitor("step"),
        LastCheckpoint(out / LAST, settings.checkpoint_every_steps),
        best,
    ]
    return lightning.Trainer(
        max_epochs=settings.max_epochs,
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.nodes,
        precision=precision,
        sync_batchnorm=settings.sync_batchnorm,
        deterministic=settings.deterministic,
        check_val_every_n_epoch=settings.validate_every_epochs,
        log_every_n_steps=settings.log_every_steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # PairSampler distributes the batches
        callbacks=callbacks,
        plugins=[WholeCheckpoints()],
        logger=TensorBoardLogger(out, name="tensorboard", version=""),  # a version would appear in the progress bar
    )


def _recordings(config: TrainConfig, index: Path, *, going_on: bool) -> list[Recording]:
    """Return the recordings of the run: found once and stored in `index`, so that a resumed run has the same.

    An index of an earlier run without a checkpoint is reused only if it is of the same data.
    """
    if not (index.exists() if going_on else is_index_of(index, config)):
        write_index(index, build_index(config), config)
    return read_index(index)


def _refuse_differences(config: TrainConfig, last: Path) -> int | None:
    """Raise UsageError if `last` was made with another configuration. Return the number of devices it was made on."""
    try:
        content = torch.load(last, map_location="cpu", weights_only=True)
        earlier = parse_config(content["hyper_parameters"]["config"], str(last))
    except Exception as exc:  # a damaged file may raise anything
        raise CheckpointError(f"cannot resume from {last}: {exc}. Give another --out, or remove it") from exc
    differences = config.differences(earlier)
    if differences:
        raise UsageError(f"{last} was made with another configuration ({'; '.join(differences)}). Give another --out")
    return content.get("devices")  # type: ignore[no-any-return]  # missing in older checkpoints


if __name__ == "__main__":
    main()
