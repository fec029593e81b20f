"""The options of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from singerembed.audio.limits import DEFAULT_TRACK_TIMEOUT_SECONDS
from singerembed.catalog.read import DEFAULT_UNIT_MINUTES, Columns
from singerembed.model.mel import DEFAULT_SILENCE_DBFS

# Of crops of made mixtures: docs/mixes.md.
DEFAULT_MIN_VOCALS_DB = -15.0

# The last two decide, but only together: `run` adds them to the run's identity where there is a separator.
_INDECISIVE = {
    "track_timeout_seconds",
    "retries",
    "max_errors",
    "deadline",
    "workers",
    "devices",
    "ray",
    "partitioned",
    "restart",
    "retry_errors",
    "update",
    "keep_missing",
    "allow_gone",
    "separate",
    "min_vocals_db",
}


@dataclass(frozen=True)
class RunOptions:
    """Options of a run. Those outside `_INDECISIVE` decide the rows, and must stay the same when a run is resumed."""

    crops: int | None = None  # None: all consecutive crops; otherwise this many of them a track, evenly spaced
    hop_seconds: float | None = None  # None: the crop's length
    pool: str = "none"  # "mean": one row a track, the mean of its crops' embeddings
    embedding_dtype: str = "float32"
    silence_dbfs: float = DEFAULT_SILENCE_DBFS
    separate: str | None = None  # a separator engine; the embeddings are those of the voice
    min_vocals_db: float = DEFAULT_MIN_VOCALS_DB  # energy of the voice over the mixture's, below which nobody sings
    audio_hash: bool = False  # note which tracks have the same samples
    identity: str = "file"  # by which an update knows a track again; "audio": by the hash of its packets too
    columns: Columns = field(default_factory=Columns)
    unit_minutes: float = DEFAULT_UNIT_MINUTES  # of audio
    track_timeout_seconds: float = DEFAULT_TRACK_TIMEOUT_SECONDS
    retries: int = 2  # how often a file system's passing trouble is waited out, for each recording
    max_errors: int | float | None = None  # tracks, or a share below 1 of them, that may fail; None: all of them
    workers: int | None = None  # threads a process; None: the cores it may use
    devices: tuple[int, ...] | None = None  # CUDA devices, for an engine that runs on them; None: all
    ray: str | None = None  # Ray cluster to run on: "local", "auto", host:port or ray://host:port; None: this machine
    partitioned: bool = False  # the output is a folder of part files
    deadline: float | None = None  # seconds since 1970, after which no unit is begun
    restart: bool = False
    retry_errors: bool = False
    update: bool = False  # bring a finished output up to date with its catalogue
    keep_missing: bool = False  # in an update: rows of tracks that have gone from the catalogue stay
    allow_gone: bool = False  # in an update: more than half of the tracks may have gone

    def decisive(self) -> dict[str, Any]:
        """The options that decide the rows, as JSON types."""
        fields = asdict(self)
        return {name: fields[name] for name in fields if name not in _INDECISIVE}
