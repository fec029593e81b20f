"""Say whether libsndfile's length of a file can be believed, by looking at the file itself.

libsndfile reads no further than the number of frames it finds at opening. For some files that is a guess (MP3 without a
Xing header), for others it covers the first of several pieces (MP3, Ogg or FLAC files joined end to end), and for
others it was never filled in (WAV and FLAC written to a pipe). A length is believed where the end of the file, or
places within it, agree with it. All of that takes a few reads of some kilobytes.

Formats: ISO 11172-3 for MPEG frames, the Xing/Info and LAME tags as their encoders write them, RFC 3533 for Ogg pages,
RFC 9639 for FLAC frames.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# Bytes that a header, tags and chunks after the audio may take in a file whose audio has a known size.
_OTHER_BYTES = 65_536
_PROBES = (0.25, 0.5, 0.75)  # places in the file, between 0 and 1, where positions must rise
_PROBE_BYTES = 16_384
_OGG_PAGE_BYTES = 65_307  # at most
# A frame of an MP3 has at most 1441 bytes, and encoders differ by one frame in what they count.
_MP3_SLACK_BYTES = 3_000
_BYTES_PER_SAMPLE = {
    "PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8, "ULAW": 1, "ALAW": 1,
}  # fmt: skip


@dataclass(frozen=True)
class HeaderCheck:
    """What was found out about the length in a header."""

    believed: bool
    promised_seconds: float = 0.0  # by a header that other evidence contradicts; 0: it promises nothing


def check_header(path: str, kind: str, subtype: str, channels: int, frames: int) -> HeaderCheck:
    """Compare the length `frames` that libsndfile gives for `path` with the file.

    `kind` and `subtype` are libsndfile's names of the format. Raises OSError.
    """
    with Path(path).open("rb") as file:
        size = file.seek(0, 2)
        if kind == "MP3":
            return _check_mp3(file, size)
        if kind == "FLAC":
            return HeaderCheck(_flac_agrees(file, size, frames))
        if kind == "OGG":
            return HeaderCheck(_ogg_agrees(file, size))
    sample_bytes = _BYTES_PER_SAMPLE.get(subtype)
    if sample_bytes is None or frames == 0:
        return HeaderCheck(False)
    return HeaderCheck(size - frames * channels * sample_bytes <= _OTHER_BYTES)


def _read_at(file: BinaryIO, offset: int, n: int) -> bytes:
    file.seek(max(0, offset))
    return file.read(n)


# --- MP3 ------------------------------------------------------------------------------------------------------------

_MP3_SYNC = re.compile(rb"\xff[\xe2-\xff]")
_MP3_RATES = (44_100, 48_000, 32_000)


def _check_mp3(file: BinaryIO, size: int) -> HeaderCheck:
    """Believe a Xing header whose number of bytes leads to the end of the audio."""
    start = _end_of_id3v2(file)
    head = _read_at(file, start, _PROBE_BYTES)
    match = _MP3_SYNC.search(head)
    if match is None:
        return HeaderCheck(False)
    frame = head[match.start() :]
    tag = re.search(rb"Xing|Info", frame[:64])
    if tag is None or len(frame) < tag.end() + 12:
        return HeaderCheck(False)
    flags, frames, n_bytes = struct.unpack_from(">III", frame, tag.end())
    if not flags & 1:
        return HeaderCheck(False)
    is_mpeg1 = frame[1] & 0x18 == 0x18
    rate = _MP3_RATES[min(2, frame[2] >> 2 & 3)] >> (0 if is_mpeg1 else 1 if frame[1] & 0x10 else 2)
    seconds = frames * (1152 if is_mpeg1 else 576) / rate
    end = size - _tags_at_the_end(file, size)
    agrees = bool(flags & 2) and abs(start + match.start() + n_bytes - end) <= _MP3_SLACK_BYTES
    return HeaderCheck(agrees, 0.0 if agrees else seconds)


def _end_of_id3v2(file: BinaryIO) -> int:
    """Offset behind all ID3v2 tags at the beginning of the file."""
    offset = 0
    while (head := _read_at(file, offset, 10))[:3] == b"ID3" and len(head) == 10:
        footer = 10 if head[5] & 0x10 else 0
        size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        offset += 10 + size + footer
    return offset


def _tags_at_the_end(file: BinaryIO, size: int) -> int:
    """Bytes of ID3v1, APE and Lyrics3 tags at the end of the file."""
    end = size
    while True:
        tail = _read_at(file, end - 160, min(160, end))
        if tail[-128:-125] == b"TAG":
            end -= 128
        elif tail[-32:-24] == b"APETAGEX":
            n_bytes, _, flags = struct.unpack("<III", tail[-20:-8])
            end -= n_bytes + (32 if flags >> 31 else 0)
        elif tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit():
            end -= int(tail[-15:-9]) + 15
        else:
            return size - max(0, end)


# --- Ogg ------------------------------------------------------------------------------------------------------------


def _ogg_agrees(file: BinaryIO, size: int) -> bool:
    """One stream from the first page to the last, whose positions rise."""
    first = _read_at(file, 0, 27)
    if first[:4] != b"OggS":
        return False
    serial = first[14:18]
    position = -1
    for offset in [*(int(size * share) for share in _PROBES), size - 2 * _OGG_PAGE_BYTES]:
        data = _read_at(file, offset, 2 * _OGG_PAGE_BYTES)
        pages = [at.start() for at in re.finditer(rb"OggS\x00", data) if at.start() + 27 <= len(data)]
        found = [struct.unpack_from("<q", data, at + 6)[0] for at in pages]
        if any(data[at + 14 : at + 18] != serial for at in pages):
            return False
        rising = [p for p in found if p != -1]  # -1: no packet ends on that page
        if rising != sorted(rising) or (rising and rising[-1] < position):
            return False
        position = max([position, *rising])
    return True


# --- FLAC -----------------------------------------------------------------------------------------------------------


def _flac_agrees(file: BinaryIO, size: int, frames: int) -> bool:
    """The last frame ends at sample `frames`, and the numbers of frames before it rise."""
    start = _end_of_id3v2(file)
    head = _read_at(file, start, 42)
    if head[:4] != b"fLaC" or len(head) < 42:
        return False
    largest, block = int.from_bytes(head[15:18], "big"), int.from_bytes(head[8:10], "big")
    reach = max(_PROBE_BYTES, 2 * largest)
    end = size - _tags_at_the_end(file, size)
    ends = []
    for offset in [*(int(end * share) for share in _PROBES), end - reach]:
        found = _flac_frame_ends(_read_at(file, offset, reach), block, frames)
        ends.append(found)
    if not ends[-1] or ends[-1][-1] != frames:
        return False
    firsts = [found[0] for found in ends if found]
    return firsts == sorted(firsts)


def _flac_frame_ends(data: bytes, stream_block: int, frames: int) -> list[int]:
    """For each frame header in `data`, the number of the sample behind that frame, as far as it is in 0 to `frames`."""
    ends = []
    for match in re.finditer(rb"\xff[\xf8\xf9]", data):
        header = data[match.start() : match.start() + 16]
        parsed = _flac_header(header, stream_block)
        if parsed is not None and 0 < parsed <= frames:
            ends.append(parsed)
    return ends


def _flac_header(header: bytes, stream_block: int) -> int | None:
    """The sample behind the frame of `header`; None if that is no frame header (its CRC-8 tells)."""
    if len(header) < 6:
        return None
    coded = header[4]
    extra = _leading_ones(coded) - 1 if coded & 0x80 else 0  # bytes that follow, as in UTF-8
    if not 0 <= extra <= 6 or len(header) < 5 + extra:
        return None
    number = coded & (0x7F >> (extra + 1)) if extra else coded
    for byte in header[5 : 5 + extra]:
        number = number << 6 | byte & 0x3F
    size_code, rate_code = header[2] >> 4, header[2] & 15
    at = 5 + extra
    if size_code in {6, 7}:
        width = size_code - 5
        block = int.from_bytes(header[at : at + width], "big") + 1
        at += width
    elif size_code == 1:
        block = 192
    elif 2 <= size_code <= 5:
        block = 576 << (size_code - 2)
    elif size_code >= 8:
        block = 256 << (size_code - 8)
    else:
        return None
    at += 1 if rate_code == 12 else 2 if rate_code in {13, 14} else 0
    if rate_code == 15 or at >= len(header) or _crc8(header[:at]) != header[at]:
        return None
    return number + block if header[1] & 1 else number * stream_block + block


def _leading_ones(byte: int) -> int:
    return 8 - (byte ^ 0xFF).bit_length()


def _crc8(data: bytes) -> int:
    """CRC-8 of FLAC frame headers, polynomial x^8 + x^2 + x + 1."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x07) & 0xFF if crc & 0x80 else crc << 1
    return crc
