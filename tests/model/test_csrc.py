"""The C++ core under AddressSanitizer and UndefinedBehaviorSanitizer, without Python in between."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sanitised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the test programs of tests/csrc, built with the sanitizers."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    build = tmp_path_factory.mktemp("sanitised")
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-DSINGEREMBED_SANITIZE=ON", "-DSINGEREMBED_WERROR=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build), "-j2"], check=True, capture_output=True)
    return build


@pytest.mark.parametrize("program", ["test_mel", "test_encoder"])
def test_the_kernels_are_clean_over_extremes(sanitised: Path, program: str) -> None:
    result = subprocess.run([str(sanitised / program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "checks on" in result.stdout
    assert result.stderr == ""
