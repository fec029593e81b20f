"""Builds an engine file from a checkpoint: fold batch norms, export, verify, write. Needs torch and onnx."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from singerembed.engine.base import Engine
from singerembed.engine.file import EngineFile
from singerembed.engine.load import PORTABLE_BACKENDS, open_engine
from singerembed.engine.native import has_kernels, times_as_fast
from singerembed.engine.onnxruntime import OnnxRuntimeEngine
from singerembed.engine.onnxruntime_cuda import is_usable as uses_onnxruntime_gpu
from singerembed.engine.precision import to_fp16
from singerembed.engine.tensorrt import LIBRARIES, TENSORRT_RTX, cuda_devices, usable_library
from singerembed.engine.tensorrt_build import PlanOptions, build_plan, facts_entry
from singerembed.errors import EngineError, MissingDependencyError, OutputError, UsageError
from singerembed.model.checkpoint import Checkpoint, load_checkpoint, parameter_count
from singerembed.model.spec import ModelSpec

if TYPE_CHECKING:
    from singerembed.engine.torch import EncoderNet

BACKENDS = (*PORTABLE_BACKENDS, *LIBRARIES)
PRECISIONS = ("fp32", "fp16", "int8")
_OPSET = 18
_VERIFY_CROPS = 16
_TRIAL_CROPS = 4
_WORTH_IT = 1.1  # times as fast as ONNX Runtime: with less, the library that everybody tests is the better choice


@dataclass(frozen=True)
class Tolerance:
    """Allowed difference between an engine and the FP32 torch encoder."""

    cosine: float  # at least
    difference: float  # at most; largest absolute difference, divided by the norm of the expected embedding


# FP32 engines differ by rounding only: independent implementations reach 2.5e-6. FP16 has 11 bits, over 81
# convolutions. INT8 has 8 in the 1 x 1 convolutions: on tones and noises, of which these
# crops are, trained weights reach 0.9965 and more, on voices 0.9992 (docs/performance.md).
TOLERANCES = {
    "fp32": Tolerance(0.999999, 1e-3),
    "fp16": Tolerance(0.9995, 3e-2),
    "int8": Tolerance(0.99, 5e-2),
}


@dataclass(frozen=True)
class BuildOptions:
    """Options of `build_engine`."""

    backend: str = "auto"
    normalise: str | float | None = None  # None: as in the checkpoint's spec
    precision: str = "auto"  # "fp16" with TensorRT, else "fp32"; "int8" makes an engine for the native back end
    plan: PlanOptions = field(default_factory=PlanOptions)  # for TensorRT


def build_engine(
    source: str,
    output: str,
    options: BuildOptions | None = None,
    *,
    force: bool = False,
    say: Callable[[str, str], None] = lambda _what, _text: None,
) -> EngineFile:
    """Build an engine from the checkpoint `source` and write it to `output`.

    `say(what, text)` is called after each step. Raises CheckpointError, UsageError, MissingDependencyError, OutputError
    if `output` exists without `force`, and EngineError if the engine differs from the FP32 torch encoder by more than
    TOLERANCES.
    """
    options = options or BuildOptions()
    if Path(output).exists() and not force:
        raise OutputError(f"{output} exists. Give another name with -o, or --force to replace it")
    backend = _choose_backend(options.backend, options.precision)
    precision = _choose_precision(options.precision, backend)
    checkpoint = load_checkpoint(source)
    if options.normalise is not None:
        checkpoint = replace(checkpoint, spec=replace(checkpoint.spec, normalise=options.normalise))
    spec = replace(checkpoint.spec, precision=precision)
    n_parameters = parameter_count(checkpoint.state_dict)
    say(
        "checkpoint",
        f"{source}: {checkpoint.layout}, {spec.method}, {n_parameters:,} parameters, sha256 {spec.weights_sha256[:12]}",
    )
    model = export_onnx(checkpoint)
    if backend == "auto":
        backend = _faster_on_this_cpu(EngineFile(spec, "onnxruntime", model, {}, {}), say)
    say("target", f"{backend}, {precision}")
    network = EngineFile(
        spec=spec,
        backend="onnxruntime",
        payload=to_fp16(model) if precision == "fp16" else model,
        build={
            "checkpoint": Path(source).name if Path(source).exists() else source,
            "layout": checkpoint.layout,
            "training": checkpoint.facts,
            "versions": {name: version(name) for name in ("singerembed", "torch", "torchvision", "onnx")},
        },
        verification={},
    )
    portable = backend in PORTABLE_BACKENDS
    engine = replace(network, backend=backend) if portable else _as_plan(network, backend, options.plan)
    engine = replace(engine, verification=_verify(checkpoint, *_verifiable(engine, network, options.plan.device), say))
    engine.write(output)
    say("wrote", f"{output} ({Path(output).stat().st_size / 1e6:.1f} MB)")
    return engine


def _choose_backend(wanted: str, precision: str) -> str:
    """Return the back end to build for, or "auto" where only a trial on this CPU can tell."""
    if wanted == "auto" and precision == "int8":
        return "native"
    if wanted == "auto":
        library = usable_library()
        return library.backend if library else "auto"
    if wanted not in BACKENDS:
        raise UsageError(f"unknown back end {wanted!r}; there are: auto, {', '.join(BACKENDS)}")
    return wanted


def _choose_precision(wanted: str, backend: str) -> str:
    if wanted == "auto":
        return "fp16" if backend in LIBRARIES else "fp32"
    if wanted not in PRECISIONS:
        raise UsageError(f"unknown precision {wanted!r}; there are: auto, {', '.join(PRECISIONS)}")
    if wanted == "int8" and backend != "native":
        raise UsageError(f"{backend} does not compute in int8 here: leave --backend out, or take --backend native")
    if wanted == "fp16" and backend == "native":
        raise UsageError(
            "the native back end computes in fp32 or int8: leave --precision out, or take --backend onnxruntime"
        )
    return wanted


def _faster_on_this_cpu(network: EngineFile, say: Callable[[str, str], None]) -> str:
    """Return "native" where that embeds crops faster than ONNX Runtime by enough, else "onnxruntime"."""
    if network.spec.precision != "fp32" or uses_onnxruntime_gpu() or not has_kernels():
        return "onnxruntime"
    ratio = times_as_fast(network, verification_crops(network.spec)[:_TRIAL_CROPS])
    say("trial", f"native is {ratio:.2f} times as fast as ONNX Runtime here; {_WORTH_IT} are asked for")
    return "native" if ratio >= _WORTH_IT else "onnxruntime"


def _as_plan(network: EngineFile, backend: str, options: PlanOptions) -> EngineFile:
    plan, facts = build_plan(network.payload, network.spec, LIBRARIES[backend], options)
    return replace(network, backend=backend, payload=plan, build=network.build | facts_entry(facts))


def _verifiable(engine: EngineFile, network: EngineFile, device: int) -> tuple[Engine, str]:
    """Return the engine to verify, and its name: its network on the CPU if the plan cannot run on this machine."""
    if engine.backend == TENSORRT_RTX.backend and not cuda_devices():
        return OnnxRuntimeEngine(network), "its network on the CPU (no GPU here to run the plan)"
    return open_engine(engine, device=device), "the engine"


# --- export ---------------------------------------------------------------------------------------------------------


def export_onnx(checkpoint: Checkpoint) -> bytes:
    """Export the encoder to ONNX, batch norms folded: log_mel [batch, n_mels, n_frames] -> embedding [batch, dim]."""
    try:
        import onnx  # noqa: F401  (torch's exporter needs it)
        import torch

        from singerembed.engine.torch import load_encoder
    except ImportError as exc:
        raise MissingDependencyError("building an engine", exc.name or "torch", "build") from exc
    from singerembed.engine.onnxruntime import INPUT_NAME, OUTPUT_NAME

    encoder = fold_batch_norm(load_encoder(checkpoint))
    example = torch.zeros(1, checkpoint.spec.n_mels, checkpoint.spec.n_frames)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.onnx"
        warnings.simplefilter("ignore")  # the exporter warns that it is deprecated
        torch.onnx.export(
            encoder,
            (example,),
            path,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_axes={INPUT_NAME: {0: "batch"}, OUTPUT_NAME: {0: "batch"}},
            opset_version=_OPSET,
            dynamo=False,  # keeps GlobalAveragePool, which ONNX Runtime has in its blocked layout, unlike ReduceMean
        )
        return path.read_bytes()


def fold_batch_norm(encoder: EncoderNet) -> EncoderNet:
    """Return a copy of `encoder` with each batch norm folded into the convolution before it, computed in float64."""
    import torch
    from torch.nn.utils.fusion import fuse_conv_bn_eval
    from torchvision.ops.misc import Conv2dNormActivation

    folded = copy.deepcopy(encoder)
    for module in folded.modules():
        if isinstance(module, Conv2dNormActivation) and isinstance(module[1], torch.nn.BatchNorm2d):
            convolution: torch.nn.Conv2d = module[0]
            module[0] = fuse_conv_bn_eval(convolution.double(), module[1].double()).float()
            module[1] = torch.nn.Identity()
    return folded


# --- verification ---------------------------------------------------------------------------------------------------


def verification_crops(spec: ModelSpec) -> NDArray[np.float32]:
    """Return crops to compare engines on, [16, crop_samples]: tones from bass to soprano, noises, a sawtooth.

    There is no single click: its log-mel maximum is nearly 0, and division by it (as in the official pipeline)
    magnifies rounding without bound.
    """
    rng = np.random.default_rng(0)
    t = np.arange(spec.crop_samples) / spec.sample_rate
    crops = []
    for i in range(_VERIFY_CROPS - 4):
        f0 = 80.0 * 2 ** (i / 3)
        phase = 2 * np.pi * np.cumsum(f0 * (1 + 0.02 * np.sin(2 * np.pi * 5.5 * t))) / spec.sample_rate
        partials = range(1, max(2, min(40, int(8000 / f0))))
        tone = sum(np.sin(k * phase) / (k ** (0.6 + 0.1 * i)) for k in partials)
        crops.append(tone * (0.2 + np.abs(np.sin(2 * np.pi * 0.3 * t + i))) + 0.003 * rng.standard_normal(t.size))
    crops.append(rng.standard_normal(t.size))
    crops.append(np.cumsum(rng.standard_normal(t.size)))
    crops.append(2 * (t * 300 % 1) - 1)
    crops.append(np.where(t < 1.5, crops[0], 1e-4 * rng.standard_normal(t.size)))
    return np.stack([crop / np.abs(crop).max() * 0.9 for crop in crops]).astype(np.float32)


def compare(embedding: NDArray[np.float32], expected: NDArray[np.float32]) -> Tolerance:
    """Return the smallest cosine, and the largest difference divided by the expected norm, over rows [n, dim]."""
    a, b = embedding.astype(np.float64), expected.astype(np.float64)
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / (norm_a * norm_b)
    return Tolerance(float(cosine.min()), float((np.abs(a - b).max(axis=1) / norm_b).max()))


def _batches_to_verify(engine: Engine) -> list[NDArray[np.int64]]:
    """Which crops to embed together: all; on a device also as many as fill batches, and more than that.

    There a batch runs as it is the first time, and from a captured graph from then on.
    """
    full = 4 * engine.batch
    sizes = [_VERIFY_CROPS, *([full, full, full, full + 3, full + 3] if engine.waits else [])]
    return [np.arange(size) % _VERIFY_CROPS for size in sizes]


def _verify(checkpoint: Checkpoint, engine: Engine, what: str, say: Callable[[str, str], None]) -> dict[str, object]:
    from singerembed.engine.torch import TorchEngine

    crops = verification_crops(checkpoint.spec)
    expected = TorchEngine(checkpoint).embed(crops).embedding
    embedded = [engine.embed(crops[which]).embedding for which in _batches_to_verify(engine)]
    reached = compare(np.concatenate(embedded), expected[np.concatenate(_batches_to_verify(engine))])
    engine.close()
    allowed = TOLERANCES[engine.spec.precision]
    say(
        "verify",
        f"{what}, {len(crops)} crops against FP32 torch: cosine >= {reached.cosine:.7f}, "
        f"largest difference {reached.difference:.1e} of the norm",
    )
    if not (reached.cosine >= allowed.cosine and reached.difference <= allowed.difference):
        raise EngineError(
            f"the engine is too far from the FP32 torch encoder: "
            f"cosine {reached.cosine:.6f} (at least {allowed.cosine}), "
            f"difference {reached.difference:.1e} (at most {allowed.difference:.0e}). Nothing was written"
        )
    figures = {"cosine": reached.cosine, "difference": reached.difference}
    return {"what": what, "crops": len(crops), "against": "FP32 torch", **figures}
