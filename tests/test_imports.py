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
    "mel": {"_csrc", "errors", "spec"},
    "catalog": {"errors", "storage"},
    "limits": {"errors"},
    "isolation": {"errors", "limits", "mel"},
    "audio": {"errors", "isolation", "limits", "mel", "storage"},
    "decode_worker": {"audio", "errors", "limits", "mel"},
    "crops": {"audio", "errors", "mel"},
    "checkpoint": {"errors", "mel", "spec"},
    "engine": set(),
    "engine.base": {"mel", "spec"},
    "engine.file": {"errors", "spec", "storage"},
    "engine.onnxruntime": {"engine.base", "engine.file", "errors", "mel"},
    "engine.torch": {"checkpoint", "engine.base", "mel", "spec"},
    "engine.device": {"spec"},
    "engine.ring": {"engine.device", "errors", "mel"},
    "engine.gpu_worker": {"engine.device", "engine.ring", "errors", "mel", "spec"},
    "engine.gpu": {"engine.base", "engine.device", "engine.gpu_worker", "engine.ring", "errors", "mel", "spec"},
    "engine.cuda_driver": {"_csrc", "engine.device", "errors", "mel", "spec"},
    "engine.onnxruntime_cuda": {
        "engine.cuda_driver", "engine.device", "engine.file", "engine.gpu", "engine.onnxruntime", "errors", "mel",
        "spec",
    },
    "engine.tensorrt": {
        "engine.cuda_driver", "engine.device", "engine.file", "engine.gpu", "engine.onnxruntime", "errors", "mel",
        "spec",
    },
    "engine.tensorrt_build": {
        "engine.cuda_driver", "engine.onnxruntime", "engine.tensorrt", "errors", "spec", "storage",
    },
    "engine.precision": {"errors"},
    "engine.load": {
        "engine", "engine.base", "engine.file", "engine.onnxruntime", "engine.onnxruntime_cuda", "engine.tensorrt",
        "errors", "mel",
    },
    "engine.build": {
        "checkpoint", "engine.base", "engine.file", "engine.load", "engine.onnxruntime", "engine.precision",
        "engine.tensorrt", "engine.tensorrt_build", "engine.torch", "errors", "spec",
    },
    "embedder": {"limits", "engine.base", "engine.load", "mel", "spec"},
    "options": {"catalog", "limits", "mel"},
    "parquet": {"catalog", "errors"},
    "embedding": {"audio", "catalog", "crops", "engine.base", "errors", "limits", "mel", "options", "parquet"},
    "ordered": set(),
    "journal": set(),
    "lock": {"errors", "storage"},
    "index": {"parquet"},
    "dataset": {"index", "parquet", "storage"},
    "previous": {"dataset", "errors", "index", "parquet", "storage"},
    "parts": {"dataset", "errors", "index", "journal", "lock", "parquet", "previous", "storage"},
    "units": {
        "catalog", "embedding", "engine.file", "engine.load", "journal", "options", "ordered", "parquet", "parts",
        "previous", "spec",
    },
    "orders": {"catalog", "errors"},
    "cluster_worker": {
        "catalog", "engine.file", "errors", "journal", "options", "parquet", "parts", "previous", "spec", "units",
    },
    "cluster": {
        "catalog", "cluster_worker", "embedding", "errors", "orders", "parquet", "parts", "units",
    },
    "devices": {"catalog", "engine.load", "errors", "parquet", "parts", "spec", "units"},
    "pipeline": {
        "catalog", "cluster", "cluster_worker", "devices", "engine.file", "engine.load", "errors", "options",
        "parquet", "parts", "previous", "storage", "units",
    },
    "progress": {"catalog", "parquet", "spec", "storage"},
    "runlog": {"catalog", "errors", "parquet", "spec", "storage"},
    "supervisor": set(),
    "describe": {"checkpoint", "dataset", "engine.file", "errors", "parts", "previous", "storage"},
    "console": set(),
    "evaluation.commands": {
        "console", "errors", "evaluation.baselines.load", "evaluation.data", "evaluation.result", "evaluation.run",
        "evaluation.table", "evaluation.write",
    },
    "doctor": {"errors", "mel", "units"},
    # Only `evaluate` and `report` of the command line import what follows.
    "evaluation": set(),
    "evaluation.metrics": set(),
    "evaluation.pairs": {"errors", "evaluation.metrics"},
    "evaluation.data": {"catalog", "dataset", "errors", "parquet", "storage"},
    "evaluation.baselines": set(),
    "evaluation.baselines.base": {"errors"},
    "evaluation.baselines.mfcc": {"evaluation.baselines.base", "mel", "spec"},
    "evaluation.baselines.ge2e": {"evaluation.baselines.base"},
    "evaluation.baselines.voxceleb": {"errors", "evaluation.baselines.base", "storage"},
    "evaluation.baselines.hub": {"errors", "evaluation.baselines.base"},
    "evaluation.baselines.encoders": {
        "checkpoint", "engine.base", "engine.load", "engine.torch", "evaluation.baselines.base", "mel", "spec",
    },
    "evaluation.baselines.load": {
        "checkpoint", "engine.file", "errors", "evaluation.baselines.base", "evaluation.baselines.encoders",
        "evaluation.baselines.ge2e", "evaluation.baselines.hub", "evaluation.baselines.mfcc",
        "evaluation.baselines.voxceleb",
    },
    "evaluation.embed": {
        "audio", "crops", "errors", "evaluation.baselines.base", "evaluation.data", "evaluation.metrics", "limits",
        "mel",
    },
    "evaluation.probe": {"evaluation.baselines.base", "evaluation.metrics"},
    "evaluation.geometry": {"evaluation.baselines.base", "evaluation.metrics"},
    "evaluation.result": {
        "evaluation.data", "evaluation.embed", "evaluation.metrics", "evaluation.pairs", "evaluation.probe", "mel",
    },
    "evaluation.measure": {
        "errors", "evaluation.embed", "evaluation.metrics", "evaluation.pairs", "evaluation.probe",
        "evaluation.result",
    },
    "evaluation.run": {
        "errors", "evaluation.baselines.base", "evaluation.data", "evaluation.embed", "evaluation.measure",
        "evaluation.pairs", "evaluation.result",
    },
    "evaluation.table": {"evaluation.result"},
    "evaluation.views": {"evaluation.geometry", "evaluation.metrics", "evaluation.result"},
    "evaluation.figures": {"evaluation.baselines.base", "evaluation.result", "evaluation.views"},
    "evaluation.page": {
        "evaluation.baselines.base", "evaluation.metrics", "evaluation.result", "evaluation.table",
        "evaluation.views",
    },
    "evaluation.write": {
        "errors", "evaluation.figures", "evaluation.page", "evaluation.pairs", "evaluation.result",
        "evaluation.table", "evaluation.views", "storage",
    },
}  # fmt: skip
HEAVY = ["matplotlib", "plotly", "scipy", "sklearn", "transformers"]
HEAVY += ["torch", "tensorrt", "tensorrt_rtx", "pycuda", "onnx", "fsspec", "ray", "huggingface_hub", "pandas"]


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
