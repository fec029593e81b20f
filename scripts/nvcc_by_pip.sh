#!/usr/bin/env bash
# Installs NVIDIA's compiler into a folder, from the package index, and prints its path. No GPU, driver or toolkit is needed.
#
#   CUDACXX=$(scripts/nvcc_by_pip.sh FOLDER) python -m pip wheel .
set -euo pipefail
[ $# = 1 ] && [[ $1 != -* ]] || { echo "usage: scripts/nvcc_by_pip.sh FOLDER" >&2; exit 2; }
folder=$1 version=13.0
python3 -m pip install --quiet --disable-pip-version-check --upgrade --target "$folder" \
    "nvidia-cuda-nvcc==$version.*" "nvidia-cuda-crt==$version.*" "nvidia-nvvm==$version.*" \
    "nvidia-cuda-runtime==$version.*" "nvidia-cuda-cccl==$version.*" >&2
toolkit=$folder/nvidia/cu13
[ -e "$toolkit/lib64" ] || ln -s lib "$toolkit/lib64" # where nvcc looks for the runtime
realpath "$toolkit/bin/nvcc"
