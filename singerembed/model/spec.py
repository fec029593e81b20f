"""The model spec, stored in checkpoints, engine files and Parquet metadata.

The constants of the official pipeline (github SonyCSLParis/ssl-singer-identity) are defined only here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

UNKNOWN_SHA256 = ""
# The checkpoint of the engine that ships with the package: trained on voices under free licences (docs/model-card.md).
BUNDLED_NAME = "free-voices"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Parameters of an encoder and its front end. The defaults are the official pipeline's."""

    name: str  # display name of the weights' source
    method: str  # byol, contrastive, contrastive-vc, unif-align, vicreg, ..., or "untrained"
    weights_sha256: str = UNKNOWN_SHA256  # over the encoder's tensors, see checkpoint.weights_sha256
    precision: str = "fp32"  # arithmetic of the encoder: "fp32", "fp16", or "int8" in its 1 x 1 convolutions
    sample_rate: int = 44_100  # Hz, of the audio
    crop_samples: int = 176_400  # 4 s
    n_fft: int = 2048  # samples; periodic Hann window, centred frames, reflected at both ends
    hop_samples: int = 512
    n_mels: int = 128  # Slaney scale and area norm
    # Hz; the rate the mel basis is computed for. The audio is at 44 100 Hz, but the official weights were trained with
    # nnAudio's default of 22 050 Hz, so this must stay as it is.
    mel_sample_rate: int = 22_050
    mel_fmin: float = 0.0  # Hz at mel_sample_rate, as mel_fmax
    mel_fmax: float = 11_025.0
    log_offset: float = 1e-8  # added to the mel power before the logarithm
    # "crop": the log-mel spectrogram is divided by its own maximum; a number: by that constant.
    normalise: str | float = "crop"
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of the three (equal) channels of the encoder
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    backbone: str = "efficientnet_b0"
    embedding_dim: int = 1000
    # The crops whose mean embedding was subtracted in the bias of the last layer, in words; empty: none was. Specs from
    # before there was this field lack it, and those of encoders that are not centred still do.
    centred_on: str = ""

    def __post_init__(self) -> None:
        if self.normalise != "crop" and not (isinstance(self.normalise, int | float) and self.normalise > 0):
            raise ValueError(f"normalise must be 'crop' or a positive number, got {self.normalise!r}")
        if self.precision not in {"fp32", "fp16", "int8"}:
            raise ValueError(f"precision must be 'fp32', 'fp16' or 'int8', got {self.precision!r}")

    @property
    def n_frames(self) -> int:
        """Number of frames of a crop's mel spectrogram."""
        return 1 + self.crop_samples // self.hop_samples

    @property
    def crop_seconds(self) -> float:
        """Length of a crop in seconds."""
        return self.crop_samples / self.sample_rate

    @property
    def log_divisor(self) -> float:
        """`normalise` for the mel kernels: 0 for the crop's own maximum, else the constant."""
        return 0.0 if self.normalise == "crop" else float(self.normalise)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, without an empty `centred_on`."""
        fields = dataclasses.asdict(self)
        if not self.centred_on:
            del fields["centred_on"]  # or the identities of engines built before would change
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelSpec:
        """Make a spec from the result of `to_dict`. Raises ValueError naming missing, unknown or invalid fields."""
        known = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = known - fields.keys() - {"centred_on"}, fields.keys() - known
        if missing or unknown:
            raise ValueError(f"model spec: missing {sorted(missing)}, unknown {sorted(unknown)}")
        tuples = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        return cls(**{**fields, **tuples})
