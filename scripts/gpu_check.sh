#!/usr/bin/env bash
# Checks and times the GPU path on a machine with an NVIDIA GPU. Needs no network: what is to be compared must be
# installed (pip install '.[dev,gpu,rtx]', or onnxruntime-gpu; torchaudio to compare with), and nvcc on the PATH.
#
#   scripts/gpu_check.sh            builds the extension into build/gpu, tests, times, prints one table
set -euo pipefail
cd "$(dirname "$0")/.."

python -m pip install --quiet --no-index --no-deps --no-build-isolation --upgrade --target build/gpu \
    -C cmake.define.SINGEREMBED_CUDA=ON -C build-dir=build/gpu-cmake .
export PYTHONPATH="$PWD/build/gpu:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export SINGEREMBED_REQUIRE_GPU=1

# From another folder, so that the package is the one just built and not the source tree.
root=$PWD
cd tests
python -m pytest --rootdir="$root" -q gpu model/test_mel_cuda_emulated.py
python "$root/scripts/cuda_resources.py" "$root/benchmarks/results/cuda_resources.json"
python "$root/scripts/gpu_times.py" "$root/benchmarks/results"
