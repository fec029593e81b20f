#!/usr/bin/env bash
# Fills a folder with the wheels that scripts/gpu_check.sh --wheels needs on a machine without network.
#
#   scripts/gpu_wheels.sh DIR [PYTHON_VERSION [PACKAGE...]]
#
# PYTHON_VERSION is that of the machine, 3.12 unless given; PACKAGE is one that is there already beside torch and NumPy,
# such as pyarrow. ONNX Runtime for CUDA is left out, as it is larger than all others together; with its wheel
# (onnxruntime-gpu) in the folder the check measures it too, else that step fails and the others go on.
set -euo pipefail
[ $# -ge 1 ] && [[ $1 != -* ]] && [[ ${2:-3.12} =~ ^3\.[0-9]+$ ]] ||
    { echo "usage: scripts/gpu_wheels.sh DIR [PYTHON_VERSION [PACKAGE...]]" >&2; exit 2; }
mkdir -p "$1"
folder=$(realpath "$1") python=${2:-3.12} there=(numpy "${@:3}")
cd "$(dirname "$0")/.."
python3 -m pip download --quiet --dest "$folder" --only-binary :all: --python-version "$python" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 \
    --requirement scripts/gpu_packages.txt
for package in "${there[@]}"; do rm -f "$folder/${package//-/_}"-[0-9]*.whl; done
du -sh "$folder"
