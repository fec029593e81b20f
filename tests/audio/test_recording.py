"""Decoding: every format, every defect, and seeking."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import tolerances
from numpy.typing import NDArray

from singerembed.audio.limits import TimeLimit
from singerembed.audio.process import _decode_process
from singerembed.audio.recording import open_recording
from singerembed.errors import TrackError

RATE = 44_100
Voice = Callable[..., NDArray[np.float32]]


def write(path: Path, pcm: NDArray[np.float32], rate: int = RATE, **options: str) -> str:
    with soundfile.SoundFile(path, "w", rate, 1 if pcm.ndim == 1 else pcm.shape[1], **options) as file:
        for start in range(0, len(pcm), 65_536):
            file.write(pcm[start : start + 65_536])
    return str(path)


def write_m4a(path: Path, pcm: NDArray[np.float32], rate: int = RATE, **options: str) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono", options=options)
        for start in range(0, len(pcm) - 1023, 1024):
            frame = av.AudioFrame.from_ndarray(pcm[np.newaxis, start : start + 1024], "fltp", "mono")
            frame.rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def read_all(path: str, rate: int = RATE, block: int = 100_000) -> NDArray[np.float64]:
    """The whole recording at full scale 1; raises what the reader raises, and checks that it was whole."""
    parts = []
    with open_recording(path, rate, TimeLimit(60)) as reader:
        while len(pcm := reader.read(block)):
            parts.append(pcm.astype(np.float64) / (32768 if pcm.dtype == np.int16 else 1))
        reader.check_complete()
    return np.concatenate(parts)


def level(pcm: NDArray[np.floating]) -> float:
    return float(np.sqrt((pcm.astype(np.float64) ** 2).mean()))


@pytest.mark.parametrize(
    ("subtype", "tolerance"),
    [("PCM_U8", 1 / 128), ("PCM_16", 1 / 32768), ("PCM_24", 2e-7), ("PCM_32", 1e-7), ("FLOAT", 0), ("DOUBLE", 0)],
)
def test_sample_types(tmp_path: Path, voice: Voice, subtype: str, tolerance: float) -> None:
    pcm = voice(1.3)
    assert np.abs(read_all(write(tmp_path / "a.wav", pcm, subtype=subtype)) - pcm).max() <= tolerance


def test_16_bit_mono_stays_int16_and_equals_float(tmp_path: Path, voice: Voice) -> None:
    mono = write(tmp_path / "mono.wav", voice(1))
    stereo = write(tmp_path / "stereo.wav", np.stack([voice(1)] * 2, axis=1))
    with open_recording(mono, RATE, TimeLimit(60)) as one, open_recording(stereo, RATE, TimeLimit(60)) as two:
        a, b = one.read(RATE), two.read(RATE)
    assert [a.dtype.name, b.dtype.name] == ["int16", "float32"]
    assert np.array_equal(a.astype(np.float32) / 32768, b)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_averaged(tmp_path: Path, voice: Voice, channels: int) -> None:
    pcm = np.stack([voice(1, f0=100.0 * (c + 1)) for c in range(channels)], axis=1)
    found = read_all(write(tmp_path / "a.wav", pcm, subtype="FLOAT"))
    assert np.allclose(found, pcm.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("name", ["a.flac", "a.mp3", "a.ogg", "a.aiff", "a.opus"])
def test_codecs(tmp_path: Path, voice: Voice, name: str) -> None:
    rate = 48_000 if name == "a.opus" else RATE
    options = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    pcm = voice(5, rate)
    found = read_all(write(tmp_path / name, pcm, rate, **options))
    assert abs(len(found) - 5 * RATE) <= 1
    assert level(found) == pytest.approx(level(pcm), rel=0.05)


def test_what_soundfile_cannot_open_goes_to_pyav(tmp_path: Path, voice: Voice) -> None:
    noisy = voice(5) + 0.05 * np.random.default_rng(0).standard_normal(5 * RATE).astype(np.float32)
    found = read_all(write_m4a(tmp_path / "a.m4a", noisy))
    assert abs(len(found) - 5 * RATE) <= 1024
    assert level(found) == pytest.approx(level(noisy), rel=0.05)
    lags = range(-2000, 2001)
    likeness = [found[50_000:90_000] @ noisy[50_000 + lag : 90_000 + lag] for lag in lags]
    assert lags[int(np.argmax(likeness))] == 0  # the encoder's delay is taken off


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 32_000, 44_099, 48_000, 96_000, 192_000])
def test_resampling_keeps_length_pitch_and_level(tmp_path: Path, rate: int) -> None:
    t = np.arange(3 * rate) / rate
    pcm = (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    found = read_all(write(tmp_path / "a.wav", pcm, rate, subtype="FLOAT"))
    assert len(found) == 3 * RATE
    middle = found[RATE : 2 * RATE]
    assert level(middle) == pytest.approx(0.5 / np.sqrt(2), rel=tolerances.RESAMPLED_LEVEL)
    assert np.argmax(np.abs(np.fft.rfft(middle))) == 440


@pytest.mark.parametrize(
    "name", ["a.wav", "a.flac", "a.mp3", "a.ogg", "a.opus", "a.m4a", "r8000.wav", "r48000.flac", "r44099.wav"]
)
def test_seeking_equals_a_full_read(tmp_path: Path, voice: Voice, name: str) -> None:
    digits = "".join(c for c in name if c.isdigit())
    rate = 48_000 if name == "a.opus" else int(digits) if name.startswith("r") else RATE
    noisy = voice(12, rate) + 0.01 * np.random.default_rng(0).standard_normal(12 * rate).astype(np.float32)
    options = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    path = (
        write_m4a(tmp_path / name, noisy, aac_pns="0")
        if name == "a.m4a"
        else write(tmp_path / name, noisy, rate, **options)
    )
    whole = read_all(path)
    exact = rate == RATE and name not in {"a.mp3", "a.m4a"}
    with open_recording(path, RATE, TimeLimit(60)) as reader:
        for position in (300_000, 0, 1, 44_099, 200_001, 7, len(whole) - 5_000, len(whole) + 10):
            reader.seek(position)
            pcm = reader.read(20_000)
            expected = whole[position : position + 20_000]
            found = pcm.astype(np.float64) / (32768 if pcm.dtype == np.int16 else 1)
            assert len(found) == len(expected)
            assert len(found) == 0 or np.abs(found - expected).max() <= (0 if exact else tolerances.SEEK)


def test_aac_noise_is_other_noise_after_a_seek(tmp_path: Path, voice: Voice) -> None:
    """FFmpeg fills noise bands from a generator whose state is the whole past; the rest is the same, at its place."""
    noisy = voice(12) + 0.01 * np.random.default_rng(0).standard_normal(12 * RATE).astype(np.float32)
    path = write_m4a(tmp_path / "a.m4a", noisy)
    whole = read_all(path)
    with open_recording(path, RATE, TimeLimit(60)) as reader:
        reader.seek(200_001)
        found = reader.read(20_000)
    here, beside = whole[200_001:220_001], whole[200_002:220_002]
    assert 0 < level(found - here) < 0.1 * level(found - beside)


@pytest.mark.parametrize("block", [1, 999, 44_100, 1_000_000])
def test_blocks_do_not_matter(tmp_path: Path, voice: Voice, block: int) -> None:
    path = write(tmp_path / "a.flac", voice(0.5, 48_000), 48_000)
    assert np.array_equal(read_all(path, block=block), read_all(path, block=10_007))


@pytest.mark.parametrize("name", ["a.wav", "a.aiff", "a.mp3", "a.flac", "a.ogg"])
def test_a_cut_file_gives_what_is_there_and_then_says_so(tmp_path: Path, voice: Voice, name: str) -> None:
    path = Path(write(tmp_path / name, voice(12)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    read = 0
    with open_recording(str(path), RATE, TimeLimit(60)) as reader, pytest.raises(TrackError) as caught:
        while n := len(reader.read(RATE)):
            read += n
        reader.check_complete()
    assert 4 * RATE < read < 8 * RATE
    assert caught.value.code in {"truncated", "decode_failed"}
    assert "s" in str(caught.value)


def test_a_wav_written_to_a_pipe_is_not_called_cut(tmp_path: Path, voice: Voice) -> None:
    """Programs that cannot seek back leave 0xFFFFFFFF where the length belongs."""
    path = Path(write(tmp_path / "a.wav", voice(2)))
    content = bytearray(path.read_bytes())
    data = content.index(b"data")
    content[4:8] = content[data + 4 : data + 8] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert len(read_all(str(path))) == 2 * RATE


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda p: None, "not_found", "file not found"),
        (lambda p: p.touch(), "no_audio", "empty"),
        (lambda p: p.mkdir(), "unreadable", "is a folder"),
        (lambda p: p.write_text("these are words, not audio. " * 50), "decode_failed", "cannot decode"),
        (os.mkfifo, "unreadable", "not a regular file"),
        (lambda p: p.write_bytes(b"RIFF\x24\0\0\0WAVEfmt "), "decode_failed", "cannot decode"),
    ],
    ids=["missing", "empty", "folder", "text", "pipe", "stub"],
)
def test_defects(tmp_path: Path, make: Callable[[Path], object], code: str, message: str) -> None:
    path = tmp_path / "a.wav"
    make(path)
    with pytest.raises(TrackError, match=message) as caught:
        read_all(str(path))
    assert caught.value.code == code


def test_no_permission(tmp_path: Path, voice: Voice) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = Path(write(tmp_path / "a.wav", voice(1)))
    path.chmod(0)
    with pytest.raises(TrackError, match="Permission denied"):
        read_all(str(path))


@pytest.mark.parametrize(("rate", "channels", "message"), [(500, 1, "500 Hz"), (44_100, 100, "100 channels")])
def test_absurd_headers_are_refused(tmp_path: Path, rate: int, channels: int, message: str) -> None:
    path = write(tmp_path / "a.wav", np.zeros((100, channels), np.float32), rate)
    with pytest.raises(TrackError, match=message) as caught:
        read_all(path)
    assert caught.value.code == "unsupported"


def test_a_header_that_promises_weeks_costs_no_memory(tmp_path: Path) -> None:
    """The FLAC header claims 2^36 - 1 samples, 256 GiB in float32."""
    path = Path(write(tmp_path / "a.flac", np.zeros(RATE, np.float32)))
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F
    content[22:26] = b"\xff" * 4
    path.write_bytes(content)
    with pytest.raises(TrackError) as caught:
        read_all(str(path))
    assert caught.value.code in {"decode_failed", "truncated"}


def test_a_decoder_that_dies_costs_its_track_only(tmp_path: Path, voice: Voice) -> None:
    path = write_m4a(tmp_path / "a.m4a", voice(5))
    with open_recording(path, RATE, TimeLimit(60)) as reader:
        reader.read(1000)
        process = _decode_process()
        process._process.send_signal(signal.SIGSEGV)
        process._process.wait()
        with pytest.raises(TrackError, match="signal 11") as caught:
            reader.read(1000)
    assert caught.value.code == "decoder_crashed"
    assert len(read_all(path)) > 4 * RATE


def test_a_decoder_that_hangs_is_killed(tmp_path: Path, voice: Voice) -> None:
    path = write_m4a(tmp_path / "a.m4a", voice(5))
    limit = TimeLimit(0.5)
    with open_recording(path, RATE, limit) as reader, limit.counting():
        reader.read(1000)
        process = _decode_process()
        process._process.send_signal(signal.SIGSTOP)
        with pytest.raises(TrackError, match=r"longer than 0.5 s") as caught:
            reader.read(1000)
    assert caught.value.code == "decode_timeout"
    assert not process.alive()
    assert len(read_all(path)) > 4 * RATE


def test_the_time_limit_counts_decoding_alone() -> None:
    limit = TimeLimit(0.2)
    time.sleep(0.3)
    assert limit.remaining() > 0
    with limit.counting():
        time.sleep(0.3)
        with pytest.raises(TrackError, match="--track-timeout"):
            limit.remaining()
    with pytest.raises(TrackError):
        limit.remaining()


def test_the_decoder_process_ends_with_its_parent(tmp_path: Path, voice: Voice) -> None:
    path = write_m4a(tmp_path / "a.m4a", voice(2))
    code = (
        "import os, sys\n"
        "from singerembed.audio.limits import TimeLimit\n"
        "from singerembed.audio.process import _decode_process\n"
        "from singerembed.audio.recording import open_recording\n"
        f"with open_recording({path!r}, 44100, TimeLimit(60)) as reader:\n"
        "    reader.read(10)\n"
        "    print(_decode_process()._process.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    worker = int(result.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()
