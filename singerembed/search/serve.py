"""The web application of `singerembed serve`: a page on which recordings are looked up in an index, and listened to.

What a browser may ask for is the page, an answer to a recording that it sends, and the tracks of the index by their
number. No path of the machine is part of a request, and none is in an answer but those that `search` prints.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import socket
import tempfile
import threading
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from singerembed import storage
from singerembed.errors import InputError, MissingDependencyError, UsageError
from singerembed.evaluation.page import STYLE
from singerembed.search.query import Answer, Index
from singerembed.search.recording import TooLong, embed_recording
from singerembed.search.store import KINDS

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BYTES = 200 * 2**20  # of a recording that is sent
MAX_SECONDS = 900.0
MAX_WAITING = 8  # recordings that are received or wait; one at a time is decoded
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SHUTDOWN_SECONDS = 1
_PAUSE_SECONDS = 30.0  # in which nothing more of a recording comes, before it is given up
_MAX_DIGITS = 20  # of a track's number
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# What browsers play, by the end of a name. Files of other names are never sent.
_MEDIA_TYPES = {
    ".aac": "audio/aac", ".flac": "audio/flac", ".m4a": "audio/mp4", ".mp3": "audio/mpeg", ".mp4": "audio/mp4",
    ".oga": "audio/ogg", ".ogg": "audio/ogg", ".opus": "audio/ogg", ".wav": "audio/wav", ".wave": "audio/wav",
    ".webm": "audio/webm",
}  # fmt: skip


class Recordings:
    """The recordings of an index that can be played: local files of a format that browsers know."""

    def __init__(self, index: Index, audio_root: str) -> None:
        """`audio_root`: what relative paths of tracks count from, with a separator at its end."""
        self._paths = index.stored.tracks["path"]
        self._root = audio_root

    def file(self, number: int) -> Path | None:
        """The file of track `number`; None where there is no such track, or it cannot be played."""
        if not 0 <= number < len(self._paths):
            return None
        location = storage.resolve(self._root, self._paths[number].as_py())
        path = Path(location)
        playable = not storage.is_remote(location) and path.suffix.lower() in _MEDIA_TYPES and path.is_file()
        return path if playable else None


class _Service:
    """Answers the requests of the page."""

    def __init__(self, index: Index, recordings: Recordings) -> None:
        self._index, self._recordings = index, recordings
        # Opened now, so that what is missing is said at the start, and an index that grows may drop its old files.
        self._separation = index.separation
        for kind in KINDS:
            index.quantised(kind)
        self.is_stopped = threading.Event()
        self._turn = asyncio.Lock()
        self._waiting = 0
        facts = {
            "name": index.stored.folder.name, "tracks": int(index.stored.active.sum()),
            "singers": len(index.stored.profiles.names) if index.stored.singer_column else 0,
            "crop_seconds": index.engine.spec.crop_seconds,
            "max_bytes": MAX_BYTES, "max_seconds": MAX_SECONDS,
        }  # fmt: skip
        text = (resources.files("singerembed.search") / "serve.html").read_text(encoding="utf-8")
        self._page = text.replace("/* STYLE */", STYLE).replace("FACTS", json.dumps(facts).replace("<", "\\u003c"))

    async def page(self, _request: Request) -> Response:
        from starlette.responses import HTMLResponse

        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; "
            "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return HTMLResponse(self._page.replace("NONCE", nonce), headers={"Content-Security-Policy": policy})

    async def search(self, request: Request) -> Response:
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse

        by = "crop" if request.query_params.get("by") == "crop" else "track"
        name = storage.printable(request.query_params.get("name", ""))[:200] or "the recording"
        if self._waiting >= MAX_WAITING:
            return _refusal(503, f"{MAX_WAITING} recordings are waiting already. Try again in a while")
        self._waiting += 1
        try:
            with tempfile.TemporaryDirectory(prefix="singerembed-") as folder:
                path = Path(folder) / ("query" + _ending(name))
                if not await _received(request, path):
                    megabytes = MAX_BYTES / 2**20
                    return _refusal(413, f"{name} is larger than {megabytes:g} MB. Give a shorter recording, or a part")
                async with self._turn:
                    answer = await asyncio.to_thread(self._look_up, path, name, by)
        except (ClientDisconnect, TimeoutError):
            return _refusal(408, f"nothing more of {name} came: it broke off")
        except InputError as exc:
            return _refusal(413 if isinstance(exc, TooLong) else 422, str(exc))
        except OSError as exc:
            return _refusal(507, f"the recording could not be kept while it is looked up: {exc.strerror or exc}")
        finally:
            self._waiting -= 1
        return JSONResponse(self._described(answer))

    async def audio(self, request: Request) -> Response:
        from starlette.responses import FileResponse

        number = request.path_params["number"]
        path = self._recordings.file(int(number)) if number.isdecimal() and len(number) < _MAX_DIGITS else None
        if path is None:
            return _refusal(404, "there is no such track, or it cannot be played")
        return FileResponse(path, media_type=_MEDIA_TYPES[path.suffix.lower()])

    def _look_up(self, path: Path, name: str, by: str) -> Answer:
        query = embed_recording(
            str(path), self._index.engine, self._separation, name=name, max_seconds=MAX_SECONDS,
            is_stopped=self.is_stopped.is_set,
        )  # fmt: skip
        return self._index.search_crops(query, by=by)

    def _described(self, answer: Answer) -> dict[str, Any]:
        facts = answer.to_dict()
        for track in facts["tracks"]:
            track["audio"] = f"audio/{track['number']}" if self._recordings.file(track["number"]) else None
        return facts


class _Guard:
    """Lets nobody in whom the page does not come from, and adds headers to what is answered.

    A page of another site can make a browser send requests here. It is refused by the Origin that the browser adds,
    and, where its name was made to mean this machine (DNS rebinding), by the Host, if the server listens on loopback
    only.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] | None) -> None:
        """`hosts`: names that a request may have for this machine; None for any."""
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers, MutableHeaders

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope)
        if not self._is_expected(given.get("host", ""), given.get("origin")):
            await _refusal(403, "this is for the page of singerembed serve alone")(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, with_headers)

    def _is_expected(self, host: str, origin: str | None) -> bool:
        try:
            is_here = self._hosts is None or urlsplit(f"//{host}").hostname in self._hosts
            return is_here and (origin is None or urlsplit(origin).netloc == host)
        except ValueError:  # no address
            return False


def make_app(index: Index, recordings: Recordings, hosts: tuple[str, ...] | None = LOOPBACK) -> Starlette:
    """Return the ASGI application. `hosts`: names that a request may have for this machine; None for any.

    Opens the engine of the index. Raises UsageError if it is not at hand, MissingDependencyError without starlette.
    """
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.routing import Route
    except ImportError as exc:
        raise MissingDependencyError("serve", "starlette", "serve") from exc
    service = _Service(index, recordings)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        service.is_stopped.set()  # the process waits for the thread that looks a recording up

    routes = [
        Route("/", service.page),
        Route("/search", service.search, methods=["POST"]),
        Route("/audio/{number}", service.audio),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_Guard, hosts=hosts)], lifespan=lifespan)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to `host` and `port` (0: one that is free). Raises UsageError if that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()
        except BaseException:
            listener.close()
            raise
    except OSError as exc:
        raise UsageError(
            f"cannot listen on {host} port {port}: {exc.strerror or exc}. Choose others with --host and --port"
        ) from exc
    return listener


def serve(app: Starlette, listener: socket.socket) -> None:
    """Serve `app` until a signal arrives, which is then raised again. Raises MissingDependencyError without uvicorn."""
    try:
        import uvicorn
    except ImportError as exc:
        raise MissingDependencyError("serve", "uvicorn", "serve") from exc

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what is cut off now is no error
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_level="error", access_log=False, server_header=False, timeout_graceful_shutdown=_SHUTDOWN_SECONDS
    )
    Server(config).run(sockets=[listener])


async def _received(request: Request, path: Path) -> bool:
    """Write the body of `request` to `path`; False if it is larger than MAX_BYTES, of which no more is read.

    Raises TimeoutError where nothing comes for _PAUSE_SECONDS.
    """
    with contextlib.suppress(ValueError):
        if int(request.headers.get("content-length", "0")) > MAX_BYTES:
            return False
    size, chunks = 0, aiter(request.stream())
    with path.open("wb") as file:
        while (chunk := await asyncio.wait_for(anext(chunks, None), _PAUSE_SECONDS)) is not None:
            size += len(chunk)
            if size > MAX_BYTES:
                return False
            file.write(chunk)
    return True


def _ending(name: str) -> str:
    """The end of a file's name, which tells decoders its format; empty if it is odd."""
    suffix = Path(name).suffix
    return suffix if suffix[1:].isascii() and suffix[1:].isalnum() and len(suffix) < 8 else ""


def _refusal(status: int, message: str) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse({"error": message}, status_code=status)
