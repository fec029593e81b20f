"""The engine file, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from singerembed.engine import file as engine_file
from singerembed.engine.file import EngineFile, read_engine_file
from singerembed.errors import EngineError, OutputError
from singerembed.model.spec import ModelSpec

DATA = Path(__file__).parent / "data"


@pytest.fixture
def engine(spec: ModelSpec) -> EngineFile:
    return EngineFile(spec, "onnxruntime", b"payload" * 100, {"checkpoint": "x.pt"}, {"cosine": 1.0})


def test_write_and_read(tmp_path: Path, engine: EngineFile) -> None:
    path = str(tmp_path / "a.engine")
    engine.write(path)
    assert read_engine_file(path) == engine
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.engine"]


def test_an_engine_of_version_0_1_0_is_read(engine: EngineFile) -> None:
    """Written by the release of that number, with `engine` as above."""
    assert read_engine_file(str(DATA / "version-0.1.0.engine")) == engine


def test_identity_is_what_decides_the_rows(engine: EngineFile) -> None:
    other_day = EngineFile(engine.spec, engine.backend, engine.payload, {"versions": "others"}, {})
    assert other_day.sha256 == engine.sha256
    other_payload = EngineFile(engine.spec, engine.backend, engine.payload + b"!", engine.build, engine.verification)
    assert other_payload.sha256 != engine.sha256


def test_every_cut_is_refused(tmp_path: Path, engine: EngineFile) -> None:
    path = tmp_path / "a.engine"
    engine.write(str(path))
    content = path.read_bytes()
    for size in [*range(0, len(content) - 1, 97), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(EngineError, match=r"a\.engine"):
            read_engine_file(str(path))


def test_every_flipped_byte_is_refused_or_harmless(tmp_path: Path, engine: EngineFile) -> None:
    """Harmless: in the header's free text, which nothing depends on."""
    path = tmp_path / "a.engine"
    engine.write(str(path))
    content = path.read_bytes()
    for i in range(0, len(content), 13):
        path.write_bytes(content[:i] + bytes([content[i] ^ 0x10]) + content[i + 1 :])
        try:
            found = read_engine_file(str(path))
        except EngineError:
            continue
        assert found.payload == engine.payload


def test_a_file_from_the_future(tmp_path: Path, engine: EngineFile, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "a.engine")
    monkeypatch.setattr(engine_file, "FORMAT_VERSION", 7)
    engine.write(path)
    monkeypatch.undo()
    with pytest.raises(EngineError, match="engine format 7, but this singerembed reads 1"):
        read_engine_file(path)


@pytest.mark.parametrize("header", [b"[]", b"{}", b"null", b"\xff\xfe", b'{"spec": {}}', b"[" * 100_000])
def test_hostile_headers(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.engine"
    path.write_bytes(engine_file._PREFIX.pack(engine_file.MAGIC, 1, len(header)) + header)
    with pytest.raises(EngineError, match="damaged"):
        read_engine_file(str(path))


def test_unknown_fields_in_the_spec_are_refused(tmp_path: Path, engine: EngineFile) -> None:
    path = tmp_path / "a.engine"
    engine.write(str(path))
    content = path.read_bytes()
    _, _, size = engine_file._PREFIX.unpack_from(content)
    start = engine_file._PREFIX.size
    header = json.loads(content[start : start + size])
    header["spec"]["new_field"] = 1
    encoded = json.dumps(header).encode()
    path.write_bytes(engine_file._PREFIX.pack(engine_file.MAGIC, 1, len(encoded)) + encoded + content[start + size :])
    with pytest.raises(EngineError, match="new_field"):
        read_engine_file(str(path))


def test_other_files_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"PAR1", b"hello"):
        path = tmp_path / "a.engine"
        path.write_bytes(content)
        with pytest.raises(EngineError, match="not an engine file"):
            read_engine_file(str(path))
    with pytest.raises(EngineError, match="No such file"):
        read_engine_file(str(tmp_path / "none"))


def test_where_it_cannot_be_written(tmp_path: Path, engine: EngineFile) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        engine.write(str(tmp_path / "no" / "folder" / "a.engine"))
