"""The version is written once, in pyproject.toml, and everything else asks for it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import singerembed

ROOT = Path(__file__).parents[1]


def test_version_is_that_of_the_installed_package() -> None:
    assert singerembed.__version__ == version("singerembed")


def test_version_is_that_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert singerembed.__version__ == project["version"], "the number was changed after pip install: give that again"


def test_import_does_not_load_the_metadata_reader() -> None:
    code = "import sys; before = 'importlib.metadata' in sys.modules; import singerembed; "
    code += "print(before or 'importlib.metadata' not in sys.modules); print(singerembed.__version__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", version("singerembed")]


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(singerembed.__file__).parent / "py.typed").is_file()
