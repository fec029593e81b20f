"""What is watched and kept while training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from singerembed.errors import SingerEmbedError
from training import files

# An untrained encoder's projections are close together as well (spread 0.01 to 0.15), and dropout keeps those of a
# collapsed one 0.001 to 0.002 apart. A collapse stays, where a slow start does not.
COLLAPSED_SPREAD = 5e-3
COLLAPSE_PATIENCE_STEPS = 200


class WholeCheckpoints(TorchCheckpointIO):
    """Write checkpoints beside their names, then rename.

    Lightning's own writes to the temporary folder and moves: a copy where that is another file system, and half a
    checkpoint where the copy is cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`. Raises OutputError."""
        del storage_options
        files.save(checkpoint, Path(path))


class LastCheckpoint(Callback):
    """Keep `last.ckpt`: every so many steps, and at the end of each epoch, after its validation.

    It holds a whole step, moving average included, and is replaced by rename, so that a kill at any time leaves one.
    None is written between an epoch's last step and its validation: Lightning would go on from it without validating.
    Weights that hold NaN are never written: the run ends instead, with the checkpoint before them.
    """

    def __init__(self, path: Path, every_steps: int) -> None:
        self._path = path
        self._every_steps = every_steps

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write it where this step is one to be kept. Raises SingerEmbedError where the weights hold NaN."""
        del outputs, batch
        is_last = batch_idx + 1 == trainer.num_training_batches
        if is_last or trainer.global_step % self._every_steps == 0:
            self._refuse_nan(trainer, pl_module)
            if not is_last:
                self._save(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write it; validation has been, and `best.ckpt` with it."""
        del pl_module
        self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        trainer.save_checkpoint(self._path, weights_only=False)  # the default, but for a line in the log

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the number of devices: what an epoch is, and with it every schedule, depends on it."""
        del pl_module
        checkpoint["devices"] = trainer.world_size

    def _refuse_nan(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        weights = pl_module.named_parameters()  # alike on all devices, so that all of them end
        broken = [name for name, value in weights if not torch.isfinite(value).all()]
        if broken:
            raise SingerEmbedError(
                f"the training has diverged: at step {trainer.global_step}, {len(broken)} of the network's tensors hold"
                f" NaN or infinity (first: {broken[0]}). {self._path} is left as it was, if there is one. Go on from it"
                " with --set trainer.precision=32-true, or give another --out and lower optimiser.learning_rate"
            )


class CollapseWatch(Callback):
    """Say so when the projections have become one constant vector: no loss can teach anything from there on.

    And when the validation's embeddings have: batch norm can keep a batch's projections apart that follow from nothing.
    """

    def __init__(self, threshold: float = COLLAPSED_SPREAD, patience_steps: int = COLLAPSE_PATIENCE_STEPS) -> None:
        self._threshold = threshold
        self._patience_steps = patience_steps
        self._collapsed_steps = 0
        self._collapsed_validations = 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count steps of collapse on end, and warn when there were enough."""
        del outputs, batch, batch_idx
        collapsed = float(trainer.callback_metrics["spread"]) < self._threshold
        self._collapsed_steps = self._collapsed_steps + 1 if collapsed else 0
        pl_module.log("collapsed_steps", float(self._collapsed_steps))
        if self._collapsed_steps == self._patience_steps:
            self._say(f"for {self._patience_steps} steps all projections have been", trainer.global_step)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Warn when the embeddings of the validation crops are all the same twice on end: once may be the start."""
        del pl_module
        collapsed = float(trainer.callback_metrics.get("validation/spread", 1.0)) < self._threshold
        self._collapsed_validations = self._collapsed_validations + 1 if collapsed else 0
        if self._collapsed_validations == 2:
            self._say("all embeddings of validation crops are", trainer.global_step)

    def _say(self, finding: str, step: int) -> None:
        rank_zero_warn(
            f"collapse: {finding} the same vector but for {self._threshold:g} of their length squared (step {step}). "
            "Stop this run. Lower the learning rate, raise the weight of variance or uniformity, or check that the "
            "pairs are not all alike"
        )


class Throughput(Callback):
    """Log pairs a second, and the share of the time that the device waits for data: near 0 when reading keeps up."""

    def __init__(self) -> None:
        self._batch_end = self._batch_start = 0.0

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget the time between epochs."""
        del trainer, pl_module
        self._batch_end = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the time at which the batch is there."""
        del trainer, pl_module, batch, batch_idx
        self._batch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the rates of the step that ends, except of an epoch's first."""
        del outputs, batch_idx
        now = time.perf_counter()
        if self._batch_end:
            step, wait = now - self._batch_end, self._batch_start - self._batch_end
            rates = {"pairs_per_second": trainer.world_size * len(batch["groups"]) / step, "data_wait": wait / step}
            pl_module.log_dict(rates)
        self._batch_end = now
