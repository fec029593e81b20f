"""Which library reads which tags of which container, and how fast: TinyTag, FFmpeg, mutagen, and singerembed.

python -m benchmarks.tags      (needs mutagen, which is not a dependency: it is GPL)

The files are tagged as MusicBrainz Picard tags them, by mutagen where it writes the container, else by FFmpeg. A cell
names the fields that were read with their right values; speeds are ratios to mutagen's on the same file.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import mutagen
import mutagen.id3
import numpy as np
import soundfile
from tinytag import TinyTag

from singerembed.catalog.tags import TagReader, Tags, _of_ffmpeg

RATE = 48_000
SECONDS = 3
ID1, ID2 = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
WANTED = Tags(None, "Marla Quill", "Various", "Blå", "Night", 3, 2004, "Jazz", ID1, ID2)
FIELDS = Tags._fields[1:]
SHORT = dict(zip(FIELDS, ["artist", "album artist", "title", "album", "track", "year", "genre", "recording id",
                          "artist id"], strict=True))  # fmt: skip
TEXT = dict(zip(FIELDS, ["Marla Quill", "Various", "Blå", "Night", "3/9", "2004-05-06", "Jazz", ID1, ID2], strict=True))
# Container: how FFmpeg makes it (format, codec); libsndfile makes Ogg Vorbis.
MADE = {
    "mp3": ("mp3", "libmp3lame"), "flac": ("flac", "flac"), "ogg": ("", "vorbis"), "opus": ("opus", "libopus"),
    "m4a": ("ipod", "aac"), "wav": ("wav", "pcm_s16le"), "aiff": ("aiff", "pcm_s16be"), "wma": ("asf", "wmav2"),
    "aac": ("adts", "aac"), "wv": ("wv", "wavpack"), "tta": ("tta", "tta"), "mka": ("matroska", "flac"),
    "caf": ("caf", "pcm_s16le"), "w64": ("w64", "pcm_s16le"), "au": ("au", "pcm_s16be"), "mp2": ("mp2", "mp2"),
}  # fmt: skip
KEYS = {
    "id3": dict(zip(FIELDS, ["TPE1", "TPE2", "TIT2", "TALB", "TRCK", "TDRC", "TCON", "UFID:http://musicbrainz.org",
                             "TXXX:MusicBrainz Artist Id"], strict=True)),
    "vorbis": dict(zip(FIELDS, ["artist", "albumartist", "title", "album", "tracknumber", "date", "genre",
                                "musicbrainz_trackid", "musicbrainz_artistid"], strict=True)),
    "mp4": dict(zip(FIELDS, ["\xa9ART", "aART", "\xa9nam", "\xa9alb", "trkn", "\xa9day", "\xa9gen",
                             "----:com.apple.iTunes:MusicBrainz Track Id",
                             "----:com.apple.iTunes:MusicBrainz Artist Id"], strict=True)),
    "asf": dict(zip(FIELDS, ["Author", "WM/AlbumArtist", "Title", "WM/AlbumTitle", "WM/TrackNumber", "WM/Year",
                             "WM/Genre", "MusicBrainz/Track Id", "MusicBrainz/Artist Id"], strict=True)),
    "ape": dict(zip(FIELDS, ["Artist", "Album Artist", "Title", "Album", "Track", "Year", "Genre",
                             "MUSICBRAINZ_TRACKID", "MUSICBRAINZ_ARTISTID"], strict=True)),
}  # fmt: skip
SCHEME = {"mp3": "id3", "aac": "id3", "wav": "id3", "aiff": "id3", "tta": "id3", "mp2": "id3", "flac": "vorbis",
          "ogg": "vorbis", "opus": "vorbis", "m4a": "mp4", "wma": "asf", "wv": "ape"}  # fmt: skip


def make(path: Path, form: str, codec: str, by_ffmpeg: bool) -> None:
    """Write a recording, tagged by FFmpeg if so wanted."""
    noise = (0.1 * np.random.default_rng(0).standard_normal((2, SECONDS * RATE))).astype(np.float32)
    if not form:
        soundfile.write(path, noise.T, RATE, format="OGG", subtype="VORBIS")
        return
    with av.open(str(path), "w", format=form) as output:
        if by_ffmpeg:
            names = [*KEYS["vorbis"].values()]
            names[1], names[4] = "album_artist", "track"
            output.metadata.update(zip(names, TEXT.values(), strict=True))
        stream: Any = output.add_stream(codec, rate=RATE, layout="stereo")
        stream.bit_rate = 128_000
        frame = av.AudioFrame.from_ndarray(noise, "fltp", "stereo")
        frame.sample_rate, frame.pts = RATE, 0
        stream.codec_context.open(strict=False)
        size = stream.codec_context.frame_size or 1024
        converter = av.AudioResampler(stream.codec_context.format, "stereo", RATE, frame_size=size)
        for piece in [*converter.resample(frame), *converter.resample(None)]:
            output.mux(stream.encode(piece))
        output.mux(stream.encode(None))


def tag(path: Path, scheme: str) -> None:
    """Tag `path` with mutagen, as Picard does."""
    file: Any = mutagen.id3.ID3() if path.suffix in {".aac", ".mp2"} else mutagen.File(path)
    if scheme != "id3":
        for field, key in KEYS[scheme].items():
            value: Any = TEXT[field]
            if key == "trkn":
                value = [(3, 9)]
            elif key == "WM/TrackNumber":
                value = ["3"]
            elif key.startswith("----"):
                value = [value.encode()]
            file[key] = value
        file.save()
        return
    frames: Any = file if isinstance(file, mutagen.id3.ID3) else file.tags
    if frames is None:
        file.add_tags()
        frames = file.tags
    for field, key in KEYS["id3"].items():
        name, _, rest = key.partition(":")
        kind = getattr(mutagen.id3, name)
        if name == "UFID":
            frames.add(kind(owner=rest, data=TEXT[field].encode()))
        else:
            frames.add(kind(encoding=3, text=TEXT[field], **({"desc": rest} if rest else {})))
    file.save(path) if isinstance(file, mutagen.id3.ID3) else file.save()


def by_mutagen(path: str) -> Tags:
    """The tags as mutagen gives them, by the keys of the container."""
    file: Any = mutagen.File(path)
    scheme = SCHEME.get(Path(path).suffix[1:], "")
    tags = (file.tags if file is not None else None) or {}
    found = {}
    for field, key in KEYS.get(scheme, {}).items():
        value = tags.get(key) if hasattr(tags, "get") else None
        value = value[0] if isinstance(value, list) and value else value
        value = value[0] if isinstance(value, tuple) else getattr(value, "data", value)
        found[field] = value.decode() if isinstance(value, bytes) else str(value) if value is not None else ""
    return Tags(
        None, *[(int(found.get(f, "").split("/")[0] or 0) if f == "track" else int(found.get(f, "")[:4] or 0)
                 if f == "year" else found.get(f)) or None for f in FIELDS]
    )  # fmt: skip


def by_tinytag(path: str) -> Tags:
    """The tags as TinyTag gives them."""
    found = TinyTag.get(path)
    ids = {re.sub("[^a-z]", "", key.lower()): value[0] for key, value in found.other.items()}
    year = int((found.year or "0")[:4]) or None
    texts = (found.artist, found.albumartist, found.title, found.album, found.track, year, found.genre)
    return Tags(found.duration, *texts, ids.get("musicbrainztrackid"), ids.get("musicbrainzartistid"))


def by_ffmpeg(path: str) -> Tags:
    """The tags as FFmpeg gives them, which is what ffprobe prints."""
    container: Any
    with av.open(path, metadata_errors="replace") as container:
        stream = container.streams.best("audio")
        return _of_ffmpeg({"seconds": 0.0, "tags": {**stream.metadata, **container.metadata}})


def cell(read: Callable[[str], Tags], path: Path) -> str:
    """Which fields `read` gives right."""
    try:
        found = read(str(path))
    except Exception as exc:
        return f"cannot ({type(exc).__name__})"
    right = [field for field in FIELDS if getattr(found, field) == getattr(WANTED, field)]
    missing = [SHORT[field] for field in FIELDS if field not in right]
    if not missing:
        return "all"
    return "none" if not right else f"without {', '.join(missing)}" if len(missing) < 5 else ", ".join(
        SHORT[field] for field in right
    )  # fmt: skip


def speed(read: Callable[[str], Tags], path: Path) -> float:
    """Files a second, the best of three tries."""
    best = 0.0
    for _ in range(3):
        started, n = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - started) < 0.1:
            read(str(path))
            n += 1
        best = max(best, n / elapsed)
    return best


def main() -> None:
    """Print the two tables as Markdown."""
    reader = TagReader()
    readers = {"singerembed": reader.read, "TinyTag": by_tinytag, "FFmpeg": by_ffmpeg, "mutagen": by_mutagen}
    speeds = []
    print(f"| container | tagged by | {' | '.join(readers)} |\n| --- | --- |{' --- |' * len(readers)}")
    with tempfile.TemporaryDirectory() as folder:
        for name, (form, codec) in MADE.items():
            path, scheme = Path(folder, f"a.{name}"), SCHEME.get(name)
            try:
                make(path, form, codec, by_ffmpeg=scheme is None)
                if scheme:
                    tag(path, scheme)
            except Exception as exc:
                print(f"{name}: cannot be made ({type(exc).__name__}: {exc})", file=sys.stderr)
                continue
            cells = [cell(read, path) for read in readers.values()]
            print(f"| {name} | {'mutagen' if scheme else 'FFmpeg'} | {' | '.join(cells)} |")
            if scheme and not any(text.startswith("cannot") for text in cells):
                rates = [speed(read, path) for read in readers.values()]
                speeds.append(f"| {name} | {' | '.join(f'{rate / rates[-1]:.2f}' for rate in rates)} |")
    print(f"\n| container | {' | '.join(readers)} |\n| --- |{' --- |' * len(readers)}")
    print("\n".join(speeds))
    reader.close()


if __name__ == "__main__":
    main()
