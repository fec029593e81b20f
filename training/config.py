"""The configuration of a training run: read from YAML files, validated, and stored in every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from singerembed.errors import UsageError
from singerembed.model.spec import ModelSpec

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]

# Twice the frame of the activity measure (data.ACTIVE_FRAME_SECONDS); the mel front end needs 0.023 s for reflection.
SHORTEST_CROP_SECONDS = 0.1


def _ascending(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("the first is to be the smaller")
    return ends


class Section(BaseModel):
    """A section of a configuration: immutable, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """Initial weights of the encoder, and its front end."""

    initialise: str = "imagenet"  # "imagenet", "random", or the path of a checkpoint
    # Divide the log-mel spectrogram by the maximum of the "crop", by a constant, or as the official code by the maximum
    # of the "batch".
    normalise: Literal["crop", "batch"] | Positive = "crop"
    l2_normalise: bool = True  # the projections
    # torchvision's defaults, as in the paper. Short runs from scratch learn twice as fast without.
    stochastic_depth: Probability = 0.2
    dropout: Probability = 0.2


class DataConfig(Section):
    """The recordings, and how pairs are drawn from them."""

    source: str = ""  # a folder, a catalogue, or the output of `singerembed run`; --data
    audio_root: str = ""  # what relative paths in an output count from; empty: its folder
    validation: str = ""  # another folder or catalogue to validate on; empty: a share of the singers of `source`
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    validation_crops: Annotated[int, Field(ge=2)] = 4  # of each validation recording
    path_column: str = "path"  # of a catalogue
    singer_column: str = "singer"
    # A pair is two crops of one recording, or of one singer (arXiv 2407.08647), whose crops are then never negatives in
    # the contrastive losses.
    pairs: Literal["recording", "singer"] = "recording"
    pairs_per_recording: Count = 1  # per epoch
    crop_seconds: Annotated[float, Field(ge=SHORTEST_CROP_SECONDS)] = 4.0
    batch_size: Annotated[int, Field(ge=2)] = 140  # pairs, on each device
    workers: Annotated[int, Field(ge=0)] = 4  # worker processes that read and augment, per device
    silence_dbfs: float = -60.0  # a crop whose peak is not above it is silent
    min_active: Probability = 0.3  # minimum share of a crop that is louder than 40 dB below its peak
    pitch_variants: str = ""  # a folder written by training.pitch_variants; empty: shift pitch during training


class AugmentConfig(Section):
    """The paper's augmentations, drawn independently for each crop."""

    pitch_probability: Probability = 0.5
    pitch_ratio: Annotated[float, Field(ge=1)] = 1.3  # 1 to this, or its reciprocal
    pitch_range_ratio: Annotated[float, Field(ge=1)] = 1.5
    noise_probability: Probability = 0.5
    noise_amplitude: Annotated[tuple[Positive, Positive], AfterValidator(_ascending)] = (0.001, 0.05)  # full scale is 1
    gain_probability: Probability = 0.5
    gain_db: Annotated[tuple[float, float], AfterValidator(_ascending)] = (-6.0, 0.0)
    mask_probability: Probability = 0.5
    mask_fraction: Annotated[float, Field(ge=0, lt=1)] = 1 / 8  # of the crop, at most
    # Change the speed of both crops of a pair by one factor, up to this or its reciprocal. It changes the apparent
    # vocal tract, so that few training singers become many. Not in the paper.
    pair_speed: Annotated[float, Field(ge=1)] = 1.0
    # A folder of recordings without voices, of which a random stretch is mixed under crops, so that a pair may be a
    # voice and other seconds of it over a band (arXiv 2510.03025). Empty: none.
    backing: str = ""
    backing_probability: Probability = 0.4
    # Which crops of a pair: each by its own draw, or only the second, so that each pair drawn for it is a voice alone
    # and a mixture.
    backing_crops: Literal["each", "second"] = "each"
    backing_db: Annotated[tuple[float, float], AfterValidator(_ascending)] = (0.0, 20.0)  # voice over band
    # Transforms of audiomentations, applied between pitch and noise: {transform: NAME, arguments}.
    channel: tuple[dict[str, Any], ...] = ()


class TeacherConfig(Section):
    """Learning from another encoder's embeddings of the same recordings. Not in the paper.

    The target of a crop is the teacher's centred embedding of it, mapped into the encoder's space by a fixed random
    matrix that keeps all cosines.
    """

    targets: str = ""  # a table written by training.teacher; empty: no teacher
    cosine: Annotated[float, Field(ge=0)] = 1.0  # weight of 1 minus the cosine to the target
    relations: Annotated[float, Field(ge=0)] = 5.0  # weight of the squared differences of similarities within a batch
    method: Annotated[float, Field(ge=0)] = 0.1  # weight of the method's own loss beside it; 0: the teacher alone


class OptimiserConfig(Section):
    """Adam, with L2 weight decay as in the official code, and its learning rate schedule."""

    learning_rate: Positive = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    cosine_epochs: Annotated[float, Field(ge=0)] = 0.0  # the rate reaches 0 at this epoch; 0: constant rate

    @model_validator(mode="after")
    def _check_schedule(self) -> OptimiserConfig:
        if 0 < self.cosine_epochs <= self.warmup_epochs:
            raise ValueError("warmup_epochs is to be less than cosine_epochs, which counts from the start")
        return self


class TrainerConfig(Section):
    """Length of the run, hardware and output. May change when a run is resumed."""

    max_epochs: Count = 1000
    accelerator: str = "auto"
    devices: str | int = "auto"
    nodes: Count = 1
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"  # bf16-mixed on CUDA, 32-true elsewhere
    sync_batchnorm: bool = False  # on many GPUs; the official code does not
    deterministic: bool = False
    threads: Annotated[int, Field(ge=0)] = 0  # CPU threads of torch; 0: torch's default
    checkpoint_every_steps: Count = 500
    validate_every_epochs: Count = 5
    log_every_steps: Count = 10


class TrainConfig(Section):
    """The configuration of a training run."""

    method: str  # one of training.methods.METHODS
    loss: dict[str, Any] = {}  # options of the method
    name: str = ""  # display name of the weights; empty: the output folder's name
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 123
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    teacher: TeacherConfig = TeacherConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    trainer: TrainerConfig = TrainerConfig()

    def front_end(self) -> ModelSpec:
        """Return the spec of the encoder, as far as it is known before training."""
        normalise = "crop" if self.model.normalise == "batch" else self.model.normalise
        return ModelSpec(name=self.name, method=self.method, normalise=normalise)

    @model_validator(mode="after")
    def _check_teacher(self) -> TrainConfig:
        if self.teacher.targets and self.augment.pair_speed > 1:
            raise ValueError(
                "teacher.targets: the targets are of voices at their own speed, so augment.pair_speed is to be 1"
            )
        return self

    @property
    def crop_samples(self) -> int:
        """Samples of a training crop. Validation uses the length in the spec."""
        return round(self.data.crop_seconds * self.front_end().sample_rate)

    def differences(self, other: TrainConfig) -> list[str]:
        """Return the keys whose values differ in `other`, except those that may change when a run is resumed."""
        mine, theirs = _flat(self), _flat(other)
        keys = [key for key in {**mine, **theirs} if key != "name" and mine.get(key) != theirs.get(key)]
        return [f"{key}: {mine.get(key)} here, {theirs.get(key)} there" for key in keys]


def load_config(paths: Sequence[Path], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read YAML files, later ones overriding earlier ones, and apply `section.key=value` overrides with YAML values.

    Raises UsageError.
    """
    content: dict[str, Any] = {}
    for path in paths:
        for key, value in _read_yaml(path).items():
            is_section = isinstance(value, dict) and isinstance(content.get(key), dict)
            content[key] = {**content[key], **value} if is_section else value
    for override in overrides:
        _apply(content, override)
    return parse_config(content, ", ".join(map(str, paths)))


def parse_config(content: dict[str, Any], where: str) -> TrainConfig:
    """Validate `content`. Raises UsageError naming each key that is unknown or out of range."""
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as exc:
        problems = [f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors()]
        raise UsageError(f"{where}: {'; '.join(problems)}") from exc


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise UsageError(f"{path} cannot be read as a configuration: {exc}") from exc
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a configuration: it holds no keys")
    return content


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    *sections, last = key.split(".")
    if not equals or not last:
        raise UsageError(f"--set {override}: write section.key=value, for example --set data.batch_size=32")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise UsageError(f"--set {override}: {section} is a value, not a section")
    try:
        content[last] = yaml.safe_load(value)
    except yaml.YAMLError as exc:
        raise UsageError(f"--set {override}: the value is not YAML: {' '.join(str(exc).split())}") from exc


def _flat(config: TrainConfig) -> dict[str, Any]:
    dumped = config.model_dump(mode="json", exclude={"trainer": True, "data": {"workers"}})
    nested = {key: value for key, value in dumped.items() if isinstance(value, dict)}
    flat = {f"{section}.{key}": value for section, fields in nested.items() for key, value in fields.items()}
    return {**{key: value for key, value in dumped.items() if key not in nested}, **flat}
