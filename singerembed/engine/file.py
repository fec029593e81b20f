"""The engine file: one file with a spec and a network, of an encoder or of a separator.

Layout, little-endian: 8 bytes magic, uint32 format version, uint32 header size, header (JSON), payload. The header
holds the payload's size and SHA-256, so that a truncated or altered file is refused before a back end reads it. Its
`kind` is "separator"; a header without one is an encoder's.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from singerembed import storage
from singerembed.errors import EngineError
from singerembed.model.separator_spec import SeparatorSpec
from singerembed.model.spec import ModelSpec

# As in PNG: a byte that is not ASCII, and line endings that a transfer in text mode would change.
MAGIC = b"\x89SGR\r\n\x1a\n"
FORMAT_VERSION = 1
_PREFIX = struct.Struct("<8sII")
_MAX_HEADER_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 1 << 30
SEPARATOR = "separator"
_REBUILD = "Build it again, or copy it again"


SpecT = TypeVar("SpecT", ModelSpec, SeparatorSpec)


@dataclass(frozen=True)
class StoredNetwork(Generic[SpecT]):
    """The contents of an engine file."""

    spec: SpecT
    backend: str  # "onnxruntime", "native", "tensorrt" or "tensorrt-rtx"
    payload: bytes  # an ONNX model, or a TensorRT plan
    build: dict[str, Any]  # versions, target device, batch profile, metadata of the checkpoint
    verification: dict[str, Any]  # differences from the reference in torch, and the input they were measured on

    @property
    def sha256(self) -> str:
        """Hash of spec, back end and payload; build date and versions do not change it."""
        return _identity(self.spec, self.backend, hashlib.sha256(self.payload).hexdigest())

    def write(self, path: str) -> None:
        """Write the engine to `path`, atomically. Raises OutputError."""
        kind: dict[str, str] = {"kind": SEPARATOR} if isinstance(self.spec, SeparatorSpec) else {}
        header = {
            **kind,
            "spec": self.spec.to_dict(),
            "backend": self.backend,
            "build": self.build,
            "verification": self.verification,
            "payload_bytes": len(self.payload),
            "payload_sha256": hashlib.sha256(self.payload).hexdigest(),
        }
        encoded = json.dumps(header, indent=1).encode()
        with (
            storage.writing(f"the engine {path}"),
            storage.publishing(path) as temporary,
            Path(temporary).open("wb") as file,
        ):
            file.write(_PREFIX.pack(MAGIC, FORMAT_VERSION, len(encoded)))
            file.write(encoded)
            file.write(self.payload)


EngineFile = StoredNetwork[ModelSpec]
SeparatorFile = StoredNetwork[SeparatorSpec]


def read_engine_file(path: str) -> EngineFile:
    """Read and check an encoder's engine file. Raises EngineError with the reason if it is not one, or damaged."""
    file = read_any_engine_file(path)
    if isinstance(file.spec, SeparatorSpec):
        raise EngineError(f"{path} is a separator, not an encoder. Give it to run as --separate {path}")
    return file


def read_separator_file(path: str) -> SeparatorFile:
    """Read and check a separator's engine file. Raises EngineError with the reason if it is not one, or damaged."""
    file = read_any_engine_file(path)
    if isinstance(file.spec, ModelSpec):
        raise EngineError(f"{path} is an encoder, not a separator. Make one with: singerembed build-engine spleeter")
    return file


def read_any_engine_file(path: str) -> EngineFile | SeparatorFile:
    """Read and check an engine file of either kind. Raises EngineError with the reason if it is damaged or foreign."""
    try:
        with storage.open_input(path) as file:
            content = file.read(_PREFIX.size + _MAX_HEADER_BYTES + MAX_PAYLOAD_BYTES + 1)
    except OSError as exc:
        raise EngineError(f"cannot read the engine {path}: {exc.strerror or exc}") from exc
    if not is_engine(content):
        raise EngineError(f"{path} is not an engine file. Make one with: singerembed build-engine CHECKPOINT")
    if len(content) < _PREFIX.size:
        raise EngineError(f"{path} is cut short. {_REBUILD}")
    _, version, header_size = _PREFIX.unpack_from(content)
    if version != FORMAT_VERSION:
        raise EngineError(
            f"{path}: engine format {version}, but this singerembed reads {FORMAT_VERSION}. "
            "Upgrade singerembed, or build the engine again from its checkpoint"
        )
    header_end = _PREFIX.size + header_size
    if header_size > _MAX_HEADER_BYTES or header_end > len(content):
        raise EngineError(f"{path} is damaged: its header is truncated. {_REBUILD}")
    return _parse(path, content[_PREFIX.size : header_end], content[header_end:])


def is_engine(content: bytes) -> bool:
    """Return whether a file that begins with `content` is an engine."""
    return content.startswith(MAGIC)


def _parse(path: str, encoded: bytes, payload: bytes) -> EngineFile | SeparatorFile:
    try:
        header = json.loads(encoded)
        rest = str(header["backend"]), payload, dict(header["build"]), dict(header["verification"])
        engine: EngineFile | SeparatorFile
        if header.get("kind") == SEPARATOR:
            engine = SeparatorFile(SeparatorSpec.from_dict(header["spec"]), *rest)
        else:
            engine = EngineFile(ModelSpec.from_dict(header["spec"]), *rest)
        size, sha256 = int(header["payload_bytes"]), str(header["payload_sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise EngineError(f"{path} is damaged: its header cannot be read ({exc}). {_REBUILD}") from exc
    if len(payload) != size:
        raise EngineError(f"{path} is damaged: {len(payload)} of {size} bytes of the network are there. {_REBUILD}")
    if hashlib.sha256(payload).hexdigest() != sha256:
        raise EngineError(f"{path} is damaged: the network's checksum does not fit. {_REBUILD}")
    return engine


def _identity(spec: ModelSpec | SeparatorSpec, backend: str, payload_sha256: str) -> str:
    canonical = json.dumps([spec.to_dict(), backend, payload_sha256], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
