"""The engine file: one file with the model spec and the network.

Layout, little-endian: 8 bytes magic, uint32 format version, uint32 header size, header (JSON), payload. The header
holds the payload's size and SHA-256, so that a truncated or altered file is refused before a back end reads it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from singerembed import storage
from singerembed.errors import EngineError, OutputError
from singerembed.model.spec import ModelSpec

# As in PNG: a byte that is not ASCII, and line endings that a transfer in text mode would change.
MAGIC = b"\x89SGR\r\n\x1a\n"
FORMAT_VERSION = 1
_PREFIX = struct.Struct("<8sII")
_MAX_HEADER_BYTES = 1 << 20
_MAX_PAYLOAD_BYTES = 1 << 30
_REBUILD = "Build it again, or copy it again"


@dataclass(frozen=True)
class EngineFile:
    """The contents of an engine file."""

    spec: ModelSpec
    backend: str  # "onnxruntime", "tensorrt" or "tensorrt-rtx"
    payload: bytes  # an ONNX model, or a TensorRT plan
    build: dict[str, Any]  # versions, target device, batch profile, metadata of the checkpoint
    verification: dict[str, Any]  # differences from the FP32 torch encoder, and the input they were measured on

    @property
    def sha256(self) -> str:
        """Hash of spec, back end and payload; build date and versions do not change it."""
        return _identity(self.spec, self.backend, hashlib.sha256(self.payload).hexdigest())

    def write(self, path: str) -> None:
        """Write the engine to `path`, atomically. Raises OutputError."""
        header = {
            "spec": self.spec.to_dict(),
            "backend": self.backend,
            "build": self.build,
            "verification": self.verification,
            "payload_bytes": len(self.payload),
            "payload_sha256": hashlib.sha256(self.payload).hexdigest(),
        }
        encoded = json.dumps(header, indent=1).encode()
        try:
            with storage.publishing(path) as temporary, Path(temporary).open("wb") as file:
                file.write(_PREFIX.pack(MAGIC, FORMAT_VERSION, len(encoded)))
                file.write(encoded)
                file.write(self.payload)
        except OSError as exc:
            raise OutputError(f"cannot write the engine {path}: {exc.strerror or exc}") from exc


def read_engine_file(path: str) -> EngineFile:
    """Read and check an engine file. Raises EngineError with the reason if it is damaged or of another format."""
    try:
        with storage.open_input(path) as file:
            content = file.read(_PREFIX.size + _MAX_HEADER_BYTES + _MAX_PAYLOAD_BYTES + 1)
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


def _parse(path: str, encoded: bytes, payload: bytes) -> EngineFile:
    try:
        header = json.loads(encoded)
        engine = EngineFile(
            ModelSpec.from_dict(header["spec"]),
            str(header["backend"]),
            payload,
            dict(header["build"]),
            dict(header["verification"]),
        )
        size, sha256 = int(header["payload_bytes"]), str(header["payload_sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise EngineError(f"{path} is damaged: its header cannot be read ({exc}). {_REBUILD}") from exc
    if len(payload) != size:
        raise EngineError(f"{path} is damaged: {len(payload)} of {size} bytes of the network are there. {_REBUILD}")
    if hashlib.sha256(payload).hexdigest() != sha256:
        raise EngineError(f"{path} is damaged: the network's checksum does not fit. {_REBUILD}")
    return engine


def _identity(spec: ModelSpec, backend: str, payload_sha256: str) -> str:
    canonical = json.dumps([spec.to_dict(), backend, payload_sha256], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
