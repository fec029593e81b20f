"""Local paths and object storage behind one door; a real S3 server (moto's) on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from singerembed import storage
from singerembed.errors import InterruptedRun, OutputError
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import run
from singerembed.output.lock import take_lock

SECRET = "wJalrXUtnFEMI"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A bucket `music` on a local server; the credentials are where users have them, in the environment."""
    pytest.importorskip("moto")
    import s3fs

    port_file = tmp_path_factory.mktemp("s3") / "port"
    code = (
        "import sys\n"
        "from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app\n"
        "from werkzeug.serving import make_server\n"
        "server = make_server('127.0.0.1', 0, DomainDispatcherApplication(create_backend_app), threaded=True)\n"
        f"open({str(port_file)!r}, 'w').write(str(server.server_port))\n"
        "server.serve_forever()\n"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (port_file.exists() and port_file.read_text(encoding="utf-8")) and time.monotonic() < deadline:
        time.sleep(0.05)
    endpoint = f"http://127.0.0.1:{port_file.read_text(encoding='utf-8')}"
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1", "no_proxy": "127.0.0.1",
    }.items():  # fmt: skip
        patch.setenv(name, value)
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    fs.mkdir("music")
    yield fs
    patch.undo()
    server.terminate()
    server.wait()


def fill(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(3):
        soundfile.write(folder / f"{i}.flac", 0.1 * rng.standard_normal(9 * 44_100), 44_100)
    rows = [f"{i},audio/{i}.flac" for i in range(3)] + ["gone,audio/gone.flac"]
    (folder / "catalog.csv").write_text("track_id,path\n" + "\n".join(rows) + "\n", encoding="utf-8")
    (folder / "audio").mkdir()
    for i in range(3):
        shutil.move(folder / f"{i}.flac", folder / "audio")


def test_a_run_on_s3_equals_a_local_one(s3: Any, tmp_path: Path) -> None:
    fill(tmp_path)
    local = run(str(tmp_path / "catalog.csv"), str(tmp_path / "local.parquet"), options=RunOptions(unit_minutes=8))
    s3.put(str(tmp_path / "catalog.csv"), "music/lib/catalog.csv")
    s3.put(str(tmp_path / "audio"), "music/lib/audio", recursive=True)
    output = "s3://music/out/o.parquet"
    remote = run("s3://music/lib/catalog.csv", output, options=RunOptions(unit_minutes=8, retries=0))
    assert remote.counts == local.counts
    assert remote.counts.errors == {"not_found": 1}
    with storage.open_input(output) as file:
        table = pq.read_table(file)
    local = pq.read_table(tmp_path / "local.parquet")
    assert table["file_size"].equals(local["file_size"])
    assert table["file_mtime"].null_count == local["file_mtime"].null_count  # those of the objects
    assert table.drop_columns("file_mtime").equals(local.drop_columns("file_mtime"))
    assert storage.names_in(f"{output}.parts") == []
    assert SECRET not in json.dumps({str(k): str(v) for k, v in table.schema.metadata.items()})
    assert run("s3://music/lib/catalog.csv", output, options=RunOptions(unit_minutes=8)).already_done


def test_a_run_on_s3_goes_on_after_a_stop(s3: Any, tmp_path: Path) -> None:
    fill(tmp_path)
    s3.put(str(tmp_path / "audio"), "music/two/audio", recursive=True)
    (tmp_path / "catalog.csv").write_text("path\n" + "audio/0.flac\n" * 20, encoding="utf-8")
    s3.put(str(tmp_path / "catalog.csv"), "music/two/catalog.csv")
    output = "s3://music/two/o.parquet"
    options = RunOptions(unit_minutes=4, retries=0, workers=1)

    def stop() -> int:
        return 15 if any(name.startswith("unit-") for name in storage.names_in(f"{output}.parts")) else 0

    with pytest.raises(InterruptedRun):
        run("s3://music/two/catalog.csv", output, options=options, stop=stop)
    assert run("s3://music/two/catalog.csv", output, options=options).units_before > 0


def test_two_runs_on_one_remote_output(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    catalog, output = str(tmp_path / "catalog.csv"), "s3://music/three/o.parquet"
    monkeypatch.setattr("singerembed.output.lock._RENEW_SECONDS", 0.05)
    give_back = take_lock(f"{output}.parts", output)
    before = json.loads(s3.cat("music/three/o.parquet.parts/lock"))["time"]
    with pytest.raises(OutputError, match=r"another run is writing .* last seen"):
        run(catalog, output)
    deadline = time.monotonic() + 20
    while json.loads(s3.cat("music/three/o.parquet.parts/lock"))["time"] == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert json.loads(s3.cat("music/three/o.parquet.parts/lock"))["time"] > before  # it is renewed
    give_back()
    dead = {"owner": "process 1 on elsewhere", "time": time.time() - 1000}
    s3.pipe("music/three/o.parquet.parts/lock", json.dumps(dead).encode())
    assert run(catalog, output, options=RunOptions(retries=0)).counts.tracks == 4


def test_audio_over_http_and_from_memory(tmp_path: Path, s3: Any) -> None:
    import fsspec

    fill(tmp_path)
    fsspec.filesystem("memory").put_file(str(tmp_path / "audio" / "0.flac"), "/0.flac")
    s3.put(str(tmp_path / "audio" / "0.flac"), "music/public/0.flac")
    url = urllib.request.urlopen(s3.sign("music/public/0.flac")).url
    (tmp_path / "c.csv").write_text(f"path\nmemory://0.flac\n{url}\nmemory://none.flac\n", encoding="utf-8")
    run(str(tmp_path / "c.csv"), str(tmp_path / "o.parquet"), options=RunOptions(retries=0))
    table = pq.read_table(tmp_path / "o.parquet")
    assert table["status"].to_pylist() == ["ok"] * 4 + ["error"]


def test_credentials_do_not_reach_messages() -> None:
    url = "https://user:password@example.org/a.wav?X-Amz-Signature=abc"
    assert storage.redacted(url) == "https://example.org/a.wav?..."
    assert storage.scrubbed(f"404, url={url!r}") == "404, url='https://example.org/a.wav?...'"
    assert storage.redacted("a?b.wav") == "a?b.wav"


def test_halves_of_characters_become_escapes() -> None:
    for text in ("\ud83d caf\udce9", "\ud83d", "é"):
        storage.printable(text).encode()
        storage.portable(text).encode()
    assert storage.printable("\ud83d caf\udce9") == r"\ud83d caf\xe9"
    assert storage.local_path(storage.portable("caf\udce9")) == "caf\udce9"


def test_temporaries_of_one_file_are_removed(tmp_path: Path) -> None:
    names = ["o.parquet", ".o.parquet.12-0123abcd.tmp", ".p.parquet.12-0123abcd.tmp", ".o.parquet.tmp", ".o.parquet"]
    for name in names:
        (tmp_path / name).touch()
    storage.remove_temporaries(str(tmp_path / "o.parquet"))
    assert {path.name for path in tmp_path.iterdir()} == set(names) - {names[1]}


def test_a_failed_block_publishes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old", encoding="utf-8")
    with pytest.raises(ZeroDivisionError), storage.publishing(str(target)) as temporary:
        Path(temporary).write_text("new", encoding="utf-8")
        raise ZeroDivisionError
    assert target.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]
    with storage.publishing(str(target)) as temporary:
        Path(temporary).write_text("new", encoding="utf-8")
        assert target.read_text(encoding="utf-8") == "old"
    assert target.read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize(
    ("base", "path", "expected"),
    [
        ("/a/c.csv", "x/b.wav", "/a/x/b.wav"),
        ("c.csv", "b.wav", "b.wav"),
        ("/a/c.csv", "/b.wav", "/b.wav"),
        ("s3://m/a/c.csv", "x/b.wav", "s3://m/a/x/b.wav"),
        ("s3://m/a/c.csv", "gs://n/b.wav", "gs://n/b.wav"),
        ("/a/c.csv", "memory://b.wav", "memory://b.wav"),
    ],
)
def test_resolve(base: str, path: str, expected: str) -> None:
    assert storage.resolve(base, path) == expected


def test_local_parquet_is_read_from_a_file_of_arrows_own(tmp_path: Path) -> None:
    """Pages of a Python file, which a thread of Arrow lets go of as the interpreter ends, abort the process."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet")
    with Path(path).open("wb") as out:
        pq.write_table(pa.table({"a": [1, 2]}), out)
    with storage.open_parquet(path) as file:
        assert isinstance(file, pa.NativeFile)
        assert pq.ParquetFile(file).read()["a"].to_pylist() == [1, 2]
    with pytest.raises(FileNotFoundError):
        storage.open_parquet(str(tmp_path / "none.parquet"))
