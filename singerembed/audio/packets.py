"""Hash the encoded audio of a file, which a tagger does not touch."""

from __future__ import annotations

import hashlib
from typing import Any

from singerembed.audio.ffmpeg import opened
from singerembed.errors import TrackError

_DIGEST_BYTES = 16  # the first of BLAKE2b-512; no two of a billion recordings meet by chance


def hash_packets(path: str) -> str:
    """Hash the codec, the sample rate, and the packets of the audio stream in the local file `path`.

    Tags, pictures and the layout of the container do not count. Reads the whole file, and decodes nothing. Raises
    TrackError, FFmpegError and OSError.
    """
    container: Any
    with opened(path) as container:
        stream = container.streams.best("audio")
        if stream is None:
            raise TrackError("no_audio", "the file has no audio stream")
        digest = hashlib.blake2b(f"{stream.codec_context.name} {stream.rate} {stream.channels}".encode())
        for packet in container.demux(stream):
            if packet.size:
                digest.update(packet)
    return digest.hexdigest()[: 2 * _DIGEST_BYTES]
