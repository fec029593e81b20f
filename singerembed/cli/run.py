"""The command `run`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import click

from singerembed import storage
from singerembed.cli.catalog_options import catalog_options, columns_of
from singerembed.cli.console import NumberRange, count_or_all, note, verbosity, verbosity_options
from singerembed.cli.process import quiet_libraries, stop_signals
from singerembed.cli.run_summary import say_summary, say_what_restarting_costs, summary_fields
from singerembed.errors import UsageError

if TYPE_CHECKING:
    from singerembed.jobs.log import RunLog
    from singerembed.jobs.options import RunOptions

EXIT_WITH_ERROR_ROWS = 3
EXIT_AT_DEADLINE = 4


def _devices(_ctx: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, ...] | None:
    if value == "all":
        return None
    devices = [part.strip() for part in value.split(",")]
    if not all(map(str.isdecimal, devices)):
        raise click.BadParameter("give 'all' or numbers of CUDA devices, as in 0,1")
    return tuple(map(int, devices))


def _address(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is None or value in {"local", "auto"} or re.fullmatch(r"(ray://)?[^/:]+:\d+|(ray://)?\[.+\]:\d+", value):
        return value
    raise click.BadParameter(
        f"{value!r} is no address: give auto, HOST:PORT, ray://HOST:PORT, or nothing, as the last word"
    )


def _number_or_share(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> int | float | None:
    if value is None or value.isdecimal():
        return None if value is None else int(value)
    share = value.removesuffix("%")
    if value.endswith("%") and re.fullmatch(r"\d+(\.\d+)?", share) and float(share) < 100:
        return float(share) / 100
    raise click.BadParameter("give a number of recordings, or a percentage below 100 as in 5%")


def _time_of_day(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """The next time, in seconds since 1970, at which a clock here shows `value`."""
    if value is None:
        return None
    try:
        wanted = time.strptime(value, "%H:%M")
    except ValueError:
        raise click.BadParameter("give a time of day, as in 06:00") from None
    now = time.time()
    today = time.localtime(now)
    # mktime knows on which days the clock is changed.
    at_that_time = wanted.tm_hour, wanted.tm_min, 0, 0, 0, -1
    then, tomorrow = (time.mktime((*today[:2], today.tm_mday + days, *at_that_time)) for days in (0, 1))
    return then if then > now else tomorrow


@click.command()
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
    type=NumberRange(min=0.01),
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
    type=NumberRange(max=0),
    default=-60.0,
    show_default=True,
    help="Crops whose peak is not above this are not embedded.",
)
@click.option(
    "--separate",
    metavar="FILE",
    help="Embed the voice alone, as the separator FILE takes it out of the mix: singerembed build-engine spleeter.",
)
@click.option(
    "--min-vocals",
    type=NumberRange(min=-1000, max=1000),
    metavar="DB",
    help="With --separate: crops whose voice is weaker than this against the mix are not embedded.  [default: -15]",
)
@click.option(
    "--vocals-column",
    metavar="COLUMN",
    help="The catalogue's column of paths of isolated voices: embedded in the place of the mix where a row has one.",
)
@click.option(
    "--audio-hash",
    is_flag=True,
    help="Add the column audio_hash: the same for tracks with the same samples, whatever their container and tags.",
)
@catalog_options
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
    help="GPUs to run on, a process each, for an engine that runs on them; 0,0: two on one, for many cores.",
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
    type=NumberRange(min=0, min_open=True),
    default=240.0,
    show_default=True,
    metavar="M",
    help="Minutes of audio that are published together; a crash costs no more. Rows without an end count as 4.",
)
@click.option(
    "--track-timeout",
    type=NumberRange(min=0, min_open=True),
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
@click.option(
    "--max-errors",
    metavar="N|N%",
    callback=_number_or_share,
    help="End the run when more recordings fail, or a greater share of them, which is looked at from the hundredth "
    "recording on, and at the end of a first run.  [default: never]",
)
@click.option(
    "--deadline",
    metavar="HH:MM",
    callback=_time_of_day,
    help="Begin no unit after this time of day; the same command goes on the next night.",
)
@click.option("--retry-errors", is_flag=True, help="Embed again what has error rows in a finished output.")
@click.option(
    "--update",
    is_flag=True,
    help="Bring OUTPUT up to date with CATALOG: embed what is new or changed, drop what has gone, keep all other rows.",
)
@click.option(
    "--identity",
    type=click.Choice(["file", "audio"]),
    default="file",
    show_default=True,
    help="What --update knows a recording by: path, size and time; or also a hash of its encoded audio, so that files "
    "that were moved or tagged anew keep their rows. Every run of an output must have the same.",
)
@click.option("--keep-missing", is_flag=True, help="With --update: keep the rows of what has gone from CATALOG.")
@click.option("--allow-gone", is_flag=True, help="With --update: drop rows even of more than half of OUTPUT.")
@click.option("--restart", is_flag=True, help="Throw away what an earlier run with this output has done.")
@click.option("--log-json", metavar="FILE", help="Append a log to FILE: a JSON object a line, a report as the last.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
@verbosity_options
def run(catalog: str, output: str, *, as_json: bool, **values: Any) -> None:
    """Embed every recording of CATALOG into OUTPUT, a Parquet file or, with --partitioned, a folder of them.

    CATALOG may be a folder, a playlist or a cue sheet: it is scanned first, as by `singerembed scan`, and the catalogue
    is kept beside OUTPUT. Else it is a CSV, TSV, JSON Lines or Parquet file with a column "path" and, where known,
    "track_id", "start" and "end" (seconds); its other columns are passed through. Text may be compressed (.gz, .zst).
    Relative paths count from the catalogue's folder. A run that was stopped goes on when the same command is given
    again.

    Exit codes: 0 all well, 3 finished with error rows, or without folders or files that could not be read, 4 stopped at
    the deadline, 1 could not run or had to stop, 2 usage, 130 or 143 interrupted.

    \b
    singerembed run ~/Music library.parquet
    singerembed run library.csv library.parquet --engine byol.engine
    singerembed run s3://music/all.parquet s3://music/embedded --partitioned --ray auto
    """
    from singerembed.cli.progress import ProgressBar
    from singerembed.cli.scan import ScanBar
    from singerembed.jobs.options import RunOptions
    from singerembed.jobs.run import run as run_pipeline

    options = RunOptions(
        crops=values["crops"],
        hop_seconds=values["hop"],
        pool=values["pool"],
        embedding_dtype=values["embedding_dtype"],
        silence_dbfs=values["silence_dbfs"],
        separate=values["separate"],
        min_vocals_db=_min_vocals(values["separate"], values["min_vocals"]),
        audio_hash=values["audio_hash"],
        columns=columns_of(values, values["vocals_column"]),
        unit_minutes=values["unit_minutes"],
        track_timeout_seconds=values["track_timeout"],
        workers=values["workers"],
        devices=values["devices"],
        ray=values["ray"],
        partitioned=values["partitioned"],
        retries=values["retries"],
        max_errors=values["max_errors"],
        deadline=values["deadline"],
        restart=values["restart"],
        retry_errors=values["retry_errors"],
        update=values["update"],
        identity=values["identity"],
        keep_missing=values["keep_missing"],
        allow_gone=values["allow_gone"],
    )
    _check_together(options)
    if options.restart:
        say_what_restarting_costs(output.rstrip("/"), partitioned=options.partitioned)
    quiet = verbosity(click.get_current_context()) < 0
    with (
        quiet_libraries(),
        stop_signals() as stop,
        ProgressBar(note, quiet=quiet) as progress,
        ScanBar(quiet=quiet) as scan_bar,
        _log(values["log_json"]) as logs,
    ):

        def say(what: str, text: str) -> None:
            scan_bar.note(what, text)
            for log in logs:
                log.note(what, text)

        summary = run_pipeline(
            catalog,
            output,
            engine=values["engine"],
            options=options,
            listeners=[progress, *logs],
            stop=stop,
            say=say,
            scanned=scan_bar.update,
        )
        for log in logs:
            log.summary = summary_fields(summary)
    if as_json:
        click.echo(json.dumps(summary_fields(summary)))
    files = f"{summary.output}/*.parquet" if options.partitioned else summary.output
    say_summary(summary, progress.first_error, files)
    if summary.at_deadline:
        click.get_current_context().exit(EXIT_AT_DEADLINE)
    missing = summary.update is not None and summary.update.missing
    if summary.counts.errors or summary.unreadable_folders or missing:
        click.get_current_context().exit(EXIT_WITH_ERROR_ROWS)


def _check_together(options: RunOptions) -> None:
    """Raise UsageError for options that exclude each other."""
    if options.update and (options.restart or options.retry_errors):
        other = "--restart" if options.restart else "--retry-errors"
        raise UsageError(f"--update and {other} exclude each other")
    if (options.keep_missing or options.allow_gone) and not options.update:
        raise UsageError("--keep-missing and --allow-gone belong to --update")


def _min_vocals(separate: str | None, value: float | None) -> float:
    from singerembed.jobs.options import DEFAULT_MIN_VOCALS_DB

    if value is not None and separate is None:
        raise UsageError("--min-vocals is for the voices that --separate finds: give both, or leave it out")
    return DEFAULT_MIN_VOCALS_DB if value is None else value


@contextmanager
def _log(path: str | None) -> Iterator[list[RunLog]]:
    """The log at `path`, if one is wanted; however the block ends, the log says so."""
    if path is None:
        yield []
        return
    from singerembed.jobs.log import RunLog

    with closing(RunLog(path)) as log:
        try:
            yield [log]
        except BaseException as exc:
            log.finished(storage.scrubbed(str(exc)) or type(exc).__name__)
            raise
        log.finished("finished")
