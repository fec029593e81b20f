"""The page of `singerembed serve`: what it answers, what it refuses, and what it looks like in a browser."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import browser
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from made_library import made_tracks, write_output

from singerembed.cli.main import cli
from singerembed.errors import UsageError
from singerembed.search import serve as serve_module
from singerembed.search.build import build_index
from singerembed.search.query import open_index
from singerembed.search.recording import embed_recording
from singerembed.search.serve import Recordings, listen, make_app

TestClient = pytest.importorskip("starlette.testclient").TestClient
EXAMPLES = Path(__file__).parents[2] / "examples"
ADDRESS = "http://127.0.0.1:8765"
SECRET = "of nobody's business"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An index of the example recordings in a folder with them; a file beside them is not of the index."""
    folder = tmp_path_factory.mktemp("serve")
    shutil.copytree(EXAMPLES / "audio", folder / "audio")
    shutil.copy(EXAMPLES / "catalog.csv", folder)
    (folder / "audio" / "secret.wav").write_text(SECRET, encoding="utf-8")
    for arguments in (["run", f"{folder}/catalog.csv", f"{folder}/out.parquet"],
                      ["index", f"{folder}/out.parquet", f"{folder}/out.index"]):  # fmt: skip
        assert CliRunner().invoke(cli, arguments).exit_code == 0
    return str(folder / "out.index")


@pytest.fixture(scope="module")
def client(index: str) -> Any:
    return client_of(index)


def client_of(path: str) -> Any:
    index = open_index(path)
    return TestClient(make_app(index, Recordings(index, f"{Path(path).parent}/")), base_url=ADDRESS)


def recording(name: str) -> bytes:
    return (EXAMPLES / "audio" / name).read_bytes()


@pytest.mark.parametrize("name", ["bass_1.wav", "tenor_2.opus", "alto_1.flac"])
@pytest.mark.parametrize("by", ["track", "crop"])
def test_the_answer_is_that_of_search(client: Any, index: str, name: str, by: str) -> None:
    response = client.post("/search", params={"name": name, "by": by}, content=recording(name))
    assert response.status_code == 200
    found = response.json()
    for track in found["tracks"]:
        assert track.pop("audio") == f"audio/{track['number']}"
    search = CliRunner().invoke(cli, ["search", index, str(EXAMPLES / "audio" / name), "--by", by, "--json"])
    expected = json.loads(search.stdout)
    del expected["query"]
    assert found == expected
    assert found["tracks"][0]["path"] == f"audio/{name}"


def test_unfit_recordings_get_the_words_of_search(client: Any, index: str, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silent.wav", np.zeros(441_000), 44_100)
    (tmp_path / "text <b>.wav").write_text("no audio", encoding="utf-8")
    (tmp_path / "empty.flac").touch()
    for path in tmp_path.iterdir():
        response = client.post("/search", params={"name": path.name}, content=path.read_bytes())
        assert response.status_code == 422
        message = response.json()["error"]
        said = CliRunner().invoke(cli, ["search", index, str(path)]).stderr
        assert message == said.removeprefix("Error: ").strip().replace(f"{tmp_path}/", "")
    assert client.post("/search", params={"name": "../" * 9 + "etc/passwd"}, content=b"x").status_code == 422


def test_recordings_that_are_too_large_or_too_long(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wav = recording("bass_1.wav")
    monkeypatch.setattr(serve_module, "MAX_SECONDS", 4.5)
    response = client.post("/search", params={"name": "bass.wav"}, content=wav)
    assert response.status_code == 413
    assert response.json()["error"] == "bass.wav is longer than 0.075 minutes. Give a part of it"
    monkeypatch.setattr(serve_module, "MAX_BYTES", 2**19)
    read = list[int]()

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            read.append(2**16)
            yield bytes(2**16)

    for content in (wav, chunks()):  # with a Content-Length, and without
        response = client.post("/search", params={"name": "bass.wav"}, content=content)
        assert response.status_code == 413
        assert "bass.wav is larger than 0.5 MB" in response.json()["error"]


def test_only_tracks_of_the_index_are_sent(client: Any, index: str, tmp_path: Path) -> None:
    paths = open_index(index).stored.tracks["path"].to_pylist()
    for number, name in enumerate(paths):
        response = client.get(f"/audio/{number}", headers={"Range": "bytes=4-99"})
        assert response.status_code == 206
        assert response.content == (EXAMPLES / name).read_bytes()[4:100]
        assert response.headers["content-type"].startswith("audio/")
    whole = client.get("/audio/0")
    assert whole.content == recording("bass_1.wav")
    for path in (
        "12",
        "-1",
        "secret.wav",
        "../audio/secret.wav",
        "%2e%2e/secret.wav",
        "..%2fsecret.wav",
        "0/../x",
        "",
        "9" * 5000,
    ):
        response = client.get(f"/audio/{path}")
        assert response.status_code in {404, 405}
        assert SECRET not in response.text
    tracks = made_tracks(2, 2, 1)
    path = str(tmp_path / "i.index")
    for name in ("s0-0.wav.txt", "s0-0.wav"):
        (tmp_path / name).write_text(SECRET, encoding="utf-8")
    os.mkfifo(tmp_path / "s1-0.wav")  # would block whoever opens it
    build_index([write_output(tmp_path / "o.parquet", tracks)], path)
    opened = open_index(path)
    recordings = Recordings(opened, f"{tmp_path}/")
    assert [recordings.file(n) is not None for n in range(-1, 5)] == [False, True, False, False, False, False]
    assert Recordings(opened, "s3://bucket/").file(0) is None


def test_pages_of_other_sites_are_refused(client: Any, index: str) -> None:
    others = ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"})
    for headers in (*others, {"Host": "[::1"}, {"Origin": "http://[evil"}):
        for response in (
            client.post("/search", content=b"", headers=headers),
            client.get("/audio/0", headers=headers),
            client.get("/", headers=headers),
        ):
            assert response.status_code == 403
    assert client.get("/", headers={"Origin": ADDRESS}).status_code == 200
    page = client.get("/")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert page.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert str(Path(index).parent) not in page.text
    opened = open_index(index)
    anywhere = TestClient(make_app(opened, Recordings(opened, "/"), None), base_url="http://music.example")
    assert anywhere.get("/").status_code == 200


def test_one_recording_is_decoded_at_a_time(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_module, "MAX_WAITING", 3)
    running, most = list[str](), list[int]()
    three_wait, go_on = threading.Semaphore(0), threading.Event()
    received = serve_module._received

    async def telling(request: Any, path: Path) -> bool:
        done = await received(request, path)
        three_wait.release()
        return done

    def slow(*args: Any, **options: Any) -> Any:
        running.append(options["name"])
        most.append(len(running))
        assert go_on.wait(60)
        try:
            return embed_recording(*args, **options)
        finally:
            running.remove(options["name"])

    monkeypatch.setattr(serve_module, "embed_recording", slow)
    monkeypatch.setattr(serve_module, "_received", telling)
    with client_of(index) as client:  # one event loop for all requests
        codes = list[int]()

        def ask(name: str) -> None:
            response = client.post("/search", params={"name": name}, content=recording("bass_1.wav"))
            codes.append(response.status_code)

        threads = [threading.Thread(target=ask, args=(f"{n}.wav",)) for n in range(3)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert three_wait.acquire(timeout=60)
        refused = client.post("/search", content=b"")
        assert refused.status_code == 503
        assert "3 recordings are waiting" in refused.json()["error"]
        go_on.set()
        for thread in threads:
            thread.join()
    assert codes == [200, 200, 200]
    assert most == [1, 1, 1]


def test_those_who_send_nothing_more_are_given_up(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_module, "_PAUSE_SECONDS", 0.05)
    opened = open_index(index)
    app = make_app(opened, Recordings(opened, "/"))
    coming, sent = [{"type": "http.request", "body": b"half", "more_body": True}], list[Any]()

    async def receive() -> Any:
        return coming.pop() if coming else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-length", b"100")]
    scope = {"type": "http", "method": "POST", "path": "/search", "query_string": b"name=a.wav", "headers": headers}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408
    assert b"nothing more of a.wav came" in sent[1]["body"]


def test_a_recording_that_is_looked_up_keeps_nobody_from_ending_it(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()

    def telling(*args: Any, is_stopped: Any, **options: Any) -> Any:
        asked.append(is_stopped)
        return embed_recording(*args, is_stopped=is_stopped, **options)

    monkeypatch.setattr(serve_module, "embed_recording", telling)
    with client_of(index) as client:
        assert client.post("/search", params={"name": "bass.wav"}, content=recording("bass_1.wav")).status_code == 200
        assert not asked[0]()
    assert asked[0]()
    engine = open_index(index).engine
    long = str(EXAMPLES / "audio" / "bass_1.wav")
    monkeypatch.setattr(engine, "batch", 1, raising=False)
    assert len(embed_recording(long, engine).start) > 1
    assert len(embed_recording(long, engine, is_stopped=lambda: True).start) == 1


def test_a_port_that_is_taken_and_an_engine_that_is_another(index: str, tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(cli, ["serve", index, "--port", str(port)])
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in result.stderr
    with pytest.raises(UsageError, match=r"cannot listen on no\.such\.host\.invalid port 1"):
        listen("no.such.host.invalid", 1)
    assert "is not an index" in CliRunner().invoke(cli, ["serve", str(tmp_path)]).stderr
    other = write_output(tmp_path / "o.parquet", made_tracks(1, 1, 1), engine={"name": "byol", "sha256": "0" * 64})
    build_index([other], str(tmp_path / "i.index"))
    result = CliRunner().invoke(cli, ["serve", str(tmp_path / "i.index")])
    assert result.exit_code == 2
    assert "name its file with --engine" in result.stderr


@pytest.fixture
def served(index: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server of its own process, and the process."""
    command = [sys.executable, "-m", "singerembed", "serve", index, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it(served: tuple[str, subprocess.Popen[str]], number: signal.Signals, code: int) -> None:
    address, process = served
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    place = "127.0.0.1", int(address[:-1].rpartition(":")[2])
    half = f"POST /search HTTP/1.1\r\nHost: {place[0]}:{place[1]}\r\nContent-Length: 100\r\n\r\nhalf".encode()
    with socket.create_connection(place) as given_up:
        given_up.sendall(half)
    with socket.create_connection(place) as half_open:
        half_open.sendall(half)
        assert b"Whose voice" in urlopen(address, timeout=60).read()  # so signals are handled by now
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
def test_the_page_in_a_browser(served: tuple[str, subprocess.Popen[str]], tmp_path: Path) -> None:
    address, _ = served
    (tmp_path / "<b>text.wav").write_text("no audio", encoding="utf-8")
    with browser.chromium() as driver:
        driver.get(address)
        assert "12 tracks of 4 singers" in driver.find_element("id", "about").text
        chosen = driver.find_element("id", "file")
        chosen.send_keys(str(tmp_path / "<b>text.wav"))
        browser.wait(driver, "document.getElementById('status').className === 'error'")
        assert driver.find_element("id", "status").text.startswith("<b>text.wav cannot be looked up:")
        assert not driver.find_element("id", "results").is_displayed()
        chosen.send_keys(str(EXAMPLES / "audio" / "tenor_2.opus"))
        browser.wait(driver, "!document.getElementById('results').hidden")
        singers = driver.find_elements("css selector", "#singers tr")
        assert singers[0].text.split()[0] == "tenor"
        tracks = driver.find_elements("css selector", "#tracks tr")
        assert tracks[0].find_element("css selector", ".name").text == "audio/tenor_2.opus"
        assert len(tracks) == 10
        name = tracks[1].find_element("css selector", ".name").text
        second = tracks[1].find_elements("css selector", f"button[aria-label^='Play {name} at']")[-1]
        minutes, seconds = re.findall(r" at (\d+):(\d+)", second.get_attribute("aria-label") or "")[0]
        second.click()
        player = "document.querySelectorAll('#tracks audio')[1]"
        browser.wait(driver, f"!{player}.paused && {player}.currentTime > {60 * int(minutes) + int(seconds)}")
        tracks[1].find_element("css selector", "button[aria-label^='Play yours at']").click()
        browser.wait(driver, f"{player}.paused && !document.getElementById('query').paused")
        for row in range(10):
            player = f"document.querySelectorAll('#tracks audio')[{row}]"
            driver.execute_script(f"{player}.preload = 'metadata'")
            browser.wait(driver, f"{player}.duration > 4")
        driver.execute_script(  # a file that is dropped, anywhere on the page
            "const data = new DataTransfer(); data.items.add(new File(['no audio'], 'dropped.wav'));"
            "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}))"
        )
        browser.wait(driver, "document.getElementById('status').textContent.startsWith('dropped.wav cannot')")
        assert all(url.startswith((address, "data:", "blob:")) for url in browser.requested(driver))
        unlabelled = "return [...document.querySelectorAll('input, select')].filter(e => !e.labels.length).length"
        assert driver.execute_script(unlabelled) == 0
        errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert all("422" in message for message in errors)  # the answers about the two that are no audio
