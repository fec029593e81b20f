"""`singerembed separate`: stems and their catalogue. The separator's weights are made."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from click.testing import CliRunner
from numpy.typing import NDArray

from singerembed.cli.main import cli
from singerembed.engine.file import read_separator_file
from singerembed.engine.separator import Separator
from singerembed.errors import InterruptedRun, OutputError
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
