"""A library brought up to date every night: the commands of docs/nightly.md as they stand there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from singerembed.cli.main import cli
from singerembed.cli.run import _time_of_day

NIGHTLY = (Path(__file__).parents[2] / "docs" / "nightly.md").read_text(encoding="utf-8")
AUDIO = Path(__file__).parents[2] / "examples" / "audio"
COMMANDS = re.findall(r"^(?:ExecStart=|30 23 \* \* \* nice -n 19 )(\S+/singerembed run .*)$", NIGHTLY, re.MULTILINE)


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def music(tmp_path: Path) -> Path:
    (tmp_path / "music").mkdir()
    for name in ("alto_1.flac", "bass_1.wav"):
        shutil.copy(AUDIO / name, tmp_path / "music")
    return tmp_path / "music"


@pytest.mark.parametrize("line", COMMANDS, ids=["systemd", "cron"])
def test_the_lines_of_the_documentation_work_without_terminal_home_and_locale(
    line: str, music: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "library.parquet", tmp_path / "log.jsonl"
    command = [sys.executable, "-m", "singerembed", *line.split()[1:]]
    places = {"/srv/music": music, "/srv/embeddings/library.parquet": output, "/var/log/singerembed.jsonl": log}
    command = [str(places.get(word, word)) for word in command]
    command[command.index("--deadline") + 1] = "00:00"  # it may be 05:59 now
    for night in range(2):
        Path(f"{output}.parts").mkdir(exist_ok=True)
        Path(f"{output}.parts/lock").write_text("4194304", encoding="utf-8")  # of a process that has crashed
        done = subprocess.run(
            command, env={"LC_ALL": "C"}, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), done.stderr
        report = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        assert (report["event"], report["outcome"]) == ("finished", "finished")
        assert report["output"]["tracks"] == 2 + night
        assert report["output"]["embedded_tracks"] == (1 if night else 2)
        shutil.copy(AUDIO / "tenor_1.mp3", music)
    if shutil.which("jq"):
        values = metrics_of(log)
        assert values["singerembed_tracks"] == "3"
        assert values["singerembed_embedded_tracks"] == "1"
        assert values["singerembed_at_deadline"] == "0"
        assert values["singerembed_unreadable_folders"] == "0"
        assert values["singerembed_finished"] == "1"
        shutil.rmtree(music)
        assert subprocess.run(command, check=False, capture_output=True).returncode == 1
        assert metrics_of(log) == {"singerembed_finished": "0"}


def metrics_of(log: Path) -> dict[str, str]:
    """What the documentation's script makes of the log."""
    script = re.findall(r"```bash\n(tail .*?)```", NIGHTLY, re.DOTALL)[0]
    script = script.replace("/var/log/singerembed.jsonl", str(log))
    script = re.sub(r"> /var/lib/\S+", "", script)
    printed = subprocess.run(script, shell=True, check=True, capture_output=True, text=True).stdout
    return dict(line.split() for line in printed.splitlines())


def test_an_unreadable_folder_is_in_the_log_and_in_the_summary(
    music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (music / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("/locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    command = ["run", str(music), str(tmp_path / "o.parquet"), "--update", "--quiet", "--json"]
    result = invoke(*command, "--log-json", str(tmp_path / "log"))
    assert (result.exit_code, result.stderr) == (3, "")
    assert json.loads(result.stdout)["unreadable_folders"] == 1
    events = [json.loads(line) for line in (tmp_path / "log").read_text(encoding="utf-8").splitlines()]
    assert [event["text"] for event in events if event.get("what") == "unreadable"] == [
        f"{music}/locked: Permission denied; what is in it is left out"
    ]
    assert events[-1]["output"]["unreadable_folders"] == 1


def test_what_an_update_says(music: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "o.parquet")
    assert invoke("run", str(music), output, "--update").exit_code == 0
    shutil.copy(AUDIO / "tenor_1.mp3", music)
    result = invoke("run", str(music), output, "--update", "--json")
    assert result.exit_code == 0
    assert "2 tracks · new 1" in result.stderr
    assert "were done before" not in result.stderr
    assert json.loads(result.stdout)["update"]["new"] == 1
    again = invoke("run", str(music), output, "--update")
    assert "3 tracks, and nothing is new" in again.stderr
    assert "is up to date" in again.stderr
    (tmp_path / "catalog.csv").write_text("path\nmusic/alto_1.flac\nmusic/bass_1.wav\nmusic/tenor_1.mp3\n", "utf-8")
    (music / "bass_1.wav").unlink()
    missing = invoke("run", str(tmp_path / "catalog.csv"), output, "--update")
    assert missing.exit_code == 3
    assert "missing 1" in missing.stderr
    (music / "alto_1.flac").unlink()  # nothing to embed, one part to write again
    (tmp_path / "catalog.csv").write_text("path\nmusic/bass_1.wav\nmusic/tenor_1.mp3\n", "utf-8")
    gone = invoke("run", str(tmp_path / "catalog.csv"), output, "--update")
    assert "gone 1" in gone.stderr
    assert "were done before" not in gone.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--update", "--restart"], "exclude each other"),
        (["--update", "--retry-errors"], "exclude each other"),
        (["--keep-missing"], "belong to --update"),
        (["--deadline", "6"], "a time of day, as in 06:00"),
        (["--deadline", "25:00"], "a time of day"),
    ],
)
def test_options_that_cannot_be(options: list[str], message: str, music: Path, tmp_path: Path) -> None:
    result = invoke("run", str(music), str(tmp_path / "o.parquet"), *options)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("evening", ["2027-03-27 23:30", "2026-10-24 23:30", "2026-11-27 05:00", "2026-12-31 23:30"])
def test_a_deadline_is_the_clocks_also_where_it_is_changed(evening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        now = time.mktime(time.strptime(evening, "%Y-%m-%d %H:%M"))
        monkeypatch.setattr(time, "time", lambda: now)
        deadline = _time_of_day(None, None, "06:00")  # type: ignore[arg-type]
        assert deadline is not None
        assert time.strftime("%H:%M", time.localtime(deadline)) == "06:00"
        assert 0 < deadline - now < 86_400
    finally:
        monkeypatch.undo()
        time.tzset()
