"""One direction of flow: a module imports only what lies upstream of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import singerembed

ROOT = Path(singerembed.__file__).parent

# Every module and what it may import of this package, at most. `cli` may import anything.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "spec": set(),
    "storage": {"errors"},
    "mel": {"_csrc", "spec"},
    "catalog": {"errors", "storage"},
    "audio": {"errors", "mel", "storage"},
    "av_worker": {"mel"},
    "crops": {"audio", "errors", "mel"},
    "checkpoint": {"errors", "mel", "spec"},
    "engine": set(),
    "engine.base": {"mel", "spec"},
    "engine.file": {"errors", "spec", "storage"},
    "engine.onnxruntime": {"engine.base", "engine.file", "errors", "mel"},
    "engine.torch": {"checkpoint", "engine.base", "mel", "spec"},
    "engine.load": {"engine.base", "engine.file", "engine.onnxruntime", "errors", "mel"},
    "engine.build": {
        "checkpoint", "engine.base", "engine.file", "engine.load", "engine.onnxruntime", "engine.torch", "errors",
        "spec",
    },
    "embedder": {"audio", "engine.base", "engine.load", "mel", "spec"},
    "parquet": {"catalog", "errors"},
    "parts": {"errors", "parquet", "storage"},
    "pipeline": {
        "audio", "catalog", "crops", "engine.base", "engine.file", "engine.load", "errors", "mel", "parquet", "parts",
        "storage",
    },
    "progress": {"catalog", "engine.base", "parquet"},
    "describe": {"checkpoint", "engine.file", "errors", "parts", "storage"},
    "doctor": {"mel", "pipeline"},
}  # fmt: skip
HEAVY = ["torch", "tensorrt", "tensorrt_rtx", "pycuda", "onnx", "fsspec", "ray", "huggingface_hub", "pandas"]


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "singerembed":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("singerembed."):
            names.add(node.module.removeprefix("singerembed."))
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("singerembed.") for a in node.names if a.name.startswith("singerembed.")}
    return names


def test_every_module_is_listed() -> None:
    assert modules().keys() == ALLOWED.keys() | {"cli", "__main__"}


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_imports_point_upstream(name: str) -> None:
    extra = imports_of(modules()[name]) - ALLOWED[name]
    assert not extra, f"{name} must not import {extra}"


def test_the_list_has_no_cycle() -> None:
    done: set[str] = {"_csrc"}
    while len(done) <= len(ALLOWED):
        ready = {name for name, needs in ALLOWED.items() if needs <= done} - done
        assert ready, f"a cycle among {ALLOWED.keys() - done}"
        done |= ready


@pytest.mark.parametrize("module", ["singerembed", "singerembed.cli", "singerembed.pipeline", "singerembed.embedder"])
def test_a_run_needs_no_optional_package(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    for name in singerembed.__all__:
        assert getattr(singerembed, name) is not None
    assert set(singerembed.__all__) == set(singerembed._HOMES)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = singerembed.nothing_of_the_kind
