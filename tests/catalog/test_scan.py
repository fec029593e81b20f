"""A folder as a catalogue: what is found, what is left out, in which order, and that tracks can be read from it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from singerembed.catalog import foreign_tags
from singerembed.catalog.cue_sheet import read_cue_sheet
from singerembed.catalog.read import Catalog
from singerembed.catalog.scan import SCAN_SCHEMA, ScanCounts, is_source, scan
from singerembed.catalog.tags import TagReader, Tags
from singerembed.errors import CatalogError, UsageError

RATE = 44_100
TAGS = {
    "artist": "Marla Quill",
    "album_artist": "Various",
    "title": "Blå",
    "album": "Night",
    "track": "3/9",
    "date": "2004-05-06",
    "genre": "Jazz",
}


def tagged(path: Path, codec: str, container: str, **others: str) -> Path:
    """Write a second of noise with TAGS, and `others` in their place."""
    noise = 0.1 * np.random.default_rng(0).standard_normal((2, RATE)).astype(np.float32)
    with av.open(str(path), "w", format=container) as output:
        output.metadata.update(TAGS | others)
        stream: Any = output.add_stream(codec, rate=RATE, layout="stereo")
        frame = av.AudioFrame.from_ndarray(noise, "fltp", "stereo")
        frame.sample_rate, frame.pts = RATE, 0
        size = stream.codec_context.frame_size or 1024
        converter = av.AudioResampler(stream.codec_context.format, "stereo", RATE, frame_size=size)
        for piece in [*converter.resample(frame), *converter.resample(None)]:
            output.mux(stream.encode(piece))
        output.mux(stream.encode(None))
    return path


def id3(*frames: tuple[bytes, bytes]) -> bytes:
    """An ID3v2.3 tag."""
    body = b"".join(name + struct.pack(">IH", len(content), 0) + content for name, content in frames)
    size = bytes((len(body) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x03\x00\x00" + size + body


@pytest.fixture
def music(tmp_path: Path) -> Path:
    """A folder with recordings in two sub-folders, and all that is no recording."""
    root = tmp_path / "music"
    for name in ("b/2.wav", "b/1.WAV", "a.wav", "é/x.flac"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, np.zeros(RATE), RATE)
    for name in ("._a.wav", "cover.jpg", "notes.txt", "c.mp3.part", "d.crdownload"):
        (root / name).touch()
    for name in ("@eaDir", ".hidden", "#recycle", "$RECYCLE.BIN", ".Trash-1000"):
        (root / name).mkdir()
        shutil.copy(root / "a.wav", root / name / "left_out.wav")
    return root


def paths(catalog: Path) -> list[str]:
    return [track.path for unit in Catalog(str(catalog)).units() for track in unit.tracks]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_recordings_are_listed_in_order_and_the_rest_is_counted(music: Path, suffix: str) -> None:
    catalog = music / f"library{suffix}"
    counts = scan([str(music)], str(catalog))
    assert paths(catalog) == ["a.wav", "b/1.WAV", "b/2.wav", "é/x.flac"]
    assert counts.left_out == {
        "no audio": 2,
        "hidden": 3,
        "recycle bins and system folders": 3,
        "partial downloads": 2,
    }
    assert counts.seconds == 4.0
    for unit in Catalog(str(catalog)).units():
        assert all(Path(track.location).is_file() for track in unit.tracks)
    first = catalog.read_bytes()
    scan([str(music)], str(catalog))
    assert catalog.read_bytes() == first


def test_size_and_time_are_the_files(music: Path, tmp_path: Path) -> None:
    os.utime(music / "a.wav", ns=(0, 1_700_000_000_123_456_789))
    scan([str(music)], str(tmp_path / "c.parquet"))
    table = pq.read_table(tmp_path / "c.parquet")
    assert table.schema.equals(SCAN_SCHEMA)
    row = table.to_pylist()[0]
    assert row["size"] == (music / "a.wav").stat().st_size
    assert row["mtime"].timestamp() == pytest.approx(1_700_000_000.123456, abs=1e-6)
    scan([str(music)], str(tmp_path / "c.jsonl"))
    text = json.loads((tmp_path / "c.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert text["mtime"] == "2023-11-14T22:13:20.123456Z"
    assert text["path"] == "music/a.wav"


def test_a_file_that_is_no_recording_is_listed_without_tags(music: Path, tmp_path: Path) -> None:
    for name in ("empty.mp3", "text.flac", "text.wv", "text.m4a"):
        (music / name).write_text("" if name == "empty.mp3" else "no audio at all " * 50, encoding="utf-8")
    scan([str(music)], str(tmp_path / "c.parquet"))
    rows = {row["path"]: row for row in pq.read_table(tmp_path / "c.parquet").to_pylist()}
    for name in ("empty.mp3", "text.flac", "text.wv", "text.m4a"):
        assert rows[f"music/{name}"]["artist"] is None
        assert rows[f"music/{name}"]["size"] == (music / name).stat().st_size


def test_circles_of_links_end_and_other_links_are_followed(music: Path, tmp_path: Path) -> None:
    (music / "b" / "up").symlink_to("..")
    (music / "b" / "self.wav").symlink_to("self.wav")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(music / "a.wav", tmp_path / "elsewhere" / "z.wav")
    (music / "linked").symlink_to(tmp_path / "elsewhere")
    counts = scan([str(music)], str(music / "c.csv"))
    assert "linked/z.wav" in paths(music / "c.csv")
    assert counts.recordings == 5
    assert counts.left_out["links in a circle"] == 1


def test_a_folder_that_cannot_be_read_is_said_and_counted(
    music: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    said: list[str] = []
    counts = scan([str(music)], str(tmp_path / "c.csv"), say=said.append)
    assert said == [f"{music}/b: Permission denied; what is in it is left out"]
    assert counts.unreadable_folders == 1
    assert paths(tmp_path / "c.csv") == ["music/a.wav", "music/é/x.flac"]


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_root_without_recordings_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "c.csv").write_text("path\nof before\n", encoding="utf-8")
    with pytest.raises(CatalogError, match=name):
        scan([str(tmp_path / name)], str(tmp_path / "c.csv"))
    assert paths(tmp_path / "c.csv") == ["of before"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.csv", "empty"]


def test_sources_within_each_other_and_other_formats_are_refused(music: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="listed twice"):
        scan([str(music), str(music / "b")], str(tmp_path / "c.csv"))
    with pytest.raises(UsageError, match=r"\.csv, \.jsonl or \.parquet"):
        scan([str(music)], str(tmp_path / "c.xlsx"))


def test_names_that_are_not_utf8(music: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(str(music)) + b"/\xe9.wav")
    shutil.copy(music / "a.wav", odd)
    for suffix in (".csv", ".jsonl", ".parquet"):
        catalog = tmp_path / f"c{suffix}"
        scan([str(music)], str(catalog))
        assert [t.location for u in Catalog(str(catalog)).units() for t in u.tracks if "%E9" in t.path] == [odd]


# --- tags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mp3", "libmp3lame", "mp3"),
        ("a.flac", "flac", "flac"),
        ("a.m4a", "aac", "ipod"),
        ("a.wv", "wavpack", "wv"),
        ("a.mka", "flac", "matroska"),
        ("a.caf", "pcm_s16le", "caf"),
    ],
)
def test_tags(tmp_path: Path, name: str, codec: str, container: str) -> None:
    reader = TagReader()
    found = reader.read(str(tagged(tmp_path / name, codec, container)))
    reader.close()
    assert found.duration == pytest.approx(1.0, abs=0.1)
    assert found[1:8] == ("Marla Quill", "Various", "Blå", "Night", 3, 2004, "Jazz")


def test_ids_of_musicbrainz_in_id3(tmp_path: Path) -> None:
    path = tagged(tmp_path / "a.mp3", "libmp3lame", "mp3")
    ids = [f"{digit * 8}-0000-4000-8000-{digit * 12}" for digit in "123"]
    artists = f"\x00MusicBrainz Artist Id\x00{ids[1]}/{ids[2]}".encode("latin-1")
    tag = id3((b"UFID", b"http://musicbrainz.org\x00" + ids[0].encode()), (b"TXXX", artists))
    path.write_bytes(tag + path.read_bytes())
    reader = TagReader()
    found = reader.read(str(path))
    assert found.musicbrainz_trackid == ids[0]
    assert found.musicbrainz_artistid == f"{ids[1]}; {ids[2]}"


def test_a_crash_of_ffmpeg_costs_the_tags_of_one_file(tmp_path: Path) -> None:
    path = str(tagged(tmp_path / "a.wv", "wavpack", "wv"))
    reader = TagReader()
    assert reader.read(path).artist == "Marla Quill"
    process = reader._foreign._process
    assert process is not None
    process.kill()
    process.wait()
    assert reader.read(path) == Tags()
    assert reader.read(path).artist == "Marla Quill"
    reader.close()


def test_a_hang_of_ffmpeg_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "a.wv")
    monkeypatch.setattr(foreign_tags, "_PATIENCE_SECONDS", 0.2)
    reader = TagReader()
    assert reader.read(str(tmp_path / "a.wv")) == Tags()
    reader.close()


# --- cue sheets and playlists ---------------------------------------------------------------------------------------

CUE = """REM DATE 1987
PERFORMER "The Band"
TITLE "Side A"
FILE "album.wav" WAVE
  TRACK 01 AUDIO
    TITLE "One"
    INDEX 01 00:00:00
  TRACK 02 AUDIO
    TITLE "Zwö"
    PERFORMER "A Guest"
    INDEX 00 00:01:70
    INDEX 01 00:02:15
  TRACK 03 MODE1/2352
    INDEX 01 00:02:30
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_a_cue_sheet_cuts_the_file_beside_it(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "m").mkdir()
    soundfile.write(tmp_path / "m" / "album.flac", np.zeros(5 * RATE), RATE)
    (tmp_path / "m" / "album.cue").write_bytes(CUE.encode(encoding))
    for source in ("m", "m/album.cue"):
        scan([str(tmp_path / source)], str(tmp_path / "c.parquet"))
        first, second = pq.read_table(tmp_path / "c.parquet").to_pylist()
        assert (first["track_id"], first["start"], first["end"]) == ("m/album.flac#01", 0.0, 2.2)
        assert (second["track_id"], second["start"], second["end"]) == ("m/album.flac#02", 2.2, None)
        assert (first["artist"], second["artist"], second["album_artist"]) == ("The Band", "A Guest", "The Band")
        assert (second["title"], second["album"], second["year"], second["duration"]) == ("Zwö", "Side A", 1987, 2.8)
    tracks = [track for unit in Catalog(str(tmp_path / "c.parquet")).units() for track in unit.tracks]
    assert [(track.start, track.end) for track in tracks] == [(0.0, 2.2), (2.2, None)]


def test_a_cue_sheet_of_whole_files_cuts_nothing(tmp_path: Path) -> None:
    sheet = "".join(f'FILE "{i}.wav" WAVE\n TRACK 0{i} AUDIO\n  INDEX 01 00:00:00\n' for i in (1, 2))
    (tmp_path / "a.cue").write_text(sheet, encoding="utf-8")
    for i in (1, 2):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(RATE), RATE)
    assert read_cue_sheet(str(tmp_path / "a.cue")).split_files() == []
    for source in (tmp_path, tmp_path / "a.cue"):
        scan([str(source)], str(tmp_path / "c.csv"))
        assert paths(tmp_path / "c.csv") == ["1.wav", "2.wav"]


def test_numbers_that_no_album_has(tmp_path: Path) -> None:
    tagged(tmp_path / "a.flac", "flac", "flac", track="20240131123")
    tagged(tmp_path / "b.wv", "wavpack", "wv", track="20240131123")
    soundfile.write(tmp_path / "c.wav", np.zeros(5 * RATE), RATE)
    long = 5000 * "9"
    tracks = [("20260101001", "00:00:00"), (long, "00:02:00"), ("3", f"{long}:00:00"), ("4", f"{400 * '9'}:00:00")]
    lines = [f" TRACK {number} AUDIO\n  INDEX 01 {time}\n" for number, time in tracks]
    (tmp_path / "c.cue").write_text('FILE "c.wav" WAVE\n' + "".join(lines), encoding="utf-8")
    scan([str(tmp_path)], str(tmp_path / "c.parquet"))
    found = pq.read_table(tmp_path / "c.parquet", columns=["path", "track"]).to_pylist()
    assert [(row["path"], row["track"]) for row in found] == [
        ("a.flac", None), ("b.wv", None), ("c.wav", 1), ("c.wav", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["list.m3u", "list.m3u8", "list.pls"])
def test_a_playlist_is_a_catalogue_in_its_order(music: Path, tmp_path: Path, name: str) -> None:
    entries = ["é/x.flac", "b\\2.wav", str(music / "a.wav"), "gone.mp3", "http://radio.example/stream"]
    if name.endswith(".pls"):
        lines = ["[playlist]", *reversed([f"File{i}={entry}" for i, entry in enumerate(entries, start=1)])]
    else:
        lines = ["#EXTM3U", "#EXTINF:1,X", *entries, ""]
    text = "\r\n".join(lines)
    (music / name).write_bytes(text.encode("cp1252" if name == "list.m3u" else "utf-8"))
    counts = scan([str(music / name)], str(tmp_path / "c.csv"))
    assert paths(tmp_path / "c.csv") == ["music/é/x.flac", "music/b/2.wav", "music/a.wav", "music/gone.mp3"]
    assert counts.left_out == {"web addresses": 1}


# --- object storage -------------------------------------------------------------------------------------------------


def test_object_storage(music: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(music), "/bucket", recursive=True)
    scan(["memory://bucket"], "memory://catalogs/c.parquet")
    scan([str(music)], str(tmp_path / "c.parquet"))
    with memory.open("/catalogs/c.parquet") as file:
        remote = pq.read_table(file).to_pylist()
    local = pq.read_table(tmp_path / "c.parquet").to_pylist()
    assert [row["path"] for row in remote] == [f"memory://{row['path'].replace('music', 'bucket', 1)}" for row in local]
    for name in ("size", "duration"):
        assert [row[name] for row in remote] == [row[name] for row in local]
    assert all(row["mtime"] is not None for row in remote)
    memory.rm("/bucket", recursive=True)


def test_what_is_a_source(music: Path) -> None:
    assert is_source(str(music))
    assert is_source("list.m3u8")
    assert is_source("s3://bucket/music/")
    assert not is_source("library.csv")
    assert not is_source("https://example.com/library.csv.gz")


def test_counts_for_people() -> None:
    counts = ScanCounts(left_out=Counter({"hidden": 2, "no audio": 1200}))
    counts.add({"duration": 5400.0, "artist": "A"})
    assert str(counts) == "1 recordings, 1 artists, 1.5 h (left out: 1,200 no audio, 2 hidden)"
