"""Files whose headers lie: what is embedded reaches as far as FFmpeg decodes, and is the same audio."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hard_files import HARD_FILES, RATE, Samples, ffmpeg_decodes, song
from tolerances import DECODERS_AGREE, SHORTFALL_SECONDS

from singerembed.audio.crops import CropPlan, read_crops
from singerembed.audio.limits import TimeLimit
from singerembed.audio.recording import open_recording
from singerembed.errors import TrackError

DATA = Path(__file__).parent / "data"
CROP = 4 * RATE
LAG = 4 * 1152
MAX_JOINS = 3  # seconds in which a file changes, where decoders may lose a frame
GOOD_HEADERS = [
    "mp3 vbr, Xing", "mp3 cbr, Xing", "mp3 ID3v2, APE, ID3v1", "ogg vorbis", "ogg opus", "flac", "flac, ID3v2 before",
    "wav", "rf64", "w64", "caf", "aiff", "au",
]  # fmt: skip
CASES = {
    "vbr_without_xing.mp3": 2, "three_joined.mp3": 6, "chained.ogg": 4, "total_samples_unknown.flac": 2,
    "data_size_zero.wav": 2, "antiphase.flac": 2,
}  # fmt: skip


# What FFmpeg does not open is known by how it was made.
NOT_BY_FFMPEG: dict[str, Callable[[], Samples]] = {
    "ogg vorbis chained, rates and channels": lambda: np.concatenate([song(5, seed=i)[:, 0] for i in range(3)]),
    "wav ID3 before": lambda: song(9)[:, 0],
}


def expected_of(name: str, path: Path) -> Samples:
    return NOT_BY_FFMPEG[name]() if name in NOT_BY_FFMPEG else ffmpeg_decodes(path)


def read_all(path: Path) -> tuple[Samples, list[str]]:
    parts = []
    with open_recording(str(path), RATE, TimeLimit(60)) as reader:
        while len(pcm := reader.read(CROP)):
            parts.append(pcm.astype(np.float32) / (32768 if pcm.dtype == np.int16 else 1))
        reader.check_complete()
        return np.concatenate(parts), list(reader.notes)


@pytest.mark.parametrize("name", list(HARD_FILES))
def test_everything_that_ffmpeg_decodes_is_read(name: str, tmp_path: Path) -> None:
    path = HARD_FILES[name](tmp_path)
    expected = expected_of(name, path)
    found, _ = read_all(path)
    assert len(found) >= len(expected) - SHORTFALL_SECONDS * RATE
    assert likeness(found, expected) >= DECODERS_AGREE
    with open_recording(str(path), RATE, TimeLimit(60)) as reader:
        assert abs(reader.length() - len(found)) <= SHORTFALL_SECONDS * RATE


@pytest.mark.parametrize("name", list(HARD_FILES))
def test_spaced_crops_lie_where_the_consecutive_ones_do(name: str, tmp_path: Path) -> None:
    path = HARD_FILES[name](tmp_path)
    found, _ = read_all(path)
    plan = CropPlan(RATE // 2, RATE // 2, 5)
    with open_recording(str(path), RATE, TimeLimit(60)) as reader:
        blocks = list(read_crops(reader, plan, 4))
    assert len(blocks) == min(5, len(found) // plan.crop_samples)
    for block in blocks:
        start = int(block.start[0])
        crop = block.pcm[0].astype(np.float32) / (32768 if block.pcm.dtype == np.int16 else 1)
        assert np.corrcoef(crop, found[start : start + plan.crop_samples])[0, 1] >= DECODERS_AGREE


@pytest.mark.parametrize("name", list(CASES))
def test_reported_files(name: str) -> None:
    found, notes = read_all(DATA / name)
    assert len(found) // CROP == CASES[name]
    assert np.abs(found).max() > 0.05
    assert notes


def test_ffmpeg_failing_on_what_libsndfile_reads_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A WAV with a large chunk behind its samples, which FFmpeg is asked about; it opens the file and then dies."""
    path = HARD_FILES["wav"](tmp_path)
    path.write_bytes(path.read_bytes() + b"LIST" + (200_000).to_bytes(4, "little") + bytes(200_000))
    asked = []

    def crash(*_arguments: object) -> int:
        asked.append(1)
        raise TrackError("decoder_crashed", "as if")

    monkeypatch.setattr("singerembed.audio.process.ProcessReader.length", crash)
    assert len(read_all(path)[0]) == 9 * RATE
    assert asked


@pytest.mark.parametrize("name", GOOD_HEADERS)
def test_a_good_header_is_believed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No decoder process, and nothing to note."""

    def refuse(*_arguments: object) -> None:
        raise AssertionError("FFmpeg was asked")

    monkeypatch.setattr("singerembed.audio.recording.ProcessReader", refuse)
    assert read_all(HARD_FILES[name](tmp_path))[1] == []


def test_cancelling_channels_do_not_depend_on_how_they_are_read(tmp_path: Path) -> None:
    pcm = song(3)[:, 0]
    half = np.where(np.arange(len(pcm)) < len(pcm) // 2, -1, 1)
    soundfile.write(tmp_path / "a.wav", np.stack([pcm, 0.95 * half * pcm], axis=1), RATE, subtype="FLOAT")
    whole, notes = read_all(tmp_path / "a.wav")
    assert "the channels cancel in 50%" in notes[0]
    np.testing.assert_allclose(whole[:RATE], pcm[:RATE])  # the louder channel
    np.testing.assert_allclose(whole[-RATE:], 0.975 * pcm[-RATE:], rtol=1e-5, atol=1e-7)  # the mean
    with open_recording(str(tmp_path / "a.wav"), RATE, TimeLimit(60)) as reader:
        for position in (100, 60_000, 66_000, 5):
            reader.seek(position)
            np.testing.assert_array_equal(reader.read(777), whole[position : position + 777])


def likeness(found: Samples, expected: Samples) -> float:
    """Lowest but one correlation of the seconds of `expected` with `found`, at the best lag of up to four frames."""
    values = []
    for start in range(0, len(expected) - RATE // 4, RATE):
        second = expected[start : start + RATE]
        first = max(0, start - LAG)
        around = found[first : start + RATE + LAG]
        if len(around) < len(second):
            break
        n = 2 * len(around)
        products = np.fft.irfft(np.fft.rfft(around, n) * np.conj(np.fft.rfft(second, n)))
        best = int(np.argmax(products[: len(around) - len(second) + 1]))
        values.append(float(np.corrcoef(around[best : best + len(second)], second)[0, 1]))
    return sorted(values)[min(MAX_JOINS, (len(values) - 1) // 3)]
