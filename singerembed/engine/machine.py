"""Reports what this machine supports, and what to install for the rest."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

from singerembed.engine.cuda_driver import driver_package
from singerembed.errors import EngineError
from singerembed.model.encoder import available_int8_isas
from singerembed.model.mel import available_isas, require_cuda_kernels


def available_cores(root: Path = Path("/")) -> int:
    """Return the cores this process may use, by its affinity and the limits of its control groups and those above.

    `root`: where `proc` and `sys` lie, for tests.
    """
    cores = len(os.sched_getaffinity(0))
    quotas = [quota for quota in _cgroup_quotas(root) if quota > 0]
    return max(1, min([cores, *map(round, quotas)]))


def _cgroup_quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quotas, in cores, of this process's control groups, versions 1 and 2, from the innermost out."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            inner = PurePosixPath(path.lstrip("/"))
            for group in (inner, *inner.parents):
                with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                    if controllers:
                        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                        quota, period = ((mount / group / name).read_text(encoding="ascii") for name in names)
                    else:
                        quota, period = (mount / group / "cpu.max").read_text(encoding="ascii").split()
                    yield int(quota) / int(period)


@dataclass(frozen=True)
class Finding:
    """One line of the report of `singerembed doctor`."""

    subject: str
    ok: bool
    text: str


def examine() -> list[Finding]:
    """Check processor, codecs, back ends and optional packages."""
    return [
        Finding(
            "singerembed", True, f"{version('singerembed')}, Python {platform.python_version()}, {platform.platform()}"
        ),
        Finding(
            "processor",
            True,
            f"{available_cores()} cores for this process; mel kernels: {', '.join(available_isas())}; "
            f"int8 by {available_int8_isas()[-1]}",
        ),
        _soundfile(),
        _package("PyAV", "av", "m4a, aac and whatever else FFmpeg reads", "av"),
        _package("ONNX Runtime", "onnxruntime", "CPU back end", "onnxruntime"),
        _cuda(),
        _cuda_kernels(),
        _optional("TensorRT", "tensorrt", "GPU back end", "gpu"),
        _optional("TensorRT for RTX", "tensorrt_rtx", "GPU back end for RTX cards", "rtx"),
        _driver_package(),
        _optional("torch", "torch", "build-engine", "build"),
        _optional("torchvision", "torchvision", "build-engine", "build"),
        _optional("onnx", "onnx", "build-engine", "build"),
        _optional("huggingface_hub", "huggingface_hub", "fetching official weights", "build"),
        _optional("fsspec", "fsspec", "s3://, gs://, https:// and more", "remote"),
        _optional("FAISS", "faiss", "index and search above 50,000 vectors", "search", "faiss-cpu"),
        _optional("scikit-learn", "sklearn", "search, verify, cluster, evaluate", "search", "scikit-learn"),
        _optional("duckdb", "duckdb", "search --where", "search"),
        _optional("Starlette", "starlette", "serve", "serve"),
        _optional("uvicorn", "uvicorn", "serve", "serve"),
        _optional("plotly", "plotly", "evaluate and report", "eval"),
        _optional("ray", "ray", "run --ray", "ray"),
    ]


def _cuda_kernels() -> Finding:
    try:
        require_cuda_kernels()
    except EngineError as exc:
        return Finding("CUDA kernels", False, str(exc))
    return Finding("CUDA kernels", True, "compiled in")


def _driver_package() -> Finding:
    used = driver_package()
    if used is None:
        return Finding("driver calls", False, "not installed (GPU memory and streams): pip install 'singerembed[gpu]'")
    other = " (pycuda would be used if it were installed)" if used == "cuda-bindings" else ""
    return Finding("driver calls", True, f"through {used} {version(used)}{other}: GPU memory and streams")


def _soundfile() -> Finding:
    import soundfile

    formats = ", ".join(sorted(soundfile.available_formats()))
    return Finding("soundfile", True, f"libsndfile {soundfile.__libsndfile_version__}: {formats}")


def _package(subject: str, package: str, purpose: str, distribution: str) -> Finding:
    try:
        importlib.import_module(package)
        return Finding(subject, True, f"{version(distribution)}: {purpose}")
    except (ImportError, PackageNotFoundError) as exc:
        return Finding(subject, False, f"{purpose} is missing ({exc}); install singerembed again")


def _optional(subject: str, package: str, purpose: str, extra: str, distribution: str = "") -> Finding:
    try:
        if importlib.util.find_spec(package) is not None:
            return Finding(subject, True, f"{version(distribution or package)}: {purpose}")
    except (ImportError, PackageNotFoundError, ValueError):
        pass
    return Finding(subject, False, f"not installed ({purpose}): pip install 'singerembed[{extra}]'")


def _cuda() -> Finding:
    import ctypes
    import ctypes.util

    name = ctypes.util.find_library("cuda") or "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return Finding("CUDA driver", False, "none found: engines run on the CPU")
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return Finding("CUDA driver", False, "found, but it sees no device")
    return Finding("CUDA driver", True, f"{count.value} device(s)")
