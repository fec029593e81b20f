"""Base class of the five methods: networks, training and validation steps, optimiser and schedule."""

from __future__ import annotations

import importlib.metadata
import math
from typing import Any, ClassVar, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from singerembed.errors import UsageError
from singerembed.model.checkpoint import load_checkpoint
from singerembed.model.spec import ModelSpec
from training import losses
from training.config import Section, TrainConfig
from training.data import CropBatch, PairBatch, PairData
from training.metrics import spread
from training.model import Encoder, MelSpectrogram, Projection


class Options(Section):
    """Options of a method: the `loss:` section of the configuration."""

    # Compute the loss over the batches of all devices, equal to one device with the concatenated batch. The official
    # code computes it on each device separately.
    gather: bool = True


class Method(lightning.LightningModule):
    """An encoder in training. Subclasses implement `terms`.

    The saved hyper-parameters are JSON types: `config`, the run's configuration, and `spec`, the encoder's ModelSpec.
    """

    options_type: ClassVar[type[Options]] = Options
    on_sphere: ClassVar[bool] = False  # its loss is one of unit vectors

    def __init__(self, config: TrainConfig, steps_per_epoch: int) -> None:
        super().__init__()
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.options = self._parse_options(config.loss)
        if self.on_sphere and not config.model.l2_normalise:
            raise UsageError(f"model.l2_normalise: the loss of {config.method} is one of unit vectors; leave it true")
        spec = config.front_end()
        self.save_hyperparameters({"config": config.model_dump(mode="json"), "spec": spec.to_dict()}, logger=False)
        self.feature_extractor = MelSpectrogram(spec)
        self.encoder = Encoder(
            spec,
            normalise=config.model.normalise,
            pretrained=config.model.initialise == "imagenet",
            dropout=config.model.dropout,
            stochastic_depth_prob=config.model.stochastic_depth,
        )
        self.projection = Projection(spec.embedding_dim, l2_normalise=config.model.l2_normalise)
        if config.model.initialise not in {"imagenet", "random"}:
            self.encoder.backbone.load_state_dict(load_checkpoint(config.model.initialise).state_dict)

    def _parse_options(self, fields: dict[str, Any]) -> Any:  # an instance of options_type
        try:
            return self.options_type.model_validate(fields)
        except ValidationError as exc:
            problems = [f"loss.{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors()]
            raise UsageError("; ".join(problems)) from exc

    @property
    def spec(self) -> ModelSpec:
        """The current spec of the encoder. With `normalise: batch` it holds the current running maximum."""
        spec = ModelSpec.from_dict(self.hparams["spec"])
        if self.config.model.normalise != "batch":
            return spec
        maximum = self.encoder.net[1].running_maximum
        return ModelSpec.from_dict({**spec.to_dict(), "normalise": round(float(cast(Tensor, maximum)), 4)})

    def terms(self, z1: Tensor, z2: Tensor, groups: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the loss, by name, from projections [batch, 128].

        `groups`, int [batch]: the recording of each row, or the singer with `pairs: singer`.
        """
        raise NotImplementedError

    def embed(self, pcm: Tensor) -> Tensor:
        """Return embeddings [crops, embedding_dim] of `pcm`, float32 [crops, samples]."""
        return cast(Tensor, self.encoder(self._mel(pcm)))

    def _mel(self, pcm: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(pcm.device.type, enabled=False):
            return cast(Tensor, self.feature_extractor(pcm))

    def pair_terms(self, batch: PairBatch) -> tuple[dict[str, Tensor], Tensor]:
        """Return the terms of the loss and the projections of the first views."""
        embeddings = [self.embed(batch["clips"][:, view]) for view in (0, 1)]
        z1, z2 = map(self.projection, embeddings)
        if "targets" not in batch:
            return self.terms(self.gathered(z1), self.gathered(z2), self.gathered(batch["groups"])), z1
        settings = self.config.teacher
        terms = self._teacher_terms(torch.cat(embeddings), torch.cat(batch["targets"].unbind(1)))
        # Also with a weight of 0, so that the projection takes part, as training on several devices needs.
        own = self.terms(self.gathered(z1), self.gathered(z2), self.gathered(batch["groups"]))
        return terms | {name: settings.method * term for name, term in own.items()}, z1

    def _teacher_terms(self, embeddings: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms that pull `embeddings`, [crops, dim], to `targets`, [crops, dim of the teacher]."""
        settings = self.config.teacher
        embeddings, targets = self.gathered(embeddings.float()), self.gathered(targets)
        mapped = targets @ losses.orthonormal_map(targets.shape[1], embeddings.shape[1]).to(targets)
        return {
            "teacher": settings.cosine * losses.towards(embeddings, mapped),
            "relations": settings.relations * losses.relations(embeddings, targets),
        }

    def gathered(self, rows: Tensor) -> Tensor:
        """Return `rows` of all devices in order of rank, with gradients; without `gather` only those of this device.

        Each device then computes the whole loss. The backward pass sums the equal gradients of all devices, and DDP
        divides by their number.
        """
        if not self.options.gather or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return rows
        return torch.cat(all_gather(rows.contiguous()))  # type: ignore[no-untyped-call]

    # --- Lightning's hooks ------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """Seed dropout and stochastic depth by seed, step and rank, so that no generator state need be saved."""
        del batch, batch_idx
        entropy = np.random.SeedSequence((self.config.seed, self.global_step, self.global_rank))
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the loss of one batch of pairs."""
        del batch_idx
        terms, z1 = self.pair_terms(batch)
        loss = torch.stack(list(terms.values())).sum()
        self.log("loss", loss, prog_bar=True)
        self.log("spread", spread(z1.detach()), prog_bar=True)
        if len(terms) > 1:
            self.log_dict({f"loss/{name}": term for name, term in terms.items()})
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Adam, with linear warm-up and cosine decay per step."""
        settings = self.config.optimiser
        optimiser = torch.optim.Adam(
            self.parameter_groups(settings.learning_rate), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

        def factor(step: int) -> float:
            return learning_rate_factor(step / self.steps_per_epoch, settings.warmup_epochs, settings.cosine_epochs)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimiser. Overridden by BYOL."""
        del learning_rate
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def on_validation_epoch_start(self) -> None:
        """Clear the embeddings of the last validation."""
        self._validated: list[tuple[Tensor, Tensor]] = []

    def validation_step(self, batch: CropBatch, batch_idx: int) -> None:
        """Embed a batch of validation crops."""
        del batch_idx
        self._validated.append((self.embed(batch["clips"]).float(), batch["indices"]))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over the validation crops of all devices."""
        gathered = self.all_gather(tuple(map(torch.cat, zip(*self._validated, strict=True))))
        embeddings, indices = cast(tuple[Tensor, Tensor], gathered)
        data: PairData = self.trainer.datamodule  # type: ignore[attr-defined]
        metrics = data.validation_metrics(embeddings.flatten(0, -2).cpu().numpy(), indices.flatten().cpu().numpy())
        self.log_dict({f"validation/{name}": value for name, value in metrics.items()}, sync_dist=True)
        self._validated.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the current spec, the metrics and the package versions."""
        checkpoint["hyper_parameters"]["spec"] = self.spec.to_dict()
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        checkpoint["training"] = {"metrics": metrics, "versions": _versions()}


def _versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "lightning", "audiomentations", "praat-parselmouth")
    return {package: importlib.metadata.version(package) for package in packages}


def learning_rate_factor(epoch: float, warmup_epochs: float, cosine_epochs: float) -> float:
    """Return the learning rate factor at a fractional `epoch`: linear from 0 in the warm-up, then cosine to 0."""
    if epoch < warmup_epochs:
        return epoch / warmup_epochs
    if not cosine_epochs:
        return 1.0
    progress = (epoch - warmup_epochs) / max(cosine_epochs - warmup_epochs, 1e-9)
    return (1 + math.cos(math.pi * min(progress, 1.0))) / 2
