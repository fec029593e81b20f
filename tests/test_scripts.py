"""The scripts for machines with a GPU, as far as they go without one."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from gpu_times import Table, row

ROOT = Path(__file__).parents[1]


def test_the_check_installs_what_the_package_needs() -> None:
    lines = (ROOT / "scripts" / "gpu_packages.txt").read_text(encoding="utf-8").splitlines()
    listed = {line for line in lines if not line.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {*project["project"]["dependencies"], *project["build-system"]["requires"]} - listed == {"av>=14"}


@pytest.mark.parametrize(
    "command",
    [
        ["gpu_check.sh", "--wheel", "here"],
        ["gpu_check.sh", "--wheels"],
        ["gpu_wheels.sh"],
        ["gpu_wheels.sh", "here", "--help"],
        ["nvcc_by_pip.sh"],
        ["check_wheel.sh", "--help"],
    ],
    ids=" ".join,
)
def test_what_a_script_does_not_know_is_refused(command: list[str], tmp_path: Path) -> None:
    name, *arguments = command
    found = subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert found.stderr.startswith(f"usage: scripts/{name}")
    assert not list(tmp_path.iterdir())


def test_a_table_is_named_after_the_gpu_and_not_after_its_number(tmp_path: Path) -> None:
    device: Any = SimpleNamespace(
        name="NVIDIA H200 (3)", compute_capability=(9, 0), attribute=dict.fromkeys(_ATTRIBUTES, 1).__getitem__
    )
    Table(device, tmp_path).add(row("a kernel", [0.5, 1.0, 0.25], 10))
    (one,) = json.loads((tmp_path / "gpu-nvidia-h200.json").read_text(encoding="utf-8"))["rows"]
    assert one["crops_per_second"] == {"median": 20, "low": 10, "high": 40}


_ATTRIBUTES = ("MULTIPROCESSOR_COUNT", "CLOCK_RATE", "MEMORY_CLOCK_RATE", "GLOBAL_MEMORY_BUS_WIDTH")


def test_one_measurement_has_no_spread() -> None:
    assert row("a job", [2.0], 10).crops_per_second.text() == "5"
    assert row("a job", [1.0, 2.0, 5.0], 10).crops_per_second.text() == "5 (2 to 10)"
