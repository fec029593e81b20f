"""An index of voices that were taken out of mixes: queries go through the same separator. Its weights are made, so its
voices are no voices; what counts is that a query is treated as the library was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result
from numpy.typing import NDArray

import singerembed
from singerembed.cli.main import cli
from singerembed.engine.file import read_separator_file
from singerembed.engine.separator import Separator
from singerembed.errors import InputError, UsageError
from singerembed.search.query import open_index
from singerembed.search.serve import Recordings, make_app
from singerembed.search.store import StoredIndex

RATE = 44_100


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, list(arguments))
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, voice: Callable[..., NDArray[np.float32]], separator_path: str
) -> Path:
    """Three stereo recordings of 9 s, outputs of a run with a separator and of one without, and the first's index."""
    folder, rng = tmp_path_factory.mktemp("separated"), np.random.default_rng(0)
    for i, f0 in enumerate((150.0, 220.0, 330.0)):
        band = 0.1 * rng.standard_normal((9 * RATE, 2)).astype(np.float32)
        soundfile.write(folder / f"{i}.wav", voice(9.0, f0=f0)[:, np.newaxis] + band, RATE)
    (folder / "catalog.csv").write_text("track_id,path\n" + "".join(f"t{i},{i}.wav\n" for i in range(3)))
    every = ["--separate", separator_path, "--min-vocals", "-199"]
    for name, options in (("plain", []), ("voices", every)):
        result = invoke("run", str(folder / "catalog.csv"), str(folder / f"{name}.parquet"), *options)
        assert result.exit_code == 0, result.stderr
        result = invoke("index", str(folder / f"{name}.parquet"), str(folder / f"{name}.index"))
        assert result.exit_code == 0, result.stderr
    return folder


def test_a_mix_of_the_library_finds_itself(folder: Path, separator_path: str) -> None:
    index = str(folder / "voices.index")
    separator = StoredIndex(index).separator
    assert separator is not None
    assert separator["sha256"] == read_separator_file(separator_path).sha256
    result = invoke("search", index, str(folder / "1.wav"), "--separate", separator_path, "--json")
    assert result.exit_code == 0, result.stderr
    tracks = json.loads(result.stdout)["tracks"]
    assert tracks[0]["track_id"] == "t1"
    assert tracks[0]["score"] == pytest.approx(1, abs=1e-3)
    assert [match["query_seconds"] for match in tracks[0]["matches"]] == [0, 4]
    assert tracks[1]["score"] < 0.999
    pcm, _ = soundfile.read(folder / "1.wav", dtype="float32")
    answer = singerembed.open_index(index, separator=separator_path).search(pcm, RATE)
    assert answer.tracks[0].track_id == "t1"
    assert answer.tracks[0].score == pytest.approx(1, abs=1e-3)


def test_the_separator_must_be_named_and_the_indexs(folder: Path, separator_path: str, tmp_path: Path) -> None:
    recording, index = str(folder / "1.wav"), str(folder / "voices.index")
    name = read_separator_file(separator_path).spec.name
    result = invoke("search", index, recording)
    assert result.exit_code == 2
    assert f"holds voices that the separator {name}" in result.stderr
    assert "--separate" in result.stderr
    assert invoke("search", index, "--track", "t1").exit_code == 0  # nothing is separated for it
    result = invoke("search", str(folder / "plain.index"), recording, "--separate", separator_path)
    assert result.exit_code == 2
    assert "recordings as they are" in result.stderr
    manifest = json.loads((folder / "voices.index" / "index.json").read_text())
    manifest["separator"]["sha256"] = "0" * 64
    other = tmp_path / "other.index"
    other.mkdir()
    for path in (folder / "voices.index").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "index.json").write_text(json.dumps(manifest))
    result = invoke("search", str(other), recording, "--separate", separator_path)
    assert result.exit_code == 2
    assert "their voices cannot be compared" in result.stderr


def test_other_voices_are_not_added_nor_screened(folder: Path, separator_path: str) -> None:
    for index, output in (("voices", "plain"), ("plain", "voices")):
        result = invoke("index", str(folder / f"{output}.parquet"), str(folder / f"{index}.index"))
        assert result.exit_code == 2
        assert "their embeddings cannot be compared" in result.stderr
    result = invoke("index", str(folder / "voices.parquet"), str(folder / "plain.parquet"), str(folder / "new.index"))
    assert result.exit_code == 2
    assert "holds recordings as they are" in result.stderr


def test_where_nobody_sings_it_is_said(
    folder: Path, separator_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index(str(folder / "voices.index"), separator=separator_path)

    def faint(_self: Any, segment: NDArray[np.float32]) -> NDArray[np.float32]:
        return 1e-12 * segment

    monkeypatch.setattr(Separator, "vocals", faint)
    with pytest.raises(InputError, match="nobody seems to sing"):
        index.search_file(str(folder / "1.wav"))
    pcm, _ = soundfile.read(folder / "1.wav", dtype="float32")
    with pytest.raises(ValueError, match="in the audio nobody seems to sing"):
        index.search(pcm, RATE)
    soundfile.write(tmp_path / "silent.wav", np.zeros(9 * RATE), RATE)
    with pytest.raises(InputError, match="is silent"):
        index.search_file(str(tmp_path / "silent.wav"))


def test_the_page_needs_the_separator_at_its_start(folder: Path, separator_path: str) -> None:
    path = str(folder / "voices.index")
    index = open_index(path)
    with pytest.raises(UsageError, match="--separate"):
        make_app(index, Recordings(index, str(folder)))
    index = open_index(path, separator=separator_path)
    assert make_app(index, Recordings(index, str(folder))).routes
