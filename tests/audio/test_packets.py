"""The hash of a file's encoded audio."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import av
import pytest

from singerembed.audio.limits import TimeLimit
from singerembed.audio.packets import hash_packets
from singerembed.audio.process import packet_hash
from singerembed.errors import TrackError

AUDIO = Path(__file__).parents[2] / "examples" / "audio"
FILES = sorted(AUDIO.iterdir())


def with_tags(path: Path, to: Path) -> None:
    """Copy `path` as a tagger leaves it: other tags, and so other offsets, and the same audio."""
    content = path.read_bytes()
    if path.suffix == ".mp3":
        text = b"\0A title"
        frame = b"TIT2" + struct.pack(">I", len(text)) + b"\0\0" + text + bytes(500)
        to.write_bytes(
            b"ID3\3\0\0\0\0" + bytes([len(frame) >> 7, len(frame) & 127]) + frame + content + b"TAG" + bytes(125)
        )
    elif path.suffix == ".wav":
        chunk = b"INFOINAM" + struct.pack("<I", 8) + b"A title\0"
        grown = content + b"LIST" + struct.pack("<I", len(chunk)) + chunk
        to.write_bytes(grown[:4] + struct.pack("<I", len(grown) - 8) + grown[8:])
    else:
        source: Any
        target: Any
        with av.open(str(path)) as source, av.open(str(to), "w") as target:
            stream = target.add_stream_from_template(source.streams.audio[0])
            target.metadata.update({"title": "A title", "comment": "x" * 3000})
            stream.metadata.update({"title": "A title", "comment": "x" * 3000})
            for packet in source.demux(source.streams.audio[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_tags_do_not_count(path: Path, tmp_path: Path) -> None:
    tagged = tmp_path / path.name
    with_tags(path, tagged)
    assert tagged.read_bytes() != path.read_bytes()
    assert hash_packets(str(tagged)) == hash_packets(str(path))


def test_other_audio_has_another_hash(tmp_path: Path) -> None:
    assert len({hash_packets(str(path)) for path in FILES}) == len(FILES)
    changed = tmp_path / "a.wav"
    content = bytearray((AUDIO / "bass_1.wav").read_bytes())
    content[-1001] ^= 1
    changed.write_bytes(content)
    assert hash_packets(str(changed)) != hash_packets(str(AUDIO / "bass_1.wav"))


def test_the_decoder_process_gives_the_same_and_says_what_is_wrong(tmp_path: Path) -> None:
    assert packet_hash(str(FILES[0]), TimeLimit(60)) == hash_packets(str(FILES[0]))
    (tmp_path / "bad.flac").write_bytes(b"fLaC" + bytes(500))
    with pytest.raises(TrackError):
        packet_hash(str(tmp_path / "bad.flac"), TimeLimit(60))
    shutil.copy(FILES[0], tmp_path / "good")
    assert packet_hash(str(tmp_path / "good"), TimeLimit(60)) == hash_packets(str(FILES[0]))
