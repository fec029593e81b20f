"""Read and publish files on local paths and whatever fsspec opens (`s3://`, `gs://`, `memory://`, `https://`, ...).

A published file appears under its name whole or not at all: locally through a temporary name, fsync and rename; on
object stores a PUT is atomic by itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import quote, unquote_to_bytes

from singerembed.errors import MissingDependencyError, OutputError

# Errors of a storage that hangs, restarts or is reached over a network. Others last: no such file, no permission, no
# space, a name too long, links in a circle.
_PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOTCONN, errno.ENODEV,
    errno.ENXIO, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENETDOWN, errno.ENETUNREACH,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO, errno.ENFILE, errno.EMFILE, errno.ENOMEM,
}  # fmt: skip
_BLOCK_BYTES, _LOOK_BYTES = 1 << 20, 256 << 20
# A scheme has two letters or more, so that C:\ stays a path.
_URI = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_HALVES = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")  # of characters, as JSON may escape them; no byte is written so
_FILE_URI = re.compile(r"file:(//(localhost)?(?=/))?", re.IGNORECASE)


def is_remote(path: str) -> bool:
    """Say whether `path` is a URI for fsspec rather than a local path or a `file:` URI."""
    return bool(_URI.match(path)) and not _FILE_URI.match(path)


def local_path(path: str) -> str:
    """`path`, without the `file:` and the percent-encoding if it is a `file:` URI (RFC 8089)."""
    match = _FILE_URI.match(path)
    return path if match is None else os.fsdecode(unquote_to_bytes(path[match.end() :]))


def portable(path: str) -> str:
    """`path` as text that UTF-8 can hold: one with other bytes becomes a `file:` URI, which `local_path` turns back.

    Halves of characters, which no name of a file has, become escapes.
    """
    path = _whole(path)
    return path if is_utf8(path) else f"file:{quote(os.fsencode(path))}"


def is_bytes_or_text(text: str) -> bool:
    """Say whether the name of a file can be `text`: whether its surrogates stand for bytes that are not UTF-8."""
    return text.isascii() or not _HALVES.search(text)


def _whole(text: str) -> str:
    return text if is_bytes_or_text(text) else _HALVES.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def is_utf8(text: str) -> bool:
    """Say whether `text` has no surrogates, which stand for bytes that are not UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def resolve(base: str, path: str) -> str:
    """Resolve `path` against the folder of the file `base`; URIs and absolute paths stay, `file:` URIs become paths."""
    if is_remote(path):
        return path
    path = local_path(path)
    if is_remote(base):
        scheme, _, rest = base.partition("://")
        return f"{scheme}://{PurePosixPath(rest).parent / path}"
    return os.path.join(os.path.dirname(base), path)  # noqa: PTH118, PTH120  (ten times faster, once a row)


def absolute(path: str) -> str:
    """`path` from the root, where it is a local one."""
    return path if is_remote(path) else str(Path(path).absolute())


def redacted(path: str) -> str:
    """`path` without user name, password or query, fit for logs and metadata."""
    return re.sub(r"\?.*$", "?...", re.sub(r"(?<=://)[^/@]*@", "", path)) if is_remote(path) else path


def scrubbed(text: str) -> str:
    """`text` with every URI in it redacted."""
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s'\"<>)]+", lambda uri: redacted(uri[0]), text)


def printable(text: str) -> str:
    """`text` with bytes that are not UTF-8, and halves of characters, as escapes: fit for Parquet and terminals."""
    if text.isascii():
        return text
    return _whole(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def open_input(path: str) -> BinaryIO:
    """Open `path` for reading bytes. Raises OSError as `open` does."""
    if is_remote(path):
        fs, name = _filesystem(path)
        return cast(BinaryIO, fs.open(name, "rb"))
    return Path(path).open("rb")


def open_parquet(path: str) -> Any:
    """Open `path` as what Arrow reads Parquet from. Raises OSError as `open` does.

    A local file is one of Arrow's own: its threads still let go of pages when a read is over, and pages that belong to
    Python would end the process with SIGABRT if the interpreter is just ending too.
    """
    if is_remote(path):
        return open_input(path)
    import pyarrow as pa

    return pa.OSFile(os.fsencode(path), "rb")


def may_pass(exc: BaseException) -> bool:
    """Say whether the trouble `exc` with a file may pass by itself, so that trying again makes sense.

    Errors of object storage count as passing, as each file system of fsspec has exceptions of its own.
    """
    if isinstance(exc, OSError) and exc.errno is not None:
        return exc.errno in _PASSING
    return not isinstance(exc, FileNotFoundError | PermissionError | IsADirectoryError | MissingDependencyError)


def state_of(path: str) -> tuple[int | str, ...]:
    """What changes when the file `path` is written to: size, time and inode, or the object's size and tag."""
    if is_remote(path):
        fs, name = _filesystem(path)
        fs.invalidate_cache()
        info = fs.info(name)
        return int(info.get("size") or 0), str(info.get("ETag") or info.get("mtime") or "")
    info = Path(path).stat()
    return info.st_size, info.st_mtime_ns, info.st_ino


def reading_error(path: str) -> OSError | None:
    """The error with which reading the local file `path` fails; None if its first 256 MB can be read.

    Decoders take a read that fails for the end of the file, or for damage; this tells one from the other.
    """
    try:
        with Path(path).open("rb", buffering=0) as file:
            while file.tell() < _LOOK_BYTES and file.read(_BLOCK_BYTES):
                pass
    except OSError as exc:
        return exc
    return None


def exists(path: str) -> bool:
    """Say whether there is a file at `path`."""
    if is_remote(path):
        fs, name = _filesystem(path)
        return bool(fs.exists(name))
    return Path(path).exists()


def names_in(folder: str) -> list[str]:
    """Names of the files in `folder`, unordered; empty if there is no such folder."""
    if is_remote(folder):
        fs, name = _filesystem(folder)
        fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            return [PurePosixPath(entry).name for entry in fs.ls(name, detail=False)]
        return []
    return [entry.name for entry in Path(folder).iterdir()] if Path(folder).is_dir() else []


def is_folder(path: str) -> bool:
    """Say whether there is a folder at `path`: in object storage, anything below that name."""
    if is_remote(path):
        fs, name = _filesystem(path)
        return bool(fs.isdir(name))
    return Path(path).is_dir()


class Facts(NamedTuple):
    """What a file system says of a file without its being opened; None: it does not say."""

    size: int | None = None  # bytes
    mtime_ns: int | None = None  # of the last modification, nanoseconds since 1970


class Entry(NamedTuple):
    """One name in a folder."""

    name: str
    is_folder: bool
    is_file: bool  # neither: a pipe, a device, or a link that leads nowhere
    facts: Facts | None = None  # of an object; local files are asked one by one


def entries(folder: str) -> Iterator[Entry]:
    """Yield what lies in `folder`, unordered; links count as what they lead to. Raises OSError."""
    if not is_remote(folder):
        with os.scandir(folder) as found:
            for entry in found:
                try:
                    yield Entry(entry.name, entry.is_dir(), entry.is_file())
                except OSError:  # a link to itself
                    yield Entry(entry.name, False, False)
        return
    fs, name = _filesystem(folder)
    fs.invalidate_cache()
    for info in fs.ls(name, detail=True):
        path = str(info["name"]).rstrip("/")
        if path.strip("/") != name.strip("/"):  # some stores list an empty object that stands for the folder
            is_folder = info["type"] == "directory"
            yield Entry(PurePosixPath(path).name, is_folder, not is_folder, _object_facts(info))
    fs.invalidate_cache()  # it would keep every listing of a long walk


def facts_of(path: str) -> Facts:
    """Size and time of the file `path`. Raises OSError."""
    if is_remote(path):
        fs, name = _filesystem(path)
        return _object_facts(fs.info(name))
    info = Path(path).stat()
    return Facts(info.st_size, info.st_mtime_ns)


def _object_facts(info: dict[str, Any]) -> Facts:
    size = info.get("size")
    when = next(
        (info[key] for key in ("LastModified", "mtime", "last_modified", "updated", "created") if info.get(key)), None
    )
    if isinstance(when, str):
        with contextlib.suppress(ValueError):
            when = datetime.fromisoformat(when)
    seconds = when.timestamp() if isinstance(when, datetime) else when
    mtime_ns = int(seconds * 1_000_000) * 1000 if isinstance(seconds, int | float) else None
    return Facts(None if size is None else int(size), mtime_ns)


def rename(path: str, to: str) -> None:
    """Give the file `path` another name, in the place of what had it; object stores copy it."""
    if is_remote(path):
        fs, name = _filesystem(path)
        fs.mv(name, _filesystem(to)[1])
    else:
        Path(path).replace(to)


def make_folder(path: str) -> None:
    """Create a folder and its parents; object stores need none."""
    if not is_remote(path):
        Path(path).mkdir(parents=True, exist_ok=True)


def create(path: str, content: bytes) -> bool:
    """Write a small remote file if there is none; say whether there was none."""
    fs, name = _filesystem(path)
    try:
        fs.pipe_file(name, content, mode="create")
    except FileExistsError:
        return False
    return True


def read(path: str) -> bytes:
    """Read a small remote file in one request, so that it may be rewritten meanwhile."""
    fs, name = _filesystem(path)
    return bytes(fs.cat_file(name))


def write(path: str, content: bytes) -> None:
    """Write a small remote file."""
    fs, name = _filesystem(path)
    fs.pipe_file(name, content)


def remove(path: str) -> None:
    """Remove a file if it is there."""
    if is_remote(path):
        fs, name = _filesystem(path)
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(name)
    else:
        Path(path).unlink(missing_ok=True)


def remove_folder(path: str) -> None:
    """Remove a folder and all that is in it, if it is there."""
    if is_remote(path):
        fs, name = _filesystem(path)
        with contextlib.suppress(FileNotFoundError):
            fs.rm(name, recursive=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)


def remove_empty_folder(path: str) -> None:
    """Remove a local folder if it is there and empty; object stores have none."""
    if not is_remote(path):
        with contextlib.suppress(OSError):
            Path(path).rmdir()


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local path holding the bytes of `path`; remote files are fetched and dropped afterwards."""
    if not is_remote(path):
        yield path
        return
    fs, name = _filesystem(path)
    with tempfile.TemporaryDirectory(prefix="singerembed-") as folder:
        local = str(Path(folder) / f"audio{PurePosixPath(name).suffix}")
        fs.get_file(name, local)
        yield local


@contextlib.contextmanager
def publishing(path: str) -> Iterator[str]:
    """A temporary local path to write to; when the block ends well, its content is published as `path`.

    On an exception nothing is left behind and an older `path` stays as it was.
    """
    if is_remote(path):
        fs, name = _filesystem(path)
        with tempfile.TemporaryDirectory(prefix="singerembed-") as folder:
            local = str(Path(folder) / "content")
            yield local
            fs.put_file(local, name)
        return
    target = Path(path)
    # Processes of one number may write the same file from two machines.
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        yield str(temporary)
        _fsync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    # Some file systems cannot flush a folder; the rename is on the disk a little later there.
    with contextlib.suppress(OSError):
        _fsync(target.parent)


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Raise OutputError, naming `what` is written, in the place of OSError for the block."""
    try:
        yield
    except OSError as exc:
        raise OutputError(f"cannot write {what}: {exc.strerror or exc}") from exc


def remove_temporaries(path: str) -> None:
    """Remove what killed processes have left of `publishing` the local file `path`; nobody else may be writing it."""
    if is_remote(path):
        return
    target = Path(path)
    temporary = re.compile(rf"\.{re.escape(target.name)}\.\d+-[0-9a-f]{{8}}\.tmp")
    for name in names_in(str(target.parent)):
        if temporary.fullmatch(name):
            remove(str(target.with_name(name)))


def _fsync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _filesystem(uri: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as exc:
        raise MissingDependencyError(f"opening {redacted(uri)}", "fsspec", "remote") from exc
    try:
        fs, name = fsspec.core.url_to_fs(uri)
    except ImportError as exc:  # fsspec is there, the package behind the scheme is not
        raise MissingDependencyError(f"opening {redacted(uri)}", str(exc).split()[-1], "remote") from exc
    return fs, name
