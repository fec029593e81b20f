"""A library brought up to date every night: the commands of docs/nightly.md as they stand there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

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
        script = re.findall(r"```bash\n(tail .*?)```", NIGHTLY, re.DOTALL)[0]
        metrics = tmp_path / "metrics.prom"
        script = script.replace("/var/log/singerembed.jsonl", str(log))
        script = re.sub(r"/var/lib/\S+", str(metrics), script)
        subprocess.run(script, shell=True, check=True)
        values = dict(line.split() for line in metrics.read_text(encoding="utf-8").splitlines())
        assert values["singerembed_tracks"] == "3"
        assert values["singerembed_embedded_tracks"] == "1"
        assert values["singerembed_at_deadline"] == "0"


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
