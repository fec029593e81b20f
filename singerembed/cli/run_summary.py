"""What `run` says before and after it: for people, and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from singerembed import storage
from singerembed.cli.console import note

if TYPE_CHECKING:
    from singerembed.jobs.run import RunSummary


def say_what_restarting_costs(output: str, *, partitioned: bool) -> None:
    from singerembed.output.parts import count_parts

    finished = f"; {output} is replaced when the run is through" if storage.exists(output) and not partitioned else ""
    where = output if partitioned else f"{output}.parts"
    note("restart", f"{count_parts(output):,} finished units in {where} are thrown away{finished}")


def summary_fields(summary: RunSummary) -> dict[str, Any]:
    return {
        "output": summary.output,
        **summary.counts.to_dict(),
        "embedded_tracks": summary.embedded.tracks,
        "embedded_crops": summary.embedded.crops,
        "seconds": round(summary.seconds, 3),
        "already_done": summary.already_done,
        "at_deadline": summary.at_deadline,
        "unreadable_folders": summary.unreadable_folders,
        "update": summary.update and summary.update.to_dict(),
    }


def say_summary(summary: RunSummary, first_error: str, files: str) -> None:
    counts = summary.counts
    n_errors = counts.errors.total()
    unheard = f"{counts.silent:,} silent" + (f", {counts.no_voice:,} without voice" if counts.no_voice else "")
    what = f"{counts.tracks:,} tracks, {counts.crops:,} crops ({unheard}), {n_errors:,} errors"
    if summary.at_deadline:
        note("stopped", "at the deadline, and not everything is embedded. The same command goes on from here")
    if summary.already_done:
        again = "is up to date" if summary.update else "was finished before, by the same command"
        note("done", f"{summary.output} {again}: {what}" + ("" if summary.update else ". --restart does it again"))
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
