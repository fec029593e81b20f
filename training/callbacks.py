"""Lightning callbacks: checkpoints, detection of collapse and divergence, throughput."""

from __future__ import annotations

import math
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

# The spread of an untrained encoder's projections is small as well (0.01 to 0.15); with dropout that of a collapsed one
# is 0.001 to 0.002. Unlike a slow start, a collapse persists.
COLLAPSED_SPREAD = 5e-3
COLLAPSE_PATIENCE_STEPS = 200
# Three sets of real and made singing: a collapsed encoder had 3.3 to 3.5, untrained ones 4 to 11, the one that took its
# place 11 to 22, GE2E 33 to 66 (docs/model-card.md).
LOW_RANK = 4.0


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically: a temporary file in the same folder, then rename.

    Lightning writes to the system's temporary folder and moves, which is a copy between file systems: if interrupted,
    it leaves half a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`. Raises OutputError."""
        del storage_options
        files.save(checkpoint, Path(path))


class LastCheckpoint(Callback):
    """Writes `last.ckpt` every `every_steps` steps, and at the end of each epoch after its validation.

    It is written after complete steps, moving average included, and replaced by rename, so that a kill at any time
    leaves a valid one. None is written between an epoch's last step and its validation, because Lightning would resume
    from it without validating. Weights with NaN are never written: the run ends instead, and the previous checkpoint
    stays.
    """

    def __init__(self, path: Path, every_steps: int) -> None:
        self._path = path
        self._every_steps = every_steps

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the checkpoint if this step is due. Raises SingerEmbedError if the weights hold NaN or infinity."""
        del outputs, batch
        is_last = batch_idx + 1 == trainer.num_training_batches
        if is_last or trainer.global_step % self._every_steps == 0:
            self._refuse_nan(trainer, pl_module)
            if not is_last:
                self._save(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the checkpoint, after validation and `best.ckpt`."""
        del pl_module
        self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        trainer.save_checkpoint(self._path, weights_only=False)  # the default, which otherwise logs a warning

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the number of devices, because the length of an epoch, and so every schedule, depends on it."""
        del pl_module
        checkpoint["devices"] = trainer.world_size

    def _refuse_nan(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # Running statistics too: with precision 16 a step that overflowed leaves weights alone, and not them.
        tensors = ((name, value) for name, value in pl_module.state_dict().items() if value.is_floating_point())
        broken = [name for name, value in tensors if not torch.isfinite(value).all()]
        # Running statistics differ between devices, and all of them have to stop.
        if trainer.strategy.reduce_boolean_decision(bool(broken), all=False):
            broken = broken or ["one on another device"]
            raise SingerEmbedError(
                f"the training has diverged: at step {trainer.global_step}, {len(broken)} of the network's tensors hold"
                f" NaN or infinity (first: {broken[0]}). {self._path} is left as it was, if there is one. Go on from it"
                " with --set trainer.precision=32-true, or give another --out and lower optimiser.learning_rate"
            )


class CollapseWatch(Callback):
    """Warns if all projections have collapsed to one vector, from which no loss recovers, or embeddings to few axes.

    It also watches the validation embeddings, because batch norm can keep the projections of a batch apart although
    they carry no information, and because a low effective rank hides behind a fair error rate.
    """

    def __init__(self, threshold: float = COLLAPSED_SPREAD, patience_steps: int = COLLAPSE_PATIENCE_STEPS) -> None:
        self._threshold = threshold
        self._patience_steps = patience_steps
        self._collapsed_steps = 0
        self._collapsed_validations = 0
        self._low_ranks = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, which a resumed run goes on with."""
        names = ("_collapsed_steps", "_collapsed_validations", "_low_ranks")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counters of the run that is resumed."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count consecutive collapsed steps, and warn when `patience_steps` is reached."""
        del outputs, batch, batch_idx
        collapsed = float(trainer.callback_metrics["spread"]) < self._threshold
        self._collapsed_steps = self._collapsed_steps + 1 if collapsed else 0
        pl_module.log("collapsed_steps", float(self._collapsed_steps))
        if self._collapsed_steps == self._patience_steps:
            self._say(f"for {self._patience_steps} steps all projections have been", trainer.global_step)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Warn after two consecutive validations with collapsed embeddings: the first may be the start of training.

        Likewise for an effective rank below LOW_RANK.
        """
        del pl_module
        collapsed = float(trainer.callback_metrics.get("validation/spread", 1.0)) < self._threshold
        self._collapsed_validations = self._collapsed_validations + 1 if collapsed else 0
        if self._collapsed_validations == 2:
            self._say("all embeddings of validation crops are", trainer.global_step)
        rank = float(trainer.callback_metrics.get("validation/effective_rank", math.inf))
        self._low_ranks = self._low_ranks + 1 if rank < LOW_RANK else 0
        if self._low_ranks == 2:
            rank_zero_warn(
                f"few directions: the embeddings of the validation crops use {rank:.1f}, fewer than {LOW_RANK:g} (step "
                f"{trainer.global_step}). Such an encoder tells groups apart, as men and women, not people. More "
                "singers, a teacher (teacher.targets) or a covariance term (contrastive-vc, vicreg) may help"
            )

    def _say(self, finding: str, step: int) -> None:
        rank_zero_warn(
            f"collapse: {finding} the same vector but for {self._threshold:g} of their length squared (step {step}). "
            "Stop this run. Lower the learning rate, raise the weight of variance or uniformity, or check that the "
            "pairs are not all alike"
        )


class Throughput(Callback):
    """Logs pairs per second, and the share of time that the device waits for data, near 0 if loading keeps up."""

    def __init__(self) -> None:
        self._batch_end = self._batch_start = 0.0

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Exclude the time between epochs."""
        del trainer, pl_module
        self._batch_end = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Store the time at which the batch arrived."""
        del trainer, pl_module, batch, batch_idx
        self._batch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the rates of the step, except for the first of an epoch."""
        del outputs, batch_idx
        now = time.perf_counter()
        if self._batch_end:
            step, wait = now - self._batch_end, self._batch_start - self._batch_end
            rates = {"pairs_per_second": trainer.world_size * len(batch["groups"]) / step, "data_wait": wait / step}
            pl_module.log_dict(rates)
        self._batch_end = now
