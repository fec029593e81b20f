#!/usr/bin/env bash
# Checks and times the GPU path on a machine with an NVIDIA GPU: a bare Ubuntu with a driver, python3 and nvcc will do.
#
#   scripts/gpu_check.sh [--wheels DIR]
#
# It makes a virtual environment in build/gpu-venv, which sees the packages that are installed already (torch, TensorRT),
# and installs what is missing: from the network or, with --wheels, from the folder that scripts/gpu_wheels.sh has filled.
# A step that fails does not end it. The table is printed row by row, and kept in benchmarks/results/. The last line says
# what was proved; the exit code is 0 if all of it was, 1 if some was, 2 if no engine ran.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
root=$PWD
from=()
[ "${1:-}" = --wheels ] && from=(--no-index --find-links "$(realpath "$2")")

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
        python -m pip install --quiet "${from[@]}" scikit-build-core nanobind cmake ninja &&
        python -m pip install --quiet "${from[@]}" --no-build-isolation -C cmake.define.SINGEREMBED_CUDA=ON \
            -C build-dir=build/gpu-cmake . &&
        python -m pip install --quiet "${from[@]}" pytest hypothesis onnx 'cuda-bindings>=12.8'
}

install_onnxruntime() {  # for CUDA; it takes the place of the one for CPUs
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
step "engines against the official pipeline" python -m pytest --rootdir="$root" -q gpu/test_engines_gpu.py
step "a separator against the CPU" python -m pytest --rootdir="$root" -q gpu/test_separator_gpu.py
step "times" bash -o pipefail -c \
    'python "$0/scripts/gpu_times.py" "$0/benchmarks/results" | tee "$0/build/gpu-times.txt"' "$root"
cd "$root" || exit 2

join() { local IFS=';'; echo "${*:-nothing}"; }
echo "proved: $(join "${proved[@]}") - failed: $(join "${failed[@]}")"
engines_ran || exit 2
[ ${#failed[@]} = 0 ]
