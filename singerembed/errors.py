"""The exceptions that singerembed raises on purpose.

SingerEmbedError                a person has to act: the CLI prints one line and exits with `exit_code`
├── UsageError                  the command or an argument is wrong (exit 2)
├── InputError                  a file that was given is missing, or is not what is read, or cannot be used
├── MissingDependencyError      a package is not installed; the message names the extra
├── CatalogError                the catalogue cannot be read as one
├── CheckpointError             a checkpoint is damaged, malicious, or not this model
├── EngineError                 an engine file is damaged or foreign, or the back end failed
├── OutputError                 the output cannot be written, or holds something else
├── TooManyErrors               more recordings failed than --max-errors allows
├── ClusterError                a Ray cluster cannot be reached, or its nodes cannot do the work
└── InterruptedRun              a signal stopped the run (exit 128 + signal)

TrackError                      one recording cannot be embedded: it becomes a row, never the end of a run
"""

from __future__ import annotations


class _Portable(Exception):
    """An exception that goes from one process to another, whatever its constructor takes."""

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[_Portable], args: tuple[object, ...], state: dict[str, object]) -> _Portable:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class SingerEmbedError(_Portable):
    """Base of all errors that end a command. The message says what was met, where, and what to do."""

    exit_code = 1


class UsageError(SingerEmbedError):
    """A command-line argument or option has a value that cannot work."""

    exit_code = 2


class InputError(SingerEmbedError):
    """A file that was given to be read is missing, is not of the kind that is read, or is of no use."""


class MissingDependencyError(SingerEmbedError):
    """An optional package is needed and not installed."""

    def __init__(self, purpose: str, package: str, extra: str = "", *, install: str = "") -> None:
        """`extra`: that brings the package; or `install`, the command that does."""
        install = install or f"pip install 'singerembed[{extra}]'"
        super().__init__(f"{purpose} needs the package {package}: {install}")


class CatalogError(SingerEmbedError):
    """The catalogue is missing, is not of a known format, or lacks a column."""


class CheckpointError(SingerEmbedError):
    """A checkpoint is damaged, would run code, or holds another model."""


class EngineError(SingerEmbedError):
    """An engine file is damaged, comes from another version, or its back end failed."""


class OutputError(SingerEmbedError):
    """The output cannot be written, or belongs to another run."""


class TooManyErrors(SingerEmbedError):
    """More recordings failed than the run was allowed to have."""


class ClusterError(SingerEmbedError):
    """A Ray cluster cannot be reached, or its nodes cannot do the work."""


class InterruptedRun(SingerEmbedError):
    """A signal stopped the run; what was finished is safe."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class TrackError(_Portable):
    """One recording, or one row of the catalogue, cannot be embedded.

    `code` is stable and fit for a query; the message is for people and does not repeat the path.
    """

    def __init__(self, code: str, message: str, *, passing: bool = False) -> None:
        """`passing`: it may succeed when it is tried again, as after trouble of the storage."""
        super().__init__(message)
        self.code = code
        self.passing = passing
