"""Open a recording as mono or stereo PCM: the one place that decides what decodes it, and how long it is.

libsndfile decodes what it can, in this process. Everything else goes to FFmpeg in a decoder process (process.py),
because FFmpeg's many demuxers meet many strange files, and a crash or a hang there must cost one track only. A
recording that was being decoded when an earlier run died is decoded there whatever its format.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import soundfile

from singerembed import storage
from singerembed.audio.chained_ogg import ChainedReader, stream_offsets
from singerembed.audio.libsndfile import SoundFileReader
from singerembed.audio.limits import TimeLimit
from singerembed.audio.process import ProcessReader
from singerembed.audio.reader import PcmReader
from singerembed.audio.resampling import ResamplingReader
from singerembed.errors import MissingDependencyError, TrackError


@contextlib.contextmanager
def open_recording(
    location: str, sample_rate: int, limit: TimeLimit, *, isolated: bool = False, channels: int = 1
) -> Iterator[PcmReader]:
    """Open the recording at `location`, a local path or a URI, at `sample_rate` Hz.

    `isolated`: decode in another process whatever the format is. `channels`: 1 for mono, or 2 for stereo, in which a
    recording with one channel, or more than two, has the same signal twice. Raises TrackError with code not_found,
    unreadable, no_audio, unsupported, decode_failed, decoder_crashed or decode_timeout.
    """
    with local_recording(location) as path, _blaming_storage(path, limit):
        source: PcmReader
        try:
            _check_file(path)
            if isolated:
                source = ProcessReader(path, "any", limit, channels=channels)
            else:
                open_av = partial(ProcessReader, path, "av", limit, channels=channels)
                source = open_source(path, sample_rate, limit, open_av, channels)
        except OSError as exc:
            raise _unreadable(exc) from exc
        with contextlib.closing(source):
            yield source if source.sample_rate == sample_rate else ResamplingReader(source, sample_rate, channels)


def open_source(
    path: str,
    wanted_rate: int,
    limit: TimeLimit,
    open_av: Callable[[float | None, float], PcmReader],
    channels: int = 1,
) -> PcmReader:
    """Open the local file `path` with the decoder that reads it to its end.

    That is libsndfile where the file bears out the length that it finds (headers.py). A chained Ogg file is read stream
    by stream. Everything else goes to FFmpeg, if it opens the file and reads at least as far: `open_av` takes the
    seconds that the header says (0: it does not say; None: libsndfile cannot open it) and the seconds that are
    promised. Raises TrackError and OSError.
    """
    try:
        source = SoundFileReader(path, wanted_rate, limit, channels=channels)
    except soundfile.LibsndfileError:
        return open_av(None, 0.0)
    with contextlib.ExitStack() as stack:
        stack.callback(source.close)
        header = source.check_header()
        if header.believed:
            stack.pop_all()
            return source
        if header.is_chained and len(offsets := stream_offsets(path)) > 1:
            return ChainedReader(path, offsets, limit, channels)
        with contextlib.ExitStack() as opened:
            try:
                other = open_av(source.header_seconds, header.promised_seconds)
                opened.callback(other.close)
                if not source.length_is_measured or other.length() > source.length():
                    opened.pop_all()
                    return other
            except TrackError:  # FFmpeg does not know it, or dies of it
                pass
        stack.pop_all()
        return source


@contextlib.contextmanager
def local_recording(location: str) -> Iterator[str]:
    """Yield a local path of what is at `location`; what is remote is fetched for the block. Raises TrackError."""
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(storage.local_copy(location))
        except FileNotFoundError as exc:
            raise TrackError("not_found", "file not found") from exc
        except MissingDependencyError as exc:  # other rows may need no package
            raise TrackError("unreadable", str(exc)) from exc
        except Exception as exc:  # each fsspec file system has exceptions of its own
            raise _unreadable(exc) from exc
        yield path


@contextlib.contextmanager
def _blaming_storage(path: str, limit: TimeLimit) -> Iterator[None]:
    """Let an error that seems to be the file's be one of its storage, where the file cannot be read to its end."""
    try:
        yield
    except TrackError as exc:
        if exc.code in {"no_audio", "decode_failed", "truncated"}:
            with limit.counting():
                error = storage.reading_error(path)
            if error is not None:
                raise _unreadable(error) from exc
        raise


def _check_file(path: str) -> None:
    """Raise TrackError unless `path` is a file with something in it; OSError where trying again may help."""
    try:
        info = Path(path).stat()
        if stat.S_ISDIR(info.st_mode):
            raise TrackError("unreadable", "is a folder, not a file")
        if not stat.S_ISREG(info.st_mode):  # a pipe would block whoever opens it
            raise TrackError("unreadable", "is not a regular file")
        with Path(path).open("rb"):
            pass
    except FileNotFoundError as exc:
        raise TrackError("not_found", "file not found") from exc
    except (PermissionError, ValueError) as exc:  # ValueError: a NUL in the name
        raise TrackError("unreadable", _reason(exc)) from exc
    if info.st_size == 0:
        raise TrackError("no_audio", "the file is empty")


def _unreadable(exc: Exception) -> TrackError:
    return TrackError("unreadable", _reason(exc), passing=storage.may_pass(exc))


def _reason(exc: Exception) -> str:
    return os.strerror(exc.errno) if isinstance(exc, OSError) and exc.errno else storage.scrubbed(str(exc))
