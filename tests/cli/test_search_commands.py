"""`index`, `search`, `verify` and `cluster` as they are typed, on the example recordings."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import browser
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from click.testing import CliRunner, Result

import singerembed
from singerembed import storage
from singerembed.cli.main import cli

EXAMPLES = Path(__file__).parents[2] / "examples"


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("search") / "out.parquet")
    assert invoke("run", str(EXAMPLES / "catalog.csv"), path).exit_code == 0
    return path


@pytest.fixture(scope="module")
def index(output: str) -> str:
    path = output.replace("out.parquet", "out.index")
    result = invoke("index", output, path)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "12 tracks" in result.stderr
    return path


def test_a_recording_in_two_formats_counts_once(tmp_path: Path) -> None:
    parts = [soundfile.read(EXAMPLES / "audio" / name)[0] for name in ("alto_2.wav", "tenor_1.mp3", "soprano_2.mp3")]
    song = np.concatenate([gain * part for gain, part in zip((1, 0.5, 0.7), parts, strict=True)])
    for name in ("song.flac", "song.mp3", "song.ogg"):
        soundfile.write(tmp_path / name, song, 44_100)
    output, index = str(tmp_path / "out.parquet"), str(tmp_path / "out.index")
    assert invoke("run", str(tmp_path), output).exit_code == 0
    result = invoke("index", output, index, "--json")
    assert json.loads(result.stdout)["n_tracks"] == 1
    assert "2 tracks are copies of others and count once: song.mp3 is song.flac; song.ogg is song.flac" in result.stderr
    table = invoke("search", index, str(tmp_path / "song.ogg")).stdout
    assert "song.flac" in table
    assert "; also song.mp3; also song.ogg" in table


def test_a_recording_of_the_library_finds_itself(index: str) -> None:
    recording = str(EXAMPLES / "audio" / "bass_1.wav")
    found = json.loads(invoke("search", index, recording, "--json", "--top", "3").stdout)
    assert [track["singer"] for track in found["tracks"]] == ["bass"] * 3
    assert found["tracks"][0]["track_id"] == "bass-1"
    assert found["tracks"][0]["score"] == pytest.approx(1, abs=1e-3)
    assert found["singers"][0]["singer"] == "bass"
    table = invoke("search", index, recording, "--top", "3").stdout
    assert table.splitlines()[0].split() == ["score", "track", "singer", "where"]
    assert table.splitlines()[1].split()[:6] == ["1.00", "audio/bass_1.wav", "bass", "0:00", "like", "0:00,"]
    rows = list(csv.DictReader(io.StringIO(invoke("search", index, recording, "--csv").stdout)))
    assert {row["kind"] for row in rows} == {"track", "singer"}
    samples, rate = soundfile.read(recording)
    answer = singerembed.open_index(index).search(samples, rate, top=3)
    assert [track.track_id for track in answer.tracks] == [track["track_id"] for track in found["tracks"]]


def test_unfit_queries_are_told_apart_from_unfit_commands(index: str, output: str, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silent.wav", np.zeros(441_000), 44_100)
    (tmp_path / "text.wav").write_text("no audio", encoding="utf-8")
    for code, arguments, message in (
        (1, [str(tmp_path / "silent.wav")], "is silent"),
        (1, [str(tmp_path / "text.wav")], "cannot be looked up"),
        (1, [str(tmp_path / "none.wav")], "file not found"),
        (2, [], "nothing to look up"),
        (2, ["--track", "nobody"], 'no track of the id or path "nobody"; the first is "bass-1", audio/bass_1.wav'),
        (2, ["--track", "bass-1", "--where", "singer ="], "--where singer ="),
        (2, ["--track", "bass-1", "--csv", "--json"], "not both"),
        (0, ["--catalog", output], "of 1,000 tracks"),
    ):
        result = invoke("search", index, *arguments)
        assert result.exit_code == code, arguments
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert "is not an index" in invoke("search", str(tmp_path), "--track", "x").stderr


def test_of_several_recordings_each_is_answered_that_can_be(index: str, tmp_path: Path) -> None:
    good, none = str(EXAMPLES / "audio" / "bass_1.wav"), str(tmp_path / "none.wav")
    result = invoke("search", index, none, good, none, (EXAMPLES / "audio" / "alto_2.wav").as_uri(), "--json")
    assert result.exit_code == 3
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["tracks"][0]["track_id"] for answer in answers] == ["bass-1", "alto-2"]
    assert result.stderr.count("none.wav cannot be looked up: file not found") == 2
    table = invoke("search", index, none, good, "--csv")
    assert table.exit_code == 3
    assert {row["query"] for row in csv.DictReader(io.StringIO(table.stdout))} == {good}
    assert invoke("search", index, none, none).exit_code == 1


def test_a_recording_shorter_than_a_crop_is_looked_up_as_run_embeds_it(index: str, tmp_path: Path) -> None:
    samples, rate = soundfile.read(EXAMPLES / "audio" / "bass_1.wav")
    short = tmp_path / "short.wav"
    soundfile.write(short, samples[: int(1.5 * rate)], rate, subtype="FLOAT")
    result = invoke("search", index, str(short), "--json")
    assert result.exit_code == 0
    assert "lasts 1.5 s, and a crop 4 s" in result.stderr
    found = json.loads(result.stdout)
    assert "lasts 1.5 s" in found["note"]
    answer = singerembed.open_index(index).search(soundfile.read(short)[0], rate)
    assert answer.note
    assert answer.tracks[0].track_id == found["tracks"][0]["track_id"]
    assert not singerembed.open_index(index).search(samples, rate).note
    output = str(tmp_path / "short.parquet")
    assert invoke("run", str(tmp_path), output).exit_code == 0
    assert invoke("index", output, str(tmp_path / "short.index")).exit_code == 0
    itself = json.loads(invoke("search", str(tmp_path / "short.index"), str(short), "--json").stdout)
    assert itself["tracks"][0]["path"] == "short.wav"


def test_verify_knows_the_singers_of_an_index(tmp_path: Path) -> None:
    catalog, path = tmp_path / "artists.csv", str(tmp_path / "artists.parquet")
    text = (EXAMPLES / "catalog.csv").read_text(encoding="utf-8")
    catalog.write_text(text.replace("singer", "artist").replace("audio/", f"{EXAMPLES}/audio/"), encoding="utf-8")
    assert invoke("run", str(catalog), path).exit_code == 0
    result = invoke("verify", path)
    assert result.exit_code == 2
    assert 'no column "singer"; there are: artist, title' in result.stderr
    assert invoke("index", path, str(tmp_path / "i.index"), "--singer-column", "artist").exit_code == 0
    assert "of 12 credits" in invoke("verify", str(tmp_path / "i.index")).stderr


def test_verify_writes_a_table_and_a_page(output: str, tmp_path: Path) -> None:
    page = tmp_path / "audit.html"
    result = invoke("verify", output, "-o", str(page), "--audio-root", str(EXAMPLES), "--max-chance", "1", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert len(found["suspects"]) == 12
    assert found["calibration"]["n_singers"] == 4
    assert page.read_text(encoding="utf-8").count("<audio") >= 24
    assert (tmp_path / "audit.parquet").exists()
    assert (
        invoke("verify", output, "-o", str(page), "--audio-root", str(EXAMPLES)).exit_code == 0
    )  # replaced by a new one
    assert invoke("verify", output, "--singer-column", "artist").exit_code == 2


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
def test_the_page_of_verify_plays_in_a_browser(output: str, tmp_path: Path) -> None:
    page = tmp_path / "audit.html"
    invoke("verify", output, "-o", str(page), "--audio-root", str(EXAMPLES), "--max-chance", "1")
    with browser.chromium() as driver:
        driver.get(page.as_uri())
        rows = driver.find_elements("css selector", "table tr")
        assert len(rows) == 13
        players = driver.find_elements("css selector", "audio")
        assert len(players) >= 24
        driver.execute_script("document.querySelectorAll('audio').forEach(player => { player.preload = 'metadata' })")
        browser.wait(driver, "[...document.querySelectorAll('audio')].every(player => player.duration > 4)")
        source = players[0].get_attribute("src")
        start = float(source.partition("#t=")[2].partition(",")[0])
        assert rows[1].find_element("css selector", "td:nth-child(2)").text in source
        player = "document.querySelector('audio')"
        driver.execute_cdp_cmd("Runtime.evaluate", {"expression": f"{player}.play()", "userGesture": True})
        browser.wait(driver, f"!{player}.paused && {player}.currentTime > {start}")
        assert {url.partition(":")[0] for url in browser.requested(driver)} <= {"file", "data"}
        assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def test_cluster_prints_groups(output: str, tmp_path: Path) -> None:
    result = invoke("cluster", output, "-o", str(tmp_path / "g.parquet"), "--json")
    assert result.exit_code == 0
    assert {path for group in json.loads(result.stdout) for path in group["paths"]} >= {"audio/bass_1.wav"}
    assert (tmp_path / "g.parquet").exists()


def test_a_track_is_looked_up_by_its_path_too(index: str) -> None:
    by_id, by_path = (
        invoke("search", index, "--track", name, "--json").stdout for name in ("bass-1", "audio/bass_1.wav")
    )
    assert json.loads(by_id)["tracks"] == json.loads(by_path)["tracks"]


def test_inspect_knows_an_index(index: str) -> None:
    text = invoke("inspect", index).stdout
    assert "12 tracks, " in text
    assert "centred; singers by column singer" in text
    assert json.loads(invoke("inspect", index, "--json").stdout)["kind"] == "index"


def test_no_result_replaces_what_run_has_written(output: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.parquet"
    mine.write_bytes(Path(output).read_bytes())
    before = mine.read_bytes()
    (tmp_path / "music").mkdir()
    soundfile.write(tmp_path / "music" / "a.wav", np.zeros(441), 44_100)
    for arguments in (
        ("verify", str(mine), "-o", str(tmp_path / "mine.html")),
        ("verify", str(mine), "-o", str(mine)),
        ("cluster", str(mine), "-o", str(mine)),
        ("report", str(mine), "-o", str(mine)),
        ("scan", str(tmp_path / "music"), str(mine)),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2, arguments
        message = "must end in .html" if arguments[0] == "report" else "is an output of run, and would be replaced"
        assert message in result.stderr
    page = tmp_path / "mine.html"  # as a user may have called an output
    page.write_bytes(before)
    assert "is an output of run" in invoke("report", str(mine), "-o", str(page)).stderr
    assert page.read_bytes() == before
    assert "is no folder" in invoke("evaluate", str(mine), "-o", str(mine)).stderr
    assert mine.read_bytes() == before
    (tmp_path / "notes.parquet").write_text("a catalogue, say", encoding="utf-8")
    result = invoke("verify", str(mine), "-o", str(tmp_path / "notes.html"))
    assert result.exit_code == 2
    assert "is no table of verify" in result.stderr
    assert "must end in .parquet" in invoke("cluster", str(mine), "-o", str(tmp_path / "g.csv")).stderr
    (tmp_path / "folder.parquet").mkdir()
    assert "not a regular file" in invoke("cluster", str(mine), "-o", str(tmp_path / "folder.parquet")).stderr


def test_what_was_found_is_printed_though_it_cannot_be_written(output: str, tmp_path: Path) -> None:
    for arguments in (("verify", output, "--max-chance", "1"), ("cluster", output)):
        result = invoke(*arguments, "-o", str(tmp_path / "none" / "t.parquet"))
        assert result.exit_code == 1
        assert "audio/bass_1.wav" in result.stdout
        assert "cannot write" in result.stderr


def test_results_go_to_object_storage_or_it_is_said_that_they_do_not(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("verify", output, "-o", "memory://results/a.html").exit_code == 0
    assert storage.read("memory://results/a.html").startswith(b"<!doctype html>")
    assert storage.exists("memory://results/a.parquet")
    for arguments in (
        ("index", output, "s3://bucket/out.index"),
        ("report", output, "-o", "s3://bucket/page.html"),
        ("evaluate", output, "-o", "s3://bucket/report"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2, arguments
        assert "local disk" in result.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_no_output_is_not_to_be_removed(output: str, tmp_path: Path) -> None:
    (tmp_path / "lib.csv").write_text("path\na.wav\n", encoding="utf-8")
    rewritten, slice_of_it = tmp_path / "rewritten.parquet", tmp_path / "slice.parquet"
    table = pq.read_table(output)
    pq.write_table(table.slice(0, 3), slice_of_it)
    pq.write_table(table.replace_schema_metadata(None), rewritten)
    for path in (tmp_path / "lib.csv", tmp_path, rewritten, slice_of_it):
        for arguments in (("cluster", str(path)), ("index", str(path), str(tmp_path / "i.index"))):
            result = invoke(*arguments)
            assert result.exit_code == 1, result.stderr
            assert "is not an output of run" in result.stderr
            assert "remove" not in result.stderr


def test_a_page_that_cannot_play_says_so(output: str, tmp_path: Path) -> None:
    result = invoke("verify", output, "-o", str(tmp_path / "a.html"), "--audio-root", str(tmp_path))
    assert result.exit_code == 0
    assert "the page cannot play the recordings" in result.stderr
    assert "--audio-root" in result.stderr


def test_an_index_without_singers_says_so(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(f"path\n{EXAMPLES / 'audio' / 'bass_1.wav'}\n", encoding="utf-8")
    assert invoke("run", str(tmp_path / "c.csv"), str(tmp_path / "o.parquet")).exit_code == 0
    result = invoke("index", str(tmp_path / "o.parquet"), str(tmp_path / "i.index"))
    assert "search names tracks only" in result.stderr


def test_doctor_names_what_search_needs() -> None:
    subjects = {finding["subject"] for finding in json.loads(invoke("doctor", "--json").stdout)}
    assert {"FAISS", "scikit-learn", "duckdb"} <= subjects
