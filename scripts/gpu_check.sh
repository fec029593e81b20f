#!/usr/bin/env bash
# Checks and times the GPU path on a machine with an NVIDIA GPU: a Linux with its driver, nvcc, a C++ compiler, Python 3.11
# or later with its headers and venv, and torch with torchvision. It starts by saying which of these are missing.
#
#   scripts/gpu_check.sh [--wheels DIR]
#
# It makes a virtual environment in build/gpu-venv, which sees the packages that are installed already (torch, TensorRT),
# and installs what is missing: from the network or, with --wheels, from the folder that scripts/gpu_wheels.sh has filled.
# A step that fails does not end it. The table is printed row by row, and kept in benchmarks/results/; with Nsight Compute
# (ncu) on the PATH, build/ncu-mel.txt says what the mel kernels wait for. The last line says what was proved; the exit code
# is 0 if all of it was, 1 if some was, 2 if no engine ran or something is missing.
set -uo pipefail
usage() { echo "usage: scripts/gpu_check.sh [--wheels DIR]" >&2; exit 2; }
from=()
case $#${1:-} in
    0) ;;
    2--wheels) from=(--no-index --find-links "$(realpath -e "$2")") || exit 2 ;;
    *) usage ;;
esac
cd "$(dirname "$0")/.." || exit 2
root=$PWD

missing=()
need() {  # what, command that succeeds where it is there...
    local what=$1
    shift
    "$@" > /dev/null 2>&1 || missing+=("$what")
}
need "an NVIDIA GPU and its driver" python3 -c 'import ctypes; assert ctypes.CDLL("libcuda.so.1").cuInit(0) == 0'
need "nvcc, on the PATH or as CUDACXX" command -v "${CUDACXX:-nvcc}"
need "a C++ compiler (g++)" command -v "${CXX:-c++}"
need "Python 3.11 or later, as python3" python3 -c 'import sys; assert sys.version_info >= (3, 11)'
need "venv (python3-venv)" python3 -c 'import ensurepip, venv'
need "Python's headers (python3-dev)" \
    python3 -c 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))'
need "torch and torchvision for CUDA" python3 -c 'import torch, torchvision; assert torch.version.cuda'
if [ ${#missing[@]} != 0 ]; then
    printf 'missing: %s\n' "${missing[@]}" >&2
    exit 2
fi

proved=() failed=()
step() {  # name, command...
    local name=$1
    shift
    echo "== $name"
    if "$@"; then proved+=("$name"); else failed+=("$name"); fi
}

install() {
    local outer
    outer=$(python3 -c 'import site; print(*map("import site; site.addsitedir({!r})".format, site.getsitepackages()), sep="\n")')
    python3 -m venv --system-site-packages build/gpu-venv &&
        . build/gpu-venv/bin/activate &&
        # python3 may itself be that of a virtual environment, whose packages the new one would not see.
        echo "$outer" > "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth" &&
        python -m pip install --quiet "${from[@]}" --requirement scripts/gpu_packages.txt &&
        python -m pip install --quiet --no-deps --no-build-isolation -C cmake.define.SINGEREMBED_CUDA=ON \
            -C build-dir=build/gpu-cmake .
}

install_onnxruntime() {  # for CUDA; it takes the place of the one for CPUs, and may be too large to have been brought here
    python -m pip install --quiet "${from[@]}" --no-deps onnxruntime-gpu
}

engines_ran() {  # of the rows that gpu_times.py has printed
    grep -q '^engine ' build/gpu-times.txt
}

mkdir -p build
step "the package with its CUDA kernels" install
step "ONNX Runtime for CUDA" install_onnxruntime
export PYTHONPATH="$root/tests${PYTHONPATH:+:$PYTHONPATH}" SINGEREMBED_REQUIRE_GPU=1
# From another folder, so that the package is the one just installed and not the source tree.
cd tests || exit 2
step "kernels against the CPU" python -m pytest --rootdir="$root" -q gpu/test_mel_cuda.py
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        step "kernels under compute-sanitizer's $tool" compute-sanitizer --tool $tool --error-exitcode 1 \
            python -m pytest --rootdir="$root" -q gpu/test_mel_cuda.py -k 'twin and (1 or 3)'
    done
fi
profile() {  # fails where counters are closed to users, too
    ncu --set full --clock-control none --kernel-name 'regex:(mel|normalise)_kernel' --launch-count 2 \
        python "$root/scripts/mel_once.py" > "$root/build/ncu-mel.txt" 2>&1 &&
        grep -q Duration "$root/build/ncu-mel.txt"
}
command -v ncu > /dev/null && step "a profile of the mel kernels" profile
step "engines against the official pipeline" python -m pytest --rootdir="$root" -q gpu/test_engines_gpu.py
step "a separator against the CPU" python -m pytest --rootdir="$root" -q gpu/test_separator_gpu.py
step "times" bash -o pipefail -c \
    'python "$0/scripts/gpu_times.py" "$0/benchmarks/results" | tee "$0/build/gpu-times.txt"' "$root"
cd "$root" || exit 2

join() { local IFS=';'; echo "${*:-nothing}"; }
echo "proved: $(join "${proved[@]}") - failed: $(join "${failed[@]}")"
engines_ran || exit 2
[ ${#failed[@]} = 0 ]
