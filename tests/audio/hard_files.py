"""Make recordings whose headers are wrong or missing, and say how much audio FFmpeg finds in them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import soundfile
from numpy.typing import NDArray

RATE = 44_100
Samples = NDArray[np.float32]


def song(seconds: float, rate: int = RATE, channels: int = 1, seed: int = 0) -> Samples:
    """Notes of a voice-like tone with some noise, no two seconds alike; [n, channels]."""
    rng = np.random.default_rng(seed)
    n = round(seconds * rate)
    t = np.arange(n) / rate
    pitch = 220 * 2 ** (np.repeat(rng.integers(0, 12, n // (rate // 4) + 1), rate // 4)[:n] / 12)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    tone = sum(np.sin(k * phase) / k for k in range(1, 6)) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))
    mono = 0.2 * tone + 0.005 * rng.standard_normal(n)
    return np.stack([mono * (1 - 0.1 * c) for c in range(channels)], axis=1).astype(np.float32)


def encode(
    path: Path,
    pcm: Samples,
    codec: str,
    rate: int = RATE,
    *,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    streams: int = 1,
    cover: bool = False,
) -> Path:
    """Write `pcm` with FFmpeg; `streams` audio streams, of which the later ones are half as loud."""
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[pcm.shape[1]]
    with av.open(str(path), "w", container_options=container or {}) as output:
        picture: Any = None
        if cover:
            picture = output.add_stream("mjpeg", rate=1)
            picture.width = picture.height = 64
            picture.pix_fmt = "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        made: list[Any] = [
            output.add_stream(codec, rate=rate, layout=layout, options=options or {}) for _ in range(streams)
        ]
        if picture is not None:
            output.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")))
            output.mux(picture.encode(None))
        for number, stream in enumerate(made):
            fifo = av.AudioFifo()
            converter = av.AudioResampler(stream.codec_context.format, layout, rate)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm.reshape(1, -1)) / (1 + number), "flt", layout)
            frame.rate, frame.pts = rate, 0
            for converted in converter.resample(frame):
                fifo.write(converted)
            size = stream.codec_context.frame_size or 1024
            while (piece := fifo.read(size) or fifo.read(0, partial=True)) is not None:
                output.mux(stream.encode(piece))
            output.mux(stream.encode(None))
    return path


def ffmpeg_decodes(path: Path, rate: int = RATE) -> Samples:
    """Everything that FFmpeg decodes of the best audio stream, as mono at `rate`; damaged packets are skipped."""
    parts: list[Samples] = []
    with av.open(str(path), metadata_errors="ignore") as container:
        stream: Any = container.streams.best("audio")
        resampler, form = None, None
        for frame in _frames(container, stream):
            if form != (frame.format.name, frame.layout.name, frame.sample_rate):
                form = (frame.format.name, frame.layout.name, frame.sample_rate)
                parts += _mono(resampler, None)
                resampler = av.AudioResampler("flt", frame.layout, rate)
            frame.pts = None
            parts += _mono(resampler, frame)
        parts += _mono(resampler, None)
    return np.concatenate(parts)


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            continue


def _mono(resampler: Any, frame: Any) -> list[Samples]:
    if resampler is None:
        return []
    return [out.to_ndarray().reshape(-1, out.layout.nb_channels).mean(axis=1) for out in resampler.resample(frame)]


# --- the files ------------------------------------------------------------------------------------------------------


def _patched(path: Path, change: Callable[[bytearray], None]) -> Path:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


def _sound(path: Path, pcm: Samples, rate: int = RATE, **options: Any) -> Path:
    with soundfile.SoundFile(path, "w", rate, pcm.shape[1], **options) as file:
        for start in range(0, len(pcm), 65_536):
            file.write(pcm[start : start + 65_536])
    return path


def _mp3(path: Path, seconds: float = 9, *, vbr: bool = True, xing: bool = True, seed: int = 0, **kwargs: Any) -> Path:
    options = {"q": "4"} if vbr else {"b": "128k"}
    return encode(
        path,
        song(seconds, seed=seed),
        "libmp3lame",
        options=options,
        container={"write_xing": str(int(xing))},
        **kwargs,
    )


def _xing_field(content: bytearray, field: int, value: int) -> None:
    at = max(content.find(b"Xing"), content.find(b"Info"))
    struct.pack_into(">I", content, at + 8 + 4 * field, value)


def _joined(path: Path, make: Callable[[Path, int], Path], n: int = 3) -> Path:
    pieces = [make(path.with_name(f"piece{i}{path.suffix}"), i).read_bytes() for i in range(n)]
    path.write_bytes(b"".join(pieces))
    return path


def _id3(size: int) -> bytes:
    coded = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x03\x00\x00" + coded + bytes(size)


_APE = b"APETAGEX" + struct.pack("<IIII", 2000, 2000, 0, 0) + bytes(8)
_JUNK = np.random.default_rng(1).integers(0, 255, 3000, np.uint8).tobytes()


_FRAGMENTED = {"movflags": "frag_every_frame+empty_moov"}


def _id3_before(content: bytearray) -> None:
    content[:0] = _id3(5000)


def _tagged(content: bytearray) -> None:
    content[:0] = _id3(70_000)
    content += bytes(2000 - 32) + _APE + b"TAG" + bytes(125)


def _too_few_frames(content: bytearray) -> None:
    _xing_field(content, 0, 40)
    _xing_field(content, 1, 9000)


def _other_formats(path: Path, i: int) -> Path:
    rate, channels = ((44_100, 1), (22_050, 2), (48_000, 1))[i]
    return _sound(path, song(5, rate, channels, i), rate)


def _junk_between(content: bytearray) -> None:
    content[len(content) // 2 : len(content) // 2] = _JUNK


def _wav_size(size: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        struct.pack_into("<I", content, content.index(b"data") + 4, size)

    return change


def _flac_total(total: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[21] = content[21] & 0xF0 | total >> 32 & 0x0F
        struct.pack_into(">I", content, 22, total & 0xFFFFFFFF)

    return change


def _ogg(path: Path, i: int, codec: str, rates: tuple[int, ...] = (RATE,), channels: tuple[int, ...] = (1,)) -> Path:
    rate = rates[i % len(rates)]
    return encode(path, song(5 + i, rate, channels[i % len(channels)], seed=i), codec, rate)


HARD_FILES: dict[str, Callable[[Path], Path]] = {
    "mp3 vbr, Xing": lambda f: _mp3(f / "a.mp3"),
    "mp3 cbr, Xing": lambda f: _mp3(f / "a.mp3", vbr=False),
    "mp3 vbr, no Xing": lambda f: _mp3(f / "a.mp3", xing=False),
    "mp3 cbr, no Xing": lambda f: _mp3(f / "a.mp3", vbr=False, xing=False),
    "mp3 Xing, frames too few": lambda f: _patched(_mp3(f / "a.mp3"), _too_few_frames),
    "mp3 Xing, bytes too many": lambda f: _patched(_mp3(f / "a.mp3"), lambda c: _xing_field(c, 1, 2 * len(c))),
    "mp3 joined": lambda f: _joined(f / "a.mp3", lambda p, i: _mp3(p, 4 + i, seed=i)),
    "mp3 joined, one length": lambda f: _joined(f / "a.mp3", lambda p, i: _mp3(p, 5, vbr=False, seed=i)),
    "mp3 joined, no Xing": lambda f: _joined(f / "a.mp3", lambda p, i: _mp3(p, 4 + i, xing=False, seed=i)),
    "mp3 junk before": lambda f: _patched(_mp3(f / "a.mp3"), lambda c: c.__setitem__(slice(0, 0), _JUNK)),
    "mp3 junk between": lambda f: _patched(_mp3(f / "a.mp3"), _junk_between),
    "mp3 junk after": lambda f: _patched(_mp3(f / "a.mp3"), lambda c: c.extend(_JUNK)),
    "mp3 ID3v2, APE, ID3v1": lambda f: _patched(
        _mp3(f / "a.mp3"), _tagged
    ),
    "ogg vorbis": lambda f: _sound(f / "a.ogg", song(9, channels=2)),
    "ogg vorbis chained": lambda f: _joined(f / "a.ogg", lambda p, i: _sound(p, song(5 + i, seed=i))),
    "ogg vorbis chained, rates and channels": lambda f: _joined(f / "a.ogg", _other_formats),
    "ogg opus": lambda f: _ogg(f / "a.opus", 0, "libopus", (48_000,)),
    "ogg opus chained": lambda f: _joined(f / "a.opus", lambda p, i: _ogg(p, i, "libopus", (48_000,))),
    "ogg flac chained": lambda f: _joined(f / "a.ogg", lambda p, i: _ogg(p, i, "flac")),
    "flac": lambda f: _sound(f / "a.flac", song(9)),
    "flac, ID3v2 before": lambda f: _patched(_sound(f / "a.flac", song(9)), _id3_before),
    "flac total unknown": lambda f: _patched(_sound(f / "a.flac", song(9)), _flac_total(0)),
    "flac total too small": lambda f: _patched(_sound(f / "a.flac", song(9)), _flac_total(2 * RATE)),
    "flac joined": lambda f: _joined(f / "a.flac", lambda p, i: _sound(p, song(4 + i, seed=i))),
    "flac joined, one length": lambda f: _joined(f / "a.flac", lambda p, i: _sound(p, song(5, seed=i))),
    "wav": lambda f: _sound(f / "a.wav", song(9, channels=2)),
    "wav size 0": lambda f: _patched(_sound(f / "a.wav", song(9)), _wav_size(0)),
    "wav size unknown": lambda f: _patched(_sound(f / "a.wav", song(9)), _wav_size(0xFFFFFFFF)),
    "wav size too small": lambda f: _patched(_sound(f / "a.wav", song(9)), _wav_size(4 * RATE)),
    "wav ID3 before": lambda f: _patched(_sound(f / "a.wav", song(9)), _id3_before),
    "wav adpcm": lambda f: _sound(f / "a.wav", song(9), subtype="MS_ADPCM"),
    "rf64": lambda f: _sound(f / "a.wav", song(9), format="RF64"),
    "w64": lambda f: _sound(f / "a.w64", song(9)),
    "caf": lambda f: _sound(f / "a.caf", song(9)),
    "aiff": lambda f: _sound(f / "a.aiff", song(9)),
    "au": lambda f: _sound(f / "a.au", song(9)),
    "m4a": lambda f: encode(f / "a.m4a", song(9, channels=2), "aac"),
    "m4a fragmented": lambda f: encode(f / "a.m4a", song(9), "aac", container=_FRAGMENTED),
    "m4a, cover first": lambda f: encode(f / "a.mp4", song(9), "aac", cover=True),
    "m4a, two streams": lambda f: encode(f / "a.m4a", song(9), "aac", streams=2),
    "m4a, no edit list": lambda f: encode(f / "a.m4a", song(9), "aac", container={"use_editlist": "0"}),
    "alac": lambda f: encode(f / "a.m4a", song(9), "alac"),
    "aac adts": lambda f: encode(f / "a.aac", song(9), "aac"),
    "aac adts joined": lambda f: _joined(f / "a.aac", lambda p, i: encode(p, song(4 + i, seed=i), "aac")),
    "ac3 5.1": lambda f: encode(f / "a.ac3", song(9, 48_000, 6), "ac3", 48_000),
    "wma": lambda f: encode(f / "a.wma", song(9), "wmav2", options={"b": "128k"}),
    "wavpack": lambda f: encode(f / "a.wv", song(9), "wavpack"),
    "mka opus": lambda f: encode(f / "a.mka", song(9, 48_000), "libopus", 48_000),
    "mka aac": lambda f: encode(f / "a.mka", song(9), "aac"),
    "mka flac": lambda f: encode(f / "a.mka", song(9), "flac"),
    "webm vorbis": lambda f: encode(f / "a.webm", song(9, channels=2), "vorbis", options={"strict": "-2"}),
    "mpegts": lambda f: encode(f / "a.ts", song(9), "aac"),
    "mp2": lambda f: encode(f / "a.mp2", song(9), "mp2"),
}  # fmt: skip


def main() -> None:
    """Print how many seconds of each file FFmpeg decodes, and how many are read."""
    import tempfile

    from singerembed.audio.limits import TimeLimit
    from singerembed.audio.recording import open_recording

    print("| file | FFmpeg, s | read, s | decoder | note |\n| --- | --- | --- | --- | --- |")
    for name, make in HARD_FILES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = make(Path(folder))
            try:
                expected = f"{len(ffmpeg_decodes(path)) / RATE:.2f}"
            except av.error.FFmpegError:
                expected = "cannot open it"
            with open_recording(str(path), RATE, TimeLimit(60)) as reader:
                n = 0
                while block := len(reader.read(RATE)):
                    n += block
                reader.check_complete()
                decoder = type(getattr(reader, "_source", reader)).__name__.removesuffix("Reader")
                names = {"SoundFile": "libsndfile", "Process": "FFmpeg", "Chained": "libsndfile, by streams"}
                note = "; ".join(reader.notes)
            print(f"| {name} | {expected} | {n / RATE:.2f} | {names[decoder]} | {note} |")


if __name__ == "__main__":
    main()
