"""What a decoder offers: PCM, read from front to back, with seeking."""

from __future__ import annotations

from typing import Protocol

from singerembed.model.mel import Pcm


class PcmReader(Protocol):
    """A recording that is read from front to back, with seeking."""

    sample_rate: int  # Hz

    @property
    def notes(self) -> list[str]:
        """What a person should know of the file, although it was decoded."""
        ...

    def read(self, n: int) -> Pcm:
        """Return the next `n` samples, [n], or [n, 2] if opened as stereo; fewer only at the end. Raises TrackError."""
        ...

    def seek(self, sample: int) -> None:
        """Go to `sample`, counted from the beginning of the recording; past the end, nothing is left to read."""
        ...

    def length(self) -> int:
        """Number of samples from the beginning to the end, whatever the header says; may read the whole file."""
        ...

    def check_complete(self) -> None:
        """After everything was read: raise TrackError if the file broke off, or promised more than there was."""
        ...

    def close(self) -> None: ...
