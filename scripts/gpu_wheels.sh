#!/usr/bin/env bash
# Fills a folder with the wheels that scripts/gpu_check.sh --wheels needs on a machine without network that has torch,
# torchvision, numpy and nvcc.
#
#   scripts/gpu_wheels.sh DIR [PYTHON_VERSION [PACKAGE...]]
#
# PYTHON_VERSION is that of the machine, 3.12 unless given; PACKAGE is one that is there already, such as pyarrow.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 python=${2:-3.12} there=(numpy "${@:3}")
mkdir -p "$folder"
required=$(python3 - <<'END'
import tomllib
from pathlib import Path
print("\n".join(tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]))
END
)
mapfile -t packages <<< "$required"
python3 -m pip download --quiet --dest "$folder" --only-binary :all: --python-version "$python" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 \
    "${packages[@]}" scikit-build-core nanobind cmake ninja pytest hypothesis 'cuda-bindings>=12.8'
for package in "${there[@]}"; do rm -f "$folder/${package//-/_}"-*; done
du -sh "$folder"
