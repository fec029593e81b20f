"""One direction of flow: a room imports only what lies below it, as docs/architecture.md states."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import singerembed

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from import_table import Room, against_levels, depth, import_graph, room_graph, stated_rooms

PACKAGE = Path(__file__).parents[1] / "singerembed"
MODULES_OF_A_RUN = ["singerembed", "singerembed.cli.main", "singerembed.jobs.run", "singerembed.engine.embedder"]
HEAVY = ["matplotlib", "plotly", "scipy", "sklearn", "transformers"]
HEAVY += ["torch", "tensorrt", "tensorrt_rtx", "pycuda", "onnx", "fsspec", "ray", "huggingface_hub", "pandas"]


def test_imports_follow_the_table_of_levels() -> None:
    rooms = room_graph(import_graph(PACKAGE))
    assert rooms["jobs"] >= {"audio", "catalog", "engine", "output"}  # imports are found at all
    assert against_levels(rooms, stated_rooms()) == []


def test_every_room_of_the_table_is_there() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert stated_rooms().keys() == found - {"__init__", "__main__"}


def test_modules_form_no_circle() -> None:
    assert depth(import_graph(PACKAGE)) is not None
    assert depth({"a": {"b"}, "b": {"a"}}) is None


def test_an_import_against_the_levels_is_found() -> None:
    stated = {"low": Room(1, frozenset()), "high": Room(2, frozenset({"low"}))}
    assert against_levels({"high": {"low"}, "low": {"high"}}, stated) == ["low imports high"]
    assert against_levels({}, {**stated, "low": Room(1, frozenset({"high"}))}) != []
    assert against_levels({"new": set()}, stated) == ["new is not in the table of levels"]


@pytest.mark.parametrize("name", sorted(name for name in stated_rooms() if (PACKAGE / name).is_dir()))
def test_every_folder_says_what_it_is_for(name: str) -> None:
    text = (PACKAGE / name / "__init__.py").read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert "import " not in text.split('"""')[2]


@pytest.mark.parametrize("module", MODULES_OF_A_RUN)
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


def test_the_command_starts_without_numpy_and_pyarrow() -> None:
    """Every command's options are read at each start; what takes long to import is imported by what needs it."""
    code = "import sys, singerembed.cli.main; print(sorted({'numpy', 'pyarrow', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
