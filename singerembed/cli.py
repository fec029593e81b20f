"""The command line: options, help and one-line errors; no logic."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import click

from singerembed import storage
from singerembed.console import count_or_all, note, verbosity, verbosity_options
from singerembed.errors import SingerEmbedError, UsageError
from singerembed.evaluation.commands import evaluate, report

if TYPE_CHECKING:
    from singerembed.pipeline import RunSummary
    from singerembed.runlog import RunLog

EXIT_WITH_ERROR_ROWS = 3


class _Group(click.Group):
    """Turns the errors of singerembed into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click ends quietly where nobody reads on, as with `inspect | head`
        except Exception as exc:
            if verbosity(ctx) > 0:
                traceback.print_exc()
            click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
            if isinstance(exc, SingerEmbedError):
                click.echo(str(exc), err=True)
                ctx.exit(exc.exit_code)
            click.echo(
                f"a mistake in singerembed itself: {type(exc).__name__}: {exc}. Run it with -v and report that",
                err=True,
            )
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="singerembed")
def cli() -> None:
    """Singer identity embeddings for whole music libraries.

    \b
    singerembed run catalog.csv out.parquet     embed every recording of a catalogue
    singerembed build-engine ckpt.pt            make an engine of a trained encoder
    """


# --- run ------------------------------------------------------------------------------------------------------------


def _devices(_ctx: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, ...] | None:
    if value == "all":
        return None
    devices = [part.strip() for part in value.split(",")]
    if not all(map(str.isdecimal, devices)) or len(set(devices)) != len(devices):
        raise click.BadParameter("give 'all' or numbers of CUDA devices, as in 0,1")
    return tuple(map(int, devices))


def _address(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is None or value in {"local", "auto"} or re.fullmatch(r"(ray://)?[^/:]+:\d+|(ray://)?\[.+\]:\d+", value):
        return value
    raise click.BadParameter(
        f"{value!r} is no address: give auto, HOST:PORT, ray://HOST:PORT, or nothing, as the last word"
    )


def _pairs(_ctx: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = dict(value.partition("=")[::2] for value in values)
    if not all(pairs) or not all(pairs.values()):
        raise click.BadParameter("write OLD=NEW")
    return pairs


@cli.command()
@click.argument("catalog")
@click.argument("output")
@click.option("--engine", metavar="FILE", help="Engine file made by build-engine.  [default: the bundled one]")
@click.option(
    "--crops",
    default="all",
    metavar="all|N",
    callback=count_or_all,
    show_default=True,
    help="All consecutive 4 s crops of a track, or N of them, evenly spaced and read by seeking.",
)
@click.option(
    "--hop",
    type=click.FloatRange(min=0.01),
    metavar="SECONDS",
    help="From the start of one crop to the next.  [default: 4]",
)
@click.option(
    "--pool",
    type=click.Choice(["none", "mean"]),
    default="none",
    show_default=True,
    help="One row a crop, or one a track: the mean.",
)
@click.option(
    "--embedding-dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Type of the stored numbers.",
)
@click.option(
    "--silence-dbfs",
    type=click.FloatRange(max=0),
    default=-60.0,
    show_default=True,
    help="Crops whose peak is not above this are not embedded.",
)
@click.option("--path-column", default="path", show_default=True, help="The catalogue's column of paths.")
@click.option("--id-column", default="track_id", show_default=True, help="The catalogue's column of track names.")
@click.option(
    "--rename",
    multiple=True,
    metavar="OLD=NEW",
    callback=_pairs,
    help="Store the catalogue's column OLD as NEW; may be repeated.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Threads that decode and embed; with --ray, of each worker process.  [default: the cores; up to 8 with --ray]",
)
@click.option(
    "--devices",
    default="all",
    metavar="all|0,1",
    callback=_devices,
    show_default=True,
    help="GPUs to run on, a process each, for an engine that runs on them.",
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    callback=_address,
    help="Run on a Ray cluster: auto, HOST:PORT or ray://HOST:PORT; without an address, on one started here. Behind "
    "OUTPUT, or as --ray=ADDRESS.",
)
@click.option("--partitioned", is_flag=True, help="Write OUTPUT as a folder of Parquet files, one a unit.")
@click.option(
    "--unit-minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=240.0,
    show_default=True,
    metavar="M",
    help="Minutes of audio that are published together; a crash costs no more. Rows without an end count as 4.",
)
@click.option(
    "--track-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="S",
    help="Seconds of decoding after which a track is given up.",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="How often a file system's passing trouble is waited out, for each recording.",
)
@click.option("--retry-errors", is_flag=True, help="Embed again what has error rows in a finished output.")
@click.option("--restart", is_flag=True, help="Throw away what an earlier run with this output has done.")
@click.option("--log-json", metavar="FILE", help="Append a log to FILE: a JSON object a line, a report as the last.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
@verbosity_options
def run(catalog: str, output: str, *, as_json: bool, **values: Any) -> None:
    """Embed every recording of CATALOG into OUTPUT, a Parquet file or, with --partitioned, a folder of them.

    CATALOG is a CSV, TSV, JSON Lines or Parquet file with a column "path" and, where known, "track_id", "start" and
    "end" (seconds); its other columns are passed through. Relative paths count from the catalogue's folder. A run that
    was stopped goes on when the same command is given again.

    Exit codes: 0 all well, 3 finished with error rows, 1 could not run or had to stop, 2 usage, 130 or 143 interrupted.

    \b
    singerembed run library.csv library.parquet --engine byol.engine
    singerembed run s3://music/all.parquet s3://music/embedded --partitioned --ray auto
    """
    from singerembed.catalog import Columns
    from singerembed.options import RunOptions
    from singerembed.pipeline import run as run_pipeline
    from singerembed.progress import ProgressBar

    options = RunOptions(
        crops=values["crops"],
        hop_seconds=values["hop"],
        pool=values["pool"],
        embedding_dtype=values["embedding_dtype"],
        silence_dbfs=values["silence_dbfs"],
        columns=Columns(values["path_column"], values["id_column"], values["rename"]),
        unit_minutes=values["unit_minutes"],
        track_timeout_seconds=values["track_timeout"],
        workers=values["workers"],
        devices=values["devices"],
        ray=values["ray"],
        partitioned=values["partitioned"],
        retries=values["retries"],
        restart=values["restart"],
        retry_errors=values["retry_errors"],
    )
    if options.restart:
        _say_what_restarting_costs(output.rstrip("/"), partitioned=options.partitioned)
    quiet = verbosity(click.get_current_context()) < 0
    with (
        _quiet_libraries(),
        _stop_signals() as stop,
        ProgressBar(note, quiet=quiet) as progress,
        _log(values["log_json"]) as logs,
    ):
        summary = run_pipeline(
            catalog, output, engine=values["engine"], options=options, listeners=[progress, *logs], stop=stop
        )
    if as_json:
        click.echo(json.dumps(_summary_fields(summary)))
    files = f"{summary.output}/*.parquet" if options.partitioned else summary.output
    _say_summary(summary, progress.first_error, files)
    if summary.counts.errors:
        click.get_current_context().exit(EXIT_WITH_ERROR_ROWS)


@contextmanager
def _log(path: str | None) -> Iterator[list[RunLog]]:
    """The log at `path`, if one is wanted; however the block ends, the log says so."""
    if path is None:
        yield []
        return
    from singerembed.runlog import RunLog

    with closing(RunLog(path)) as log:
        try:
            yield [log]
        except BaseException as exc:
            log.finished(storage.scrubbed(str(exc)) or type(exc).__name__)
            raise
        log.finished("finished")


def _say_what_restarting_costs(output: str, *, partitioned: bool) -> None:
    from singerembed.parts import count_parts

    finished = f"; {output} is replaced when the run is through" if storage.exists(output) and not partitioned else ""
    where = output if partitioned else f"{output}.parts"
    note("restart", f"{count_parts(output):,} finished units in {where} are thrown away{finished}")


def _summary_fields(summary: RunSummary) -> dict[str, Any]:
    return {
        "output": summary.output,
        **summary.counts.to_dict(),
        "embedded_tracks": summary.embedded.tracks,
        "embedded_crops": summary.embedded.crops,
        "seconds": round(summary.seconds, 3),
        "already_done": summary.already_done,
    }


def _say_summary(summary: RunSummary, first_error: str, files: str) -> None:
    counts = summary.counts
    n_errors = counts.errors.total()
    what = f"{counts.tracks:,} tracks, {counts.crops:,} crops ({counts.silent:,} silent), {n_errors:,} errors"
    if summary.already_done:
        note(
            "done",
            f"{summary.output} was finished before, by the same command: {what}. --restart does it again",
        )
    else:
        rate = summary.embedded.crops / summary.seconds
        real_time = summary.embedded.audio_seconds / summary.seconds
        note(
            "wrote",
            f"{summary.output}: {what} in {summary.seconds:.1f} s ({rate:.0f} crops/s, {real_time:.0f}x real time)",
        )
    if n_errors:
        example = f"      first: {first_error}" if first_error else ""
        note("errors", "   ".join(f"{code} {count:,}" for code, count in counts.errors.most_common()) + example)
        note(
            "",
            f"see them:  duckdb -c \"select path, error_code, error from '{files}' where status = 'error'\"",
        )


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Within the block, what C libraries print on their own to file descriptor 2 is dropped; Python's stderr stays."""
    if verbosity(click.get_current_context()) > 0:
        yield
        return
    sys.stderr.flush()
    own, before = os.dup(2), sys.stderr
    if before is sys.__stderr__:
        sys.stderr = os.fdopen(os.dup(own), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
        if before is sys.__stderr__:
            sys.stderr.close()
            sys.stderr = before


@contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
    """Within the block, SIGINT and SIGTERM are noted for the run to stop on; a second one ends the process at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        click.echo("\nstopping after the tracks in hand; press again to stop now", err=True)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- build-engine ---------------------------------------------------------------------------------------------------


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


@cli.command("build-engine")
@click.argument("checkpoint")
@click.option("-o", "--output", metavar="FILE", help="Where to write it.  [default: the checkpoint's name, .engine]")
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="onnxruntime, tensorrt, tensorrt-rtx, or auto: the best for this machine.",
)
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    metavar="auto|fp32|fp16",
    help="Arithmetic of the encoder; auto: fp16 for tensorrt and tensorrt-rtx, else fp32.",
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
    force: bool,
    as_json: bool,
) -> None:
    """Make an engine file of CHECKPOINT.

    CHECKPOINT is a checkpoint of this project, a folder or model.pt of the official release, a Lightning .ckpt of
    either training code, an official method (byol, contrastive, contrastive-vc, unif-align, vicreg) or
    hf:OWNER/REPO/FOLDER; the last two are fetched from the Hugging Face hub. Nothing that a checkpoint names is
    ever run.

    \b
    singerembed build-engine ckpt.pt            writes ckpt.engine
    singerembed build-engine byol               the official weights
    """
    from pathlib import Path

    from singerembed.describe import describe
    from singerembed.engine.build import BuildOptions
    from singerembed.engine.build import build_engine as build
    from singerembed.engine.tensorrt_build import PlanOptions

    target = output or f"{Path(checkpoint.rstrip('/').removeprefix('hf:')).stem}.engine"
    plan = PlanOptions(
        max_batch=max_batch,
        device=device,
        hardware_compatible=hardware_compatible,
        version_compatible=version_compatible,
    )
    build(checkpoint, target, BuildOptions(backend, normalise, precision, plan), force=force, say=note)
    if as_json:
        click.echo(json.dumps(describe(target)))


cli.add_command(evaluate)
cli.add_command(report)


# --- inspect, doctor ------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@verbosity_options
def inspect(file: str, as_json: bool) -> None:
    """Say what FILE is, from what it was made, and how it was verified.

    FILE is an engine, a checkpoint, what run has written, or the .parts folder of an unfinished run.
    """
    from singerembed.describe import describe

    facts = describe(file)
    if as_json:
        click.echo(json.dumps(facts))
        return
    for line in _outline(facts):
        click.echo(line)


def _outline(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    width = max((len(key) for key in facts), default=0)
    for key, value in facts.items():
        if isinstance(value, dict):
            yield f"{indent}{key}"
            yield from _outline(value, indent + "  ")
        else:
            yield f"{indent}{key:<{width}}  {value}"


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@verbosity_options
def doctor(as_json: bool) -> None:
    """Say what this machine can do, and what to install for what it cannot."""
    from singerembed.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([finding.__dict__ for finding in findings]))
        return
    for finding in findings:
        click.secho("ok   " if finding.ok else "-    ", fg="green" if finding.ok else "yellow", nl=False)
        click.echo(f"{finding.subject:<18}{finding.text}")


def main() -> None:
    """Entry point of the `singerembed` command."""
    if sys.argv[1:2] == ["run"] and hasattr(os, "fork"):
        from singerembed.supervisor import run_again_after_crashes

        run_again_after_crashes()
    try:
        cli(prog_name="singerembed")
    except UsageError as exc:  # raised while options are parsed
        click.echo(f"Error: {exc}", err=True)
        sys.exit(exc.exit_code)
