"""Builds TensorRT plans from ONNX models. TensorRT needs a GPU for it, TensorRT for RTX does not."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from singerembed import storage
from singerembed.engine.tensorrt import (
    TENSORRT_RTX,
    Library,
    PlanFacts,
    Tensors,
    create,
    encoder_tensors,
    load_library,
    make_log,
)
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
    """Build an encoder's plan for batches of 1 to `options.max_batch`. Raises as `build_network_plan`."""
    return build_network_plan(model, encoder_tensors(spec, options.max_batch), spec.precision, library, options)


def build_network_plan(
    model: bytes, tensors: Tensors, precision: str, library: Library, options: PlanOptions
) -> tuple[bytes, PlanFacts]:
    """Build a plan from the ONNX `model`, whose convolutions are of `precision`, in the precision of its types.

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
        return _build(trt, library, model, tensors, precision, facts), facts


def _build(trt: Any, library: Library, model: bytes, tensors: Tensors, precision: str, facts: PlanFacts) -> bytes:
    log = make_log(trt)
    builder = create(trt.Builder, log, library)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise EngineError(f"{library.title} cannot read the network: {reasons}")
    if tensors.output_shape is None:
        _take_only(network, tensors)
    check_network(trt, network, tensors, precision)
    config = _configure(trt, builder, tensors, facts)
    if library is TENSORRT_RTX:
        _set_targets(trt, config, facts.compute_capabilities)
        plan = builder.build_serialized_network(network, config)
    else:
        with _timing_cache(config, _timing_cache_path(facts)):
            plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{library.title} could not build the engine: {log.taken()}")
    return bytes(plan)


def _take_only(network: Any, wanted: Tensors) -> None:
    """Fix the sizes that a foreign model leaves open, and drop the outputs that are not wanted."""
    network.get_input(0).shape = wanted.input_shape
    for output in [network.get_output(i) for i in range(network.num_outputs)]:
        if output.name != wanted.output_name:
            network.unmark_output(output)


def check_network(trt: Any, network: Any, wanted: Tensors, precision: str) -> None:
    """Raise EngineError unless `network` has the `wanted` tensors, and convolutions of `precision`."""
    found = {
        tensor.name: (tensor.dtype, tuple(tensor.shape))
        for tensor in (
            *(network.get_input(i) for i in range(network.num_inputs)),
            *(network.get_output(i) for i in range(network.num_outputs)),
        )
    }
    types = {"fp16": trt.float16, "fp32": trt.float32}
    expected = {
        wanted.input_name: (trt.float32, wanted.input_shape),
        wanted.output_name: (trt.float32, wanted.output_shape),
    }
    if wanted.output_shape is None:
        expected[wanted.output_name] = found.get(wanted.output_name, expected[wanted.output_name])
    if found != expected:
        raise EngineError(f"the network has tensors {found}; the spec, {precision}, wants {expected}")
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    convolutions = {layer.get_output(0).dtype for layer in layers if layer.type == trt.LayerType.CONVOLUTION}
    if not convolutions <= {types[precision]}:
        raise EngineError(f"the network's convolutions are {convolutions}; the spec wants {precision}")


def facts_entry(facts: PlanFacts) -> dict[str, Any]:
    """Return the entry of EngineFile.build that PlanFacts.from_file reads."""
    return {"tensorrt": dataclasses.asdict(facts)}


def _configure(trt: Any, builder: Any, tensors: Tensors, facts: PlanFacts) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # TF32 has no more mantissa bits than FP16
    if facts.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if facts.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    profile = builder.create_optimization_profile()
    sizes = (tensors.smallest, tensors.usual, tensors.largest)
    profile.set_shape(tensors.input_name, *(tensors.input_of(size) for size in sizes))
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
