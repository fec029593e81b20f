"""`singerembed separate`: stems and their catalogue. The separator's weights are made."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from click.testing import CliRunner
from numpy.typing import NDArray

from singerembed.catalog.read import Track
from singerembed.cli.main import cli
from singerembed.engine.file import read_separator_file
from singerembed.engine.separator import Separator
from singerembed.errors import InterruptedRun, OutputError, TrackError
from singerembed.jobs.stems import separate_catalog, stem_name

RATE = 44_100
Voice = Callable[..., NDArray[np.float32]]


@pytest.fixture
def catalog(tmp_path: Path, voice: Voice) -> Path:
    stereo = np.stack([voice(25, f0=180), 0.5 * voice(25, f0=300)], axis=1)
    soundfile.write(tmp_path / "long song.wav", stereo, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "short.flac", voice(0.5, 48_000), 48_000)
    (tmp_path / "broken.wav").write_text("no audio", encoding="utf-8")
    path = tmp_path / "library.csv"
    path.write_text(
        "path,artist,start,end\nlong song.wav,A,,\nlong song.wav,A,2,9\nshort.flac,B,,\nbroken.wav,C,,\n"
        "short.flac,D,x,\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def short_catalog(tmp_path: Path, voice: Voice) -> Path:
    soundfile.write(tmp_path / "short.flac", voice(0.5, 48_000), 48_000)
    path = tmp_path / "short.csv"
    path.write_text("path\nshort.flac\n", encoding="utf-8")
    return path


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "catalog.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_stems_and_their_catalogue(catalog: Path, separator_path: str, tmp_path: Path) -> None:
    folder = tmp_path / "stems"
    counts = separate_catalog(str(catalog), str(folder), separator_path, workers=1)
    assert (counts.tracks, counts.written, counts.kept, counts.errors) == (5, 2, 1, 2)
    rows = rows_of(folder)
    assert [row["artist"] for row in rows] == ["A", "A", "B", "C", "D"]
    assert rows[0]["vocals"] == rows[1]["vocals"] == stem_name(str(tmp_path / "long song.wav"))
    assert rows[0]["path"] == str(tmp_path / "long song.wav")
    assert (rows[1]["start"], rows[1]["end"]) == ("2.0", "9.0")
    assert [row["vocals"] == "" for row in rows] == [False, False, False, True, True]
    assert rows[3]["separate_error"].startswith("decode_failed: ")
    assert rows[4]["separate_error"].startswith("bad_row: ")
    for row, seconds in ((rows[0], 25), (rows[2], 0.5)):
        info = soundfile.info(folder / row["vocals"])
        assert (info.samplerate, info.channels, info.format) == (RATE, 2, "FLAC")
        assert info.frames == round(seconds * RATE)


def test_a_stem_is_made_of_the_middles_of_segments(catalog: Path, separator_path: str, tmp_path: Path) -> None:
    separate_catalog(str(catalog), str(tmp_path / "stems"), separator_path)
    stem, _ = soundfile.read(tmp_path / "stems" / rows_of(tmp_path / "stems")[0]["vocals"], dtype="float32")
    mixture, _ = soundfile.read(tmp_path / "long song.wav", dtype="float32")
    separator = Separator(read_separator_file(separator_path))
    window = separator.spec.segment_samples(10 * RATE)
    context = 34_304  # samples: 32 frames, and half of what only three frames of four overlap at each end
    wanted = window - 2 * context
    padded = np.pad(mixture, ((context, 2 * window), (0, 0)))
    parts = [separator.vocals(padded[i * wanted :][:window])[context:-context] for i in range(3)]
    assert wanted < len(mixture) < 3 * wanted
    np.testing.assert_allclose(stem, np.concatenate(parts)[: len(mixture)], atol=2**-15)
    assert np.abs(stem).max() > 0.1


def test_it_goes_on_where_it_was_stopped(catalog: Path, separator_path: str, tmp_path: Path) -> None:
    folder = tmp_path / "stems"
    asked: list[int] = []

    def stop() -> int:
        asked.append(1)
        return 15 if len(asked) > 2 else 0

    with pytest.raises(InterruptedRun, match="The same command goes on"):
        separate_catalog(str(catalog), str(folder), separator_path, workers=1, stop=stop)
    assert not (folder / "catalog.csv").exists()
    assert not list(folder.glob(".*.tmp"))
    counts = separate_catalog(str(catalog), str(folder), separator_path)
    assert counts.tracks == 5
    again = separate_catalog(str(catalog), str(folder), separator_path)
    assert (again.written, again.kept) == (0, 3)


def test_folders_of_others_are_left_alone(catalog: Path, separator_path: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds files of others"):
        separate_catalog(str(catalog), str(tmp_path), separator_path)
    folder = tmp_path / "stems"
    folder.mkdir()
    (folder / "separator.json").write_text(json.dumps({"separator": "x", "sha256": "y"}), encoding="utf-8")
    with pytest.raises(OutputError, match="of another separator"):
        separate_catalog(str(catalog), str(folder), separator_path)


def test_a_stem_of_a_recording_that_was_replaced_is_written_anew(
    catalog: Path, separator_path: str, reference_engine: str, voice: Voice, tmp_path: Path
) -> None:
    folder, output = tmp_path / "stems", str(tmp_path / "o.parquet")
    command = ["run", f"{folder}/catalog.csv", output, "--vocals-column", "vocals", "--engine", reference_engine]
    separate_catalog(str(catalog), str(folder), separator_path)
    stem = folder / rows_of(folder)[2]["vocals"]
    assert CliRunner().invoke(cli, [*command, "--update"]).exit_code == 3
    soundfile.write(tmp_path / "short.flac", voice(4.5, 48_000), 48_000)
    assert separate_catalog(str(catalog), str(folder), separator_path).written == 1
    assert soundfile.info(stem).frames == round(4.5 * RATE)
    done = CliRunner().invoke(cli, [*command, "--update", "--json"])
    assert json.loads(done.stdout)["embedded_crops"] > 0  # the other recordings keep their rows
    (tmp_path / "short.flac").unlink()  # as on a disk that is not mounted
    assert separate_catalog(str(catalog), str(folder), separator_path).written == 0
    stem.write_bytes(b"fLaC")
    assert separate_catalog(str(catalog), str(folder), separator_path).errors == 3


def test_many_rows_of_one_recording_have_one_stem(tmp_path: Path, separator_path: str, voice: Voice) -> None:
    soundfile.write(tmp_path / "a.wav", voice(15), RATE)
    (tmp_path / "c.csv").write_text("path,start\n" + "".join(f"a.wav,{i}\n" for i in range(4)), encoding="utf-8")
    counts = separate_catalog(str(tmp_path / "c.csv"), str(tmp_path / "stems"), separator_path, workers=4)
    assert (counts.written, counts.kept) == (1, 3)


def test_what_killed_calls_have_left_goes_and_a_damaged_claim_is_said(
    short_catalog: Path, separator_path: str, tmp_path: Path
) -> None:
    folder = tmp_path / "stems"
    folder.mkdir()
    for name in ("lock", ".separator.json.4194304-01234567.tmp"):
        (folder / name).touch()
    separate_catalog(str(short_catalog), str(folder), separator_path)
    wanted = {path.name for path in folder.iterdir()}
    assert len(wanted) == 3
    (folder / ".catalog.csv.4194304-01234567.tmp").touch()
    separate_catalog(str(short_catalog), str(folder), separator_path)
    assert {path.name for path in folder.iterdir()} == wanted
    (folder / "separator.json").write_text('{"separator": ', encoding="utf-8")
    with pytest.raises(OutputError, match=r"separator\.json, which says whose stems these are, is damaged"):
        separate_catalog(str(short_catalog), str(folder), separator_path)


def test_two_calls_on_one_folder(short_catalog: Path, separator_path: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "stems")

    def other(_track: Track, _error: TrackError | None) -> None:
        with pytest.raises(OutputError, match="another run is writing"):
            separate_catalog(str(short_catalog), folder, separator_path)

    assert separate_catalog(str(short_catalog), folder, separator_path, separated=other).tracks == 1


def test_without_fsspec(
    short_catalog: Path, separator_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    for _ in range(2):
        assert separate_catalog(str(short_catalog), str(tmp_path / "stems"), separator_path).tracks == 1


def test_the_catalogue_is_checked_and_read_as_the_options_say(
    separator_path: str, voice: Voice, tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "é.wav", voice(1), RATE)
    path, folder = tmp_path / "c.csv", str(tmp_path / "stems")
    path.write_bytes("no;file;vocals\n7;é.wav;café\n".encode("cp1252"))
    command = ["separate", str(path), folder, "--separator", separator_path]
    command += ["--path-column", "file", "--id-column", "no", "--rename", "vocals=singer"]
    wrong = CliRunner().invoke(cli, command)
    assert wrong.exit_code == 1
    assert "Name the encoding of the file" in wrong.stderr
    assert not Path(folder).exists()
    assert CliRunner().invoke(cli, [*command, "--encoding", "cp1252"]).exit_code == 0
    row = rows_of(Path(folder))[0]
    assert (row["track_id"], row["path"], row["singer"]) == ("7", str(tmp_path / "é.wav"), "café")


def test_the_command_and_a_run_over_its_catalogue(
    catalog: Path, separator_path: str, reference_engine: str, tmp_path: Path
) -> None:
    folder, output = str(tmp_path / "stems"), str(tmp_path / "o.parquet")
    done = CliRunner().invoke(cli, ["separate", str(catalog), folder, "--separator", separator_path, "--json"])
    assert done.exit_code == 3, done.output
    assert json.loads(done.stdout)["errors"] == 2
    assert "first: row 4 broken.wav" in done.stderr
    embedded = CliRunner().invoke(
        cli,
        ["run", f"{folder}/catalog.csv", output, "--vocals-column", "vocals", "--engine", reference_engine],
    )
    assert embedded.exit_code == 3, embedded.output
    rows = pq.read_table(output).to_pylist()
    assert [row["voice_from"] for row in rows if row["status"] == "ok"] == ["stem"] * 8
    assert [row["error_code"] for row in rows if row["status"] == "error"] == ["decode_failed", "bad_row"]
