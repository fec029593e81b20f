"""Builds TensorRT plans from the encoder's ONNX model. TensorRT needs a GPU for it, TensorRT for RTX does not."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from singerembed import storage
from singerembed.engine.onnxruntime import INPUT_NAME, OUTPUT_NAME
from singerembed.engine.tensorrt import TENSORRT_RTX, Library, PlanFacts, create, load_library, make_log
from singerembed.errors import EngineError, UsageError
from singerembed.model.spec import ModelSpec

# RTX 30, 40 and 50. TensorRT for RTX finishes the compilation on the GPU that runs the plan.
RTX_COMPUTE_CAPABILITIES = ("8.6", "8.9", "12.0")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of a plan."""

    max_batch: int = 64  # crops; a larger batch is no faster on larger GPUs, and all buffers have this size
    device: int = 0  # CUDA device to build on and for; TensorRT for RTX uses none
    hardware_compatible: bool = False  # for any GPU from Ampere on, at some cost in speed; TensorRT only
    version_compatible: bool = False  # also for later versions, at some cost in speed; TensorRT only


def build_plan(model: bytes, spec: ModelSpec, library: Library, options: PlanOptions) -> tuple[bytes, PlanFacts]:
    """Build a plan for batches of 1 to `options.max_batch` from the ONNX `model`, in the precision of its types.

    Raises UsageError for options that the library does not have, MissingDependencyError, and EngineError with the
    library's own message.
    """
    if options.max_batch < 1:
        raise UsageError(f"--max-batch must be at least 1, not {options.max_batch}")
    rtx = library is TENSORRT_RTX
    if rtx and (options.hardware_compatible or options.version_compatible):
        raise UsageError(
            f"{library.title} plans are for RTX 30 and newer as they are, and for one version of the library"
        )
    trt = load_library(library)
    with contextlib.nullcontext(RTX_COMPUTE_CAPABILITIES) if rtx else _gpu(options.device) as compute_capabilities:
        facts = PlanFacts(
            version=trt.__version__,
            compute_capabilities=compute_capabilities,
            hardware_compatible=options.hardware_compatible,
            version_compatible=options.version_compatible,
            max_batch=options.max_batch,
        )
        return _build(trt, library, model, spec, facts), facts


def _build(trt: Any, library: Library, model: bytes, spec: ModelSpec, facts: PlanFacts) -> bytes:
    log = make_log(trt)
    builder = create(trt.Builder, log, library)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise EngineError(f"{library.title} cannot read the network: {reasons}")
    check_network(trt, network, spec)
    config = _configure(trt, builder, spec, facts)
    if library is TENSORRT_RTX:
        _set_targets(trt, config, facts.compute_capabilities)
        plan = builder.build_serialized_network(network, config)
    else:
        with _timing_cache(config, _timing_cache_path(facts)):
            plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{library.title} could not build the engine: {log.taken()}")
    return bytes(plan)


def check_network(trt: Any, network: Any, spec: ModelSpec) -> None:
    """Raise EngineError unless the tensors and convolutions of `network` have the shapes and types of `spec`."""
    found = {
        tensor.name: (tensor.dtype, tuple(tensor.shape))
        for tensor in (
            *(network.get_input(i) for i in range(network.num_inputs)),
            *(network.get_output(i) for i in range(network.num_outputs)),
        )
    }
    types = {"fp16": trt.float16, "fp32": trt.float32}
    expected = {
        INPUT_NAME: (trt.float32, (-1, spec.n_mels, spec.n_frames)),
        OUTPUT_NAME: (trt.float32, (-1, spec.embedding_dim)),
    }
    if found != expected:
        raise EngineError(f"the network has tensors {found}; the spec, {spec.precision}, wants {expected}")
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    convolutions = {layer.get_output(0).dtype for layer in layers if layer.type == trt.LayerType.CONVOLUTION}
    if convolutions != {types[spec.precision]}:
        raise EngineError(f"the network's convolutions are {convolutions}; the spec wants {spec.precision}")


def facts_entry(facts: PlanFacts) -> dict[str, Any]:
    """Return the entry of EngineFile.build that PlanFacts.from_file reads."""
    return {"tensorrt": dataclasses.asdict(facts)}


def _configure(trt: Any, builder: Any, spec: ModelSpec, facts: PlanFacts) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # TF32 has no more mantissa bits than FP16
    if facts.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if facts.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    profile = builder.create_optimization_profile()
    smallest, largest = ((batch, spec.n_mels, spec.n_frames) for batch in (1, facts.max_batch))
    profile.set_shape(INPUT_NAME, smallest, largest, largest)  # tuned for full batches, which nearly all are
    config.add_optimization_profile(profile)
    return config


def _set_targets(trt: Any, config: Any, compute_capabilities: tuple[str, ...]) -> None:
    config.num_compute_capabilities = len(compute_capabilities)
    for i, name in enumerate(compute_capabilities):
        target = getattr(trt.ComputeCapability, "SM" + name.replace(".", ""))
        if not config.set_compute_capability(target, i):
            raise EngineError(f"TensorRT for RTX {trt.__version__} cannot build for compute capability {name}")


@contextlib.contextmanager
def _gpu(index: int) -> Iterator[tuple[str, ...]]:
    """Make the primary context of a device current, and yield its compute capability."""
    from singerembed.engine.cuda_driver import CudaDevice

    device = CudaDevice(index)
    try:
        yield (".".join(map(str, device.compute_capability)),)
    finally:
        device.close()


def _timing_cache_path(facts: PlanFacts) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "singerembed" / f"tensorrt-{facts.version}-{facts.compute_capabilities[0]}.timing"


@contextlib.contextmanager
def _timing_cache(config: Any, path: Path) -> Iterator[None]:
    """Reuse kernel timings of earlier builds, and save those of this one. Errors are ignored: they cost only time."""
    saved = b""
    with contextlib.suppress(OSError):
        saved = path.read_bytes()
    cache = config.create_timing_cache(saved) or config.create_timing_cache(b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):  # timed on another GPU or version
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    yield
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.publishing(str(path)) as temporary:
            Path(temporary).write_bytes(bytes(config.get_timing_cache().serialize()))
