"""The spec of a separator: how a mixture is cut and shown to the network. Stored in its engine file."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

_WORDS = {"name", "weights_sha256", "input_name", "output_name"}
_MAY_BE_ZERO = {"stem", "context", "batch_axis"}
_STEM_SECONDS = 10.0  # wanted of a segment when a whole recording is separated; 512 frames of Spleeter's


@dataclass(frozen=True, kw_only=True)
class SeparatorSpec(ABC):
    """What every separator of vocals has. See `SpectrogramSpec` and `WaveformSpec`."""

    name: str  # display name of the weights' source
    weights_sha256: str
    sample_rate: int = 44_100  # Hz
    channels: int = 2

    @abstractmethod
    def segment_samples(self, wanted_samples: int) -> int:
        """Samples to separate where the middle `wanted_samples` of them are wanted. Raises ValueError if too many."""

    @property
    @abstractmethod
    def stem_segment_samples(self) -> int:
        """Samples to separate at a time where a whole recording is."""

    @property
    @abstractmethod
    def context_samples(self) -> int:
        """Samples at either end of a segment, at least, whose voice is not used."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> SeparatorSpec:
        """Make a spec from the result of `to_dict`. Raises ValueError for missing or unknown fields, or a bad size."""
        kind = WaveformSpec if "segment" in fields else SpectrogramSpec
        known = {field.name for field in dataclasses.fields(kind)}
        if fields.keys() != known:
            raise ValueError(
                f"separator spec: missing {sorted(known - fields.keys())}, unknown {sorted(fields.keys() - known)}"
            )
        sizes = {name: value for name, value in fields.items() if name not in _WORDS and value is not None}
        if any(not isinstance(size, int) or size < (name not in _MAY_BE_ZERO) for name, size in sizes.items()):
            raise ValueError(f"separator spec: sizes that cannot be: {fields}")
        return kind(**fields)


@dataclass(frozen=True, kw_only=True)
class SpectrogramSpec(SeparatorSpec):
    """Parameters of a separator that masks a spectrogram. The defaults are Spleeter's."""

    n_fft: int = 4096  # samples; periodic Hann window
    hop_samples: int = 1024
    n_bins: int = 1024  # the lowest ones, which the network sees; in the others there is no voice
    frame_multiple: int = 64  # the network halves the number of frames six times
    context_frames: int = 32  # at least, before and after what is wanted

    def __post_init__(self) -> None:
        if self.n_bins > self.n_fft // 2 + 1:
            raise ValueError(f"separator spec: sizes that cannot be: {self.to_dict()}")

    def segment_samples(self, wanted_samples: int) -> int:
        """See `SeparatorSpec`."""
        # The first and the last n_fft - hop samples lie in fewer frames than the others.
        needed = wanted_samples + self.n_fft - self.hop_samples
        frames = math.ceil(needed / self.hop_samples) + 2 * self.context_frames
        frames = math.ceil(frames / self.frame_multiple) * self.frame_multiple
        return (frames - 1) * self.hop_samples + self.n_fft

    @property
    def stem_segment_samples(self) -> int:
        """See `SeparatorSpec`."""
        return self.segment_samples(round(_STEM_SECONDS * self.sample_rate))

    @property
    def context_samples(self) -> int:
        """See `SeparatorSpec`."""
        return (self.n_fft - self.hop_samples) // 2 + self.context_frames * self.hop_samples


@dataclass(frozen=True, kw_only=True)
class WaveformSpec(SeparatorSpec):
    """Parameters of a separator whose network takes and gives samples, always as many."""

    segment: int  # samples
    context: int  # samples, at least, before and after what is wanted
    input_name: str
    output_name: str
    batch_axis: bool  # the input is [1, channels, segment], else [channels, segment]
    # Which one is the voice where the output has an axis of stems before that of the channels; None: it has none.
    stem: int | None

    def __post_init__(self) -> None:
        if 2 * self.context >= self.segment:
            raise ValueError(f"separator spec: sizes that cannot be: {self.to_dict()}")

    def segment_samples(self, wanted_samples: int) -> int:
        """See `SeparatorSpec`."""
        if wanted_samples + 2 * self.context > self.segment:
            segment, wanted, context = (n / self.sample_rate for n in (self.segment, wanted_samples, self.context))
            raise ValueError(
                f"the separator {self.name} takes {segment:.4g} s at a time, in which {wanted:.4g} s with "
                f"{context:.4g} s on either side have no room"
            )
        return self.segment

    @property
    def stem_segment_samples(self) -> int:
        """See `SeparatorSpec`."""
        return self.segment

    @property
    def context_samples(self) -> int:
        """See `SeparatorSpec`."""
        return self.context
