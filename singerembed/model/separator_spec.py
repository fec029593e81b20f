"""The spec of a separator: how a mixture is cut, transformed and shown to the network. Stored in its engine file."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SeparatorSpec:
    """Parameters of a separator of vocals that masks a spectrogram. The defaults are Spleeter's."""

    name: str  # display name of the weights' source
    weights_sha256: str
    sample_rate: int = 44_100  # Hz
    channels: int = 2
    n_fft: int = 4096  # samples; periodic Hann window
    hop_samples: int = 1024
    n_bins: int = 1024  # the lowest ones, which the network sees; in the others there is no voice
    frame_multiple: int = 64  # the network halves the number of frames six times
    context_frames: int = 32  # at least, before and after what is wanted

    def segment_samples(self, wanted_samples: int) -> int:
        """Samples to separate where the middle `wanted_samples` of them are wanted."""
        # The first and the last n_fft - hop samples lie in fewer frames than the others.
        needed = wanted_samples + self.n_fft - self.hop_samples
        frames = math.ceil(needed / self.hop_samples) + 2 * self.context_frames
        frames = math.ceil(frames / self.frame_multiple) * self.frame_multiple
        return (frames - 1) * self.hop_samples + self.n_fft

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SeparatorSpec:
        """Make a spec from the result of `to_dict`. Raises ValueError for missing or unknown fields, or a bad size."""
        known = {field.name for field in dataclasses.fields(cls)}
        if fields.keys() != known:
            raise ValueError(
                f"separator spec: missing {sorted(known - fields.keys())}, unknown {sorted(fields.keys() - known)}"
            )
        sizes = [value for name, value in fields.items() if name not in {"name", "weights_sha256"}]
        if any(not isinstance(size, int) or size < 1 for size in sizes) or fields["n_bins"] > fields["n_fft"] // 2 + 1:
            raise ValueError(f"separator spec: sizes that cannot be: {fields}")
        return cls(**fields)
