"""Reports registers, spills and shared memory of the CUDA kernels, by compute capability.

Compiles csrc/mel_cuda.cu with nvcc and writes the report of ptxas as JSON. Exits with 1 if a kernel spills registers
beyond what was measured to pay.

    python scripts/cuda_resources.py benchmarks/results/cuda_resources.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1] / "csrc" / "mel_cuda.cu"
NVCC = os.environ.get("CUDACXX", "nvcc")
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
MOST_SPILLED = 8  # bytes, stores and loads: one register of the mel kernel for 9.0 (docs/gpu.md)
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers.*?(\d+) bytes smem")
_KERNEL = re.compile(r"\d(level|mel|normalise|voice)_kernel(?:I([sft]))?")
_VARIANTS = {"s": "int16", "f": "float", "t": "half", None: ""}


def compile_report(architecture: str) -> str:
    """Compile the kernels for sm_`architecture`, and return the report of ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "kernels.cubin")
        options = ["-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin", "-o", target]
        command = [NVCC, *options, str(SOURCE)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def parse(report: str) -> list[dict[str, Any]]:
    """Return one record per kernel of a report."""
    kernels = []
    for entry, body in zip(_ENTRY.finditer(report), _ENTRY.split(report)[3::3], strict=True):
        kernel, spills, used = _KERNEL.search(entry[1]), _SPILLS.search(body), _USED.search(body)
        if not (kernel and spills and used):
            raise ValueError(f"cannot read the report on {entry[1]}: {body}")
        kernels.append(
            {
                "kernel": " ".join(filter(None, (kernel[1], _VARIANTS[kernel[2]]))),
                "compute_capability": f"{entry[2][:-1]}.{entry[2][-1]}",
                "registers": int(used[1]),
                "spill_bytes": int(spills[1]) + int(spills[2]),
                "shared_bytes": int(used[2]),
            }
        )
    return sorted(kernels, key=lambda kernel: str(kernel["kernel"]))


def main() -> int:
    """Write the report, and print kernels that spill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    arguments = parser.parse_args()
    if shutil.which(NVCC) is None:
        raise SystemExit(f"Error: {NVCC} cannot be run. Put nvcc on the PATH, or name it by CUDACXX")
    version = subprocess.run([NVCC, "--version"], check=True, capture_output=True, text=True).stdout
    kernels = [kernel for architecture in ARCHITECTURES for kernel in parse(compile_report(architecture))]
    nvcc = re.search(r"V[\d.]+", version)
    content = {"command": "python scripts/cuda_resources.py", "nvcc": nvcc and nvcc[0], "kernels": kernels}
    arguments.report.write_text(json.dumps(content, indent=1) + "\n")
    spilling = [kernel for kernel in kernels if kernel["spill_bytes"] > MOST_SPILLED]
    for kernel in spilling:
        print(f"spills registers: {kernel}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
