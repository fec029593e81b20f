"""A run over a folder: its catalogue is what the folder held when the run began."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile

from singerembed.errors import InterruptedRun, OutputError
from singerembed.jobs.folder import kept_catalog
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import run

GOLDEN = Path(__file__).parents[1] / "golden" / "crops"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "music" / "album").mkdir(parents=True)
    for i, crop in enumerate(sorted(GOLDEN.glob("*.wav"))[:3]):
        shutil.copy(crop, tmp_path / "music" / ("album" if i else "") / f"{i}.wav")
    return tmp_path / "music"


@pytest.mark.parametrize("partitioned", [False, True])
def test_the_rows_are_those_of_a_scan_and_a_run(
    folder: Path, tmp_path: Path, reference_engine: str, partitioned: bool
) -> None:
    from singerembed.catalog.scan import scan

    output = tmp_path / ("out" if partitioned else "out.parquet")
    (tmp_path / ".out.catalog.parquet.4194304-0123abcd.tmp").touch()  # of a scan that was killed
    summary = run(str(folder), str(output), engine=reference_engine, options=RunOptions(partitioned=partitioned))
    assert summary.counts.tracks == 3
    assert not list(tmp_path.glob(".*.tmp"))
    scan([str(folder)], str(tmp_path / "two.parquet"))
    run(str(tmp_path / "two.parquet"), str(tmp_path / "two_out.parquet"), engine=reference_engine)
    rows = pq.read_table(output)
    assert rows.equals(pq.read_table(tmp_path / "two_out.parquet"))
    assert {"size", "mtime", "artist", "year"} <= set(rows.column_names)
    again = run(str(folder), str(output), engine=reference_engine, options=RunOptions(partitioned=partitioned))
    assert again.already_done


def test_a_run_that_was_stopped_goes_on_with_the_folder_as_it_was(
    folder: Path, tmp_path: Path, reference_engine: str
) -> None:
    output = tmp_path / "out.parquet"
    options = RunOptions(unit_minutes=0.01, workers=1)
    asked: list[int] = []

    def stop() -> int:
        asked.append(1)
        return 15 if len(asked) > 3 else 0

    with pytest.raises(InterruptedRun):
        run(str(folder), str(output), engine=reference_engine, options=options, stop=stop)
    shutil.copytree(folder, tmp_path / "others")
    with pytest.raises(OutputError, match=r"which are not those of .*others"):
        run(str(tmp_path / "others"), str(output), engine=reference_engine, options=options)
    shutil.copy(folder / "0.wav", folder / "00.wav")
    said: list[str] = []
    summary = run(
        str(folder), str(output), engine=reference_engine, options=options, say=lambda _what, text: said.append(text)
    )
    assert summary.counts.tracks == 3
    assert any("the 3 recordings that" in text for text in said)
    with pytest.raises(OutputError, match="with 3 recordings, and files have changed since: it has 4"):
        run(str(folder), str(output), engine=reference_engine, options=options)
    assert not list(tmp_path.glob("*.parts"))
    assert not list(tmp_path.glob("*.now.parquet"))
    restarted = run(
        str(folder), str(output), engine=reference_engine, options=RunOptions(unit_minutes=0.01, restart=True)
    )
    assert restarted.counts.tracks == 4


def test_a_stop_while_scanning_leaves_nothing(folder: Path, tmp_path: Path, reference_engine: str) -> None:
    with pytest.raises(InterruptedRun, match="while the folder was scanned"):
        run(str(folder), str(tmp_path / "out.parquet"), engine=reference_engine, stop=lambda: 15)
    assert [path.name for path in tmp_path.iterdir()] == ["music"]


def test_a_cue_sheet_that_cannot_be_read_leaves_its_folder_for_another_night(
    folder: Path, tmp_path: Path, reference_engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "0.cue").write_text(
        'FILE "0.wav" WAVE\n TRACK 01 AUDIO\n  INDEX 01 00:00:00\n TRACK 02 AUDIO\n  INDEX 01 00:02:00\n',
        encoding="utf-8",
    )
    output, update = tmp_path / "out.parquet", RunOptions(update=True)
    run(str(folder), str(output), engine=reference_engine, options=update)
    before = pq.read_table(output)
    assert "music/0.wav#01" in before["track_id"].to_pylist()

    def refused(_path: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("singerembed.catalog.walk.read_cue_sheet", refused)
    summary = run(str(folder), str(output), engine=reference_engine, options=update)
    assert summary.unreadable_folders == 1
    assert pq.read_table(output).equals(before)
    monkeypatch.undo()
    summary = run(str(folder), str(output), engine=reference_engine, options=update)
    assert summary.already_done
    assert summary.unreadable_folders == 0


def test_errors_are_retried_with_the_catalogue_of_the_run(folder: Path, tmp_path: Path, reference_engine: str) -> None:
    output = tmp_path / "out.parquet"
    good = (folder / "0.wav").read_bytes()
    (folder / "0.wav").write_bytes(b"")
    first = run(str(folder), str(output), engine=reference_engine)
    assert first.counts.errors == {"no_audio": 1}
    (folder / "0.wav").write_bytes(good)
    second = run(str(folder), str(output), engine=reference_engine, options=RunOptions(retry_errors=True))
    assert not second.counts.errors
    assert second.counts.tracks == 3


def test_the_tracks_of_a_cue_sheet_are_embedded_apart(folder: Path, tmp_path: Path, reference_engine: str) -> None:
    pcm = [soundfile.read(path)[0] for path in sorted(folder.rglob("*.wav"))]
    album = tmp_path / "album"
    album.mkdir()
    rate = soundfile.info(folder / "0.wav").samplerate
    soundfile.write(album / "all.wav", [sample for one in pcm for sample in one], rate, subtype="PCM_16")
    times = [sum(map(len, pcm[:i])) / rate for i in range(3)]
    tracks = "".join(f" TRACK 0{i + 1} AUDIO\n  INDEX 01 00:{int(t):02d}:00\n" for i, t in enumerate(times))
    (album / "all.cue").write_text(f'FILE "all.wav" WAVE\n{tracks}', encoding="utf-8")
    for source, output in ((album, "a.parquet"), (album / "all.cue", "b.parquet")):
        run(str(source), str(tmp_path / output), engine=reference_engine)
    rows = pq.read_table(tmp_path / "a.parquet")
    assert rows["track_id"].to_pylist() == [f"album/all.wav#0{i}" for i in (1, 2, 3)]
    assert rows["start"].to_pylist() == times
    run(str(folder), str(tmp_path / "apart.parquet"), engine=reference_engine)
    apart = pq.read_table(tmp_path / "apart.parquet")
    assert rows["embedding"].equals(apart["embedding"])
    assert rows["embedding"].equals(pq.read_table(tmp_path / "b.parquet")["embedding"])


def test_the_catalogue_is_kept_beside_the_output() -> None:
    assert kept_catalog("a/library.parquet") == "a/library.catalog.parquet"
    assert kept_catalog("s3://b/embedded") == "s3://b/embedded.catalog.parquet"
