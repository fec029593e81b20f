"""Builds a separator's engine file from an ONNX model of any make that maps a mixture to vocals, sample by sample.

What the model does not say of itself is in a file beside it, in TOML:

    sample_rate = 44100       # Hz
    channels = 2              # where the model leaves it open
    segment_seconds = 7.8     # where the model leaves it open
    context_seconds = 1.0     # at either end of a segment, whose voice is not used; 1.0 if not given
    output = "sources"        # which output, where there are several
    stem = 3                  # which one is the voice, counted from 0, where the output has an axis of stems
    name = "my model"         # the file's name if not given
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.engine.build_separator import (
    SeparatorOptions,
    as_plan,
    backend_of,
    difference_db,
    made_mixture,
    verifiable,
)
from singerembed.engine.file import MAX_PAYLOAD_BYTES, SeparatorFile
from singerembed.engine.onnxruntime import new_session
from singerembed.engine.separator import Separator, voice_of
from singerembed.engine.tensorrt import LIBRARIES
from singerembed.errors import CheckpointError, EngineError, MissingDependencyError, OutputError, UsageError
from singerembed.model.separator_spec import WaveformSpec
from singerembed.model.spec import ModelSpec

SUFFIX = ".onnx"
_FLOAT32 = "tensor(float)"
_NEEDED = "sample_rate = 44100, and stem = N where the model gives several stems (docs/mixes.md)"
_MAX_CHANNELS = 2
_MAX_SEGMENT_SECONDS = 60
_COUNTED = {"channels": "channels", "segment_seconds": "samples"}


@dataclass(frozen=True, kw_only=True)
class _Said:
    """The contents of the TOML file."""

    sample_rate: int
    channels: int | None = None
    segment_seconds: float | None = None
    context_seconds: float = 1.0
    output: str | None = None
    stem: int | None = None
    name: str | None = None


def build_waveform_separator(
    model_path: str,
    spec_path: str | None,
    output: str,
    options: SeparatorOptions | None = None,
    *,
    force: bool = False,
    say: Callable[[str, str], None] = lambda _what, _text: None,
) -> SeparatorFile:
    """Build a separator engine from the ONNX model at `model_path`, and what the TOML file at `spec_path` says of it.

    `say(what, text)` is called after each step. Raises UsageError and CheckpointError where model and file do not fit
    each other or what a separator is, MissingDependencyError, EngineError if the model's voice is not finite or
    changes from call to call, and OutputError if `output` exists without `force`.
    """
    options = options or SeparatorOptions()
    backend = backend_of(options)
    if options.precision not in {"auto", "fp32"}:
        raise UsageError(f"a separator of an ONNX model computes in fp32, as the model does, not {options.precision}")
    if spec_path is None:
        raise UsageError(f"{model_path} does not say all that is needed: give --separator FILE.toml, with {_NEEDED}")
    if Path(output).exists() and not force:
        raise OutputError(f"{output} exists. Give another name with -o, or --force to replace it")
    said = _read_spec(spec_path)
    model = _read_model(model_path)
    try:
        session = new_session(model)
    except EngineError as exc:
        raise CheckpointError(f"{model_path}: {exc}") from exc
    spec = _fit_together(said, session, model_path, spec_path, hashlib.sha256(model).hexdigest())
    batch, stem = ("[1, " if spec.batch_axis else "["), ("" if spec.stem is None else f", stem {spec.stem}")
    say("model", f"{model_path}: {spec.input_name} {batch}{spec.channels}, {spec.segment}] to {spec.output_name}{stem}")
    say("target", f"{backend}, fp32")
    build = {
        "checkpoint": Path(model_path).name,
        "layout": "ONNX model from samples to samples",
        "precision": "fp32",
        "versions": {name: version(name) for name in ("singerembed", "onnx")},
    }
    exported = SeparatorFile(spec, "onnxruntime", model, build, {})
    file = as_plan(exported, backend, "fp32", options.plan) if backend in LIBRARIES else exported
    with verifiable(file, exported, options.plan.device) as (separator, what):
        verified = replace(file, verification={"what": what, **_verify(separator, spec, model_path, say)})
    verified.write(output)
    say("wrote", f"{output} ({Path(output).stat().st_size / 1e6:.1f} MB)")
    return verified


def _read_spec(path: str) -> _Said:
    try:
        with Path(path).open("rb") as file:
            fields = tomllib.load(file)
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} is not TOML: {exc}") from exc
    numbers = (int, float)
    kinds: dict[str, tuple[type | tuple[type, ...], str, Callable[[Any], bool]]] = {
        "sample_rate": (int, "a whole number of Hz", lambda value: value > 0),
        "channels": (int, "1 or 2", lambda value: 0 < value <= _MAX_CHANNELS),
        "segment_seconds": (numbers, "a number of seconds above 0", lambda value: 0 < value < float("inf")),
        "context_seconds": (numbers, "a number of seconds, 0 or more", lambda value: 0 <= value < float("inf")),
        "output": (str, "the name of an output", bool),
        "stem": (int, "a whole number, counted from 0", lambda value: value >= 0),
        "name": (str, "a text", bool),
    }
    if unknown := sorted(fields.keys() - kinds.keys()):
        raise UsageError(f"{path} has {', '.join(unknown)}, which means nothing here; known are {', '.join(kinds)}")
    if "sample_rate" not in fields:
        raise UsageError(f"{path} has no sample_rate; it needs {_NEEDED}")
    for field, value in fields.items():
        kind, wanted, is_fit = kinds[field]
        if not isinstance(value, kind) or isinstance(value, bool) or not is_fit(value):
            raise UsageError(f"{path}: {field} is {value!r}, and must be {wanted}")
    return _Said(**fields)


def _read_model(path: str) -> bytes:
    """Return the model with weights that it keeps in other files put into it."""
    try:
        import onnx
    except ImportError as exc:
        raise MissingDependencyError("building an engine", exc.name or "onnx", "build") from exc
    try:
        content = Path(path).read_bytes()
        model = onnx.load_model_from_string(content)
        is_apart = any(one.data_location == onnx.TensorProto.EXTERNAL for one in model.graph.initializer)
        if is_apart:
            onnx.load_external_data_for_model(model, str(Path(path).parent))
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except Exception as exc:  # protobuf's and onnx's exceptions have no common base class
        raise CheckpointError(f"{path} is not an ONNX model that can be read: {exc}") from exc
    if not content:
        raise CheckpointError(f"{path} is empty")
    if model.ByteSize() > MAX_PAYLOAD_BYTES:
        raise CheckpointError(f"{path} is too large for an engine file, which holds {MAX_PAYLOAD_BYTES >> 20} MiB")
    return bytes(model.SerializeToString()) if is_apart else content


# --- what model and spec say together -------------------------------------------------------------------------------


def _fit_together(said: _Said, session: Any, model_path: str, spec_path: str, sha256: str) -> WaveformSpec:
    usual = ModelSpec(name="", method="")
    if said.sample_rate != usual.sample_rate:
        raise UsageError(
            f"{spec_path}: sample_rate is {said.sample_rate}, and encoders hear {usual.sample_rate} Hz. Voices are not "
            f"resampled between the two: export the model with resampling inside, or take another model"
        )
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(one.name for one in inputs)
        raise CheckpointError(f"{model_path} has {len(inputs)} inputs ({names}); a separator takes the mixture alone")
    taken = inputs[0]
    given = _chosen_output(said, session.get_outputs(), model_path, spec_path)
    for one in (taken, given):
        if one.type != _FLOAT32:
            raise CheckpointError(f"{model_path}: {one.name} is a {one.type}. Export it with float32 in and out")
    shape = list(taken.shape)
    if len(shape) not in {2, 3}:
        raise CheckpointError(
            f"{model_path}: its input {taken.name} is {_shown(shape)}, and must be [channels, samples] or "
            "[1, channels, samples]. Spectrograms must be made inside the model"
        )
    batch_axis = len(shape) == 3
    if batch_axis and isinstance(shape[0], int) and shape[0] != 1:
        raise CheckpointError(f"{model_path} takes batches of {shape[0]}. Export it for a batch of 1")
    channels = _one_of("channels", shape[-2], said.channels, model_path, spec_path)
    if not 0 < channels <= _MAX_CHANNELS:
        raise CheckpointError(f"{model_path} takes {channels} channels, and recordings are read in 1 or 2")
    of_spec = None if said.segment_seconds is None else round(said.segment_seconds * said.sample_rate)
    segment = _one_of("segment_seconds", shape[-1], of_spec, model_path, spec_path)
    if segment > _MAX_SEGMENT_SECONDS * said.sample_rate:
        raise CheckpointError(
            f"{model_path} takes {segment / said.sample_rate:.4g} s at a time, and {_MAX_SEGMENT_SECONDS} s at most "
            "are kept in memory. Export it for shorter segments"
        )
    context = round(said.context_seconds * said.sample_rate)
    if usual.crop_samples + 2 * context > segment:
        raise UsageError(
            f"{model_path} takes {segment / said.sample_rate:.4g} s at a time, and crops of {usual.crop_seconds:g} s "
            f"with {said.context_seconds:g} s on either side have no room in that. Export it for longer segments, or "
            f"set context_seconds in {spec_path}"
        )
    return WaveformSpec(
        name=said.name or Path(model_path).stem,
        weights_sha256=sha256,
        sample_rate=said.sample_rate,
        channels=channels,
        segment=segment,
        context=context,
        input_name=taken.name,
        output_name=given.name,
        batch_axis=batch_axis,
        stem=said.stem,
    )


def _chosen_output(said: _Said, outputs: list[Any], model_path: str, spec_path: str) -> Any:
    names = [one.name for one in outputs]
    if said.output is None and len(outputs) > 1:
        raise UsageError(f'{model_path} has the outputs {", ".join(names)}: give output = "..." in {spec_path}')
    if said.output is not None and said.output not in names:
        raise UsageError(f"{spec_path}: {model_path} has no output {said.output!r}; it has {', '.join(names)}")
    return next(one for one in outputs if said.output in {None, one.name})


def _one_of(field: str, of_model: object, of_spec: int | None, model_path: str, spec_path: str) -> int:
    """The size that the model fixes or, where it leaves it open, the one that the file gives, which must not differ."""
    if not isinstance(of_model, int):
        if of_spec is None:
            raise UsageError(f"{model_path} takes any number of {_COUNTED[field]}: give {field} in {spec_path}")
        return of_spec
    if of_spec not in {None, of_model}:
        raise UsageError(
            f"{spec_path}: {field} means {of_spec} {_COUNTED[field]}, and {model_path} takes {of_model}. Leave it out"
        )
    return of_model


def _shown(shape: list[Any]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


# --- verification ---------------------------------------------------------------------------------------------------


def _verify(
    separator: Separator, spec: WaveformSpec, model_path: str, say: Callable[[str, str], None]
) -> dict[str, object]:
    """Run the model on a made mixture, elsewhere in it, on silence, and on the first again."""
    kept = spec.segment - 2 * spec.context
    mixture = made_mixture(spec.segment + kept // 2, spec.sample_rate)
    if spec.channels == 1:
        mixture = mixture.mean(axis=1, keepdims=True)
    first = _voice(separator, mixture[: spec.segment], spec, model_path, "a made mixture")
    second = _voice(separator, mixture[kept // 2 :], spec, model_path, "a made mixture")
    _voice(separator, np.zeros_like(mixture[: spec.segment]), spec, model_path, "silence")
    again = _voice(separator, mixture[: spec.segment], spec, model_path, "a made mixture")
    if not np.array_equal(first, again):
        raise EngineError(
            f"{model_path} gives another voice each time for one mixture ({difference_db(again, first):.0f} dB apart). "
            "Export it in evaluation mode, without drop-out or noise, and without a state"
        )
    energies = [np.sum(pcm.astype(np.float64) ** 2) for pcm in (first, mixture[: spec.segment])]
    share = 10 * np.log10(max(1e-30, energies[0] / energies[1]))
    say("verify", f"the same voice each time, finite for silence too; of a made mixture {share:.1f} dB")
    both = slice(spec.context + kept // 2, spec.segment - spec.context)
    moved = slice(spec.context, spec.context + both.stop - both.start)
    difference = difference_db(second[moved], first[both])
    say("verify", f"the same sound {kept / 2 / spec.sample_rate:.2f} s further on: difference {difference:.1f} dB")
    return {"against": "itself, elsewhere in a segment", "difference_db": difference}


def _voice(
    separator: Separator, segment: NDArray[np.float32], spec: WaveformSpec, model_path: str, what: str
) -> NDArray[np.float32]:
    """Separate `segment`, and raise what keeps the model from being a separator."""
    try:
        output = separator.waveforms(segment, spec)
    except EngineError as exc:
        raise CheckpointError(f"{model_path} does not run on {spec.channels} x {spec.segment} samples: {exc}") from exc
    _check_shape(list(output.shape), spec, model_path)
    vocals = voice_of(output, spec)
    if not np.isfinite(vocals).all():
        raise EngineError(
            f"{model_path} gives NaN or infinity for {what}. Export it in float32, with a small number added to "
            "whatever it divides by"
        )
    return vocals


def _check_shape(shape: list[int], spec: WaveformSpec, model_path: str) -> None:
    batch, plain = [1] * spec.batch_axis, [spec.channels, spec.segment]
    has_stems = len(shape) == len(batch) + 3 and [shape[: len(batch)], shape[-2:]] == [batch, plain]
    of_output = f"{model_path}: its output {spec.output_name} is {_shown(shape)}"
    if spec.stem is None and has_stems:
        raise UsageError(f"{of_output}: say which of the {shape[-3]} is the voice with stem = N, counted from 0")
    if spec.stem is None and shape != [*batch, *plain]:
        raise CheckpointError(f"{of_output}, and must be {_shown([*batch, *plain])}")
    if spec.stem is not None and not has_stems:
        raise CheckpointError(f"{of_output}, and with stem = N must be {_shown([*batch, 'stems', *plain])}")
    if spec.stem is not None and spec.stem >= shape[-3]:
        raise UsageError(f"{of_output}: there is no stem {spec.stem}, counted from 0")
