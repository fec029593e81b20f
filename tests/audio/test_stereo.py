"""Reading in stereo, and the silence around a recording: what a separator is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import tolerances
from numpy.typing import NDArray

from singerembed.audio.crops import CropPlan, read_crops
from singerembed.audio.limits import TimeLimit
from singerembed.audio.padding import PaddedReader
from singerembed.audio.reader import PcmReader
from singerembed.audio.recording import open_recording
from singerembed.errors import TrackError

RATE = 44_100
DATA = Path(__file__).parent / "data"
Voice = Callable[..., NDArray[np.float32]]


def in_stereo(path: Path, *, isolated: bool = False) -> NDArray[np.float32]:
    with open_recording(str(path), RATE, TimeLimit(60), isolated=isolated, channels=2) as reader:
        return np.asarray(reader.read(1 << 24))


@pytest.fixture
def stereo(voice: Voice) -> NDArray[np.float32]:
    return np.stack([voice(3, f0=200), 0.5 * voice(3, f0=300)], axis=1)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_two_channels_stay_two(tmp_path: Path, stereo: NDArray[np.float32], suffix: str, isolated: bool) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, stereo, RATE, subtype="PCM_24")
    np.testing.assert_allclose(in_stereo(path, isolated=isolated), stereo, atol=2**-23)


def test_one_channel_is_doubled_and_six_are_mixed(tmp_path: Path, stereo: NDArray[np.float32]) -> None:
    soundfile.write(tmp_path / "one.wav", stereo[:, 0], RATE, subtype="PCM_16")
    one = in_stereo(tmp_path / "one.wav")
    assert one.dtype == np.float32
    np.testing.assert_array_equal(one[:, 0], one[:, 1])
    np.testing.assert_allclose(one[:, 0], stereo[:, 0], atol=2**-15)
    soundfile.write(tmp_path / "six.wav", np.repeat(stereo, 3, axis=1), RATE, subtype="FLOAT")
    expected = np.repeat(stereo.mean(axis=1, keepdims=True), 2, axis=1)
    np.testing.assert_allclose(in_stereo(tmp_path / "six.wav"), expected, atol=1e-6)


def test_channels_that_cancel_are_left_alone(tmp_path: Path, stereo: NDArray[np.float32]) -> None:
    soundfile.write(tmp_path / "a.wav", stereo[:, :1] * [1, -1], RATE, subtype="FLOAT")
    np.testing.assert_array_equal(in_stereo(tmp_path / "a.wav"), stereo[:, :1] * np.array([1, -1], np.float32))


def test_resampled_channels_are_those_resampled_alone(tmp_path: Path, stereo: NDArray[np.float32]) -> None:
    soundfile.write(tmp_path / "both.wav", stereo, 48_000, subtype="FLOAT")
    both = in_stereo(tmp_path / "both.wav")
    for i in range(2):
        soundfile.write(tmp_path / "one.wav", stereo[:, i], 48_000, subtype="FLOAT")
        with open_recording(str(tmp_path / "one.wav"), RATE, TimeLimit(60)) as reader:
            np.testing.assert_allclose(both[:, i], reader.read(1 << 24), atol=tolerances.SEEK)


def test_ffmpeg_gives_both_channels(tmp_path: Path, stereo: NDArray[np.float32]) -> None:
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=RATE, layout="stereo", bit_rate=256_000)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(stereo.T), "fltp", "stereo")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    found = in_stereo(path)
    with open_recording(str(path), RATE, TimeLimit(60)) as reader:
        np.testing.assert_allclose(found.mean(axis=1), reader.read(1 << 24), atol=1e-6)
    left, right = np.sqrt((found**2).mean(axis=0))
    assert right / left == pytest.approx(0.5, abs=0.05)


def test_hard_files_read_as_long_in_stereo() -> None:
    for path in sorted(DATA.iterdir()):
        with open_recording(str(path), RATE, TimeLimit(60)) as reader:
            mono = reader.read(1 << 24)
        both = in_stereo(path)
        assert both.shape == (len(mono), 2), path.name


def test_seeking_equals_a_full_read_in_stereo(tmp_path: Path, stereo: NDArray[np.float32]) -> None:
    for rate in (RATE, 32_000):
        soundfile.write(tmp_path / "a.flac", stereo, rate)
        whole = in_stereo(tmp_path / "a.flac")
        with open_recording(str(tmp_path / "a.flac"), RATE, TimeLimit(60), channels=2) as reader:
            for sample in (70_001, 10, 33_333):
                reader.seek(sample)
                part = reader.read(5_000)
                np.testing.assert_allclose(part, whole[sample : sample + 5_000], atol=tolerances.SEEK)


# --- padding --------------------------------------------------------------------------------------------------------


class ArrayReader:
    """A recording in memory."""

    sample_rate = RATE

    def __init__(self, pcm: NDArray[np.float32]) -> None:
        self.pcm, self.position = pcm, 0
        self.notes: list[str] = []

    def read(self, n: int) -> NDArray[np.float32]:
        part = self.pcm[self.position : self.position + n]
        self.position += len(part)
        return part

    def seek(self, sample: int) -> None:
        self.position = min(sample, len(self.pcm))

    def length(self) -> int:
        return len(self.pcm)

    def check_complete(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("shape", [(1000,), (1000, 2), (3, 2), (0, 2)])
@pytest.mark.parametrize("block", [1, 7, 100, 5000])
def test_a_padded_recording(shape: tuple[int, ...], block: int) -> None:
    pcm = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = np.concatenate([np.zeros((50, *shape[1:])), pcm, np.zeros((50, *shape[1:]))])
    reader: PcmReader = PaddedReader(ArrayReader(pcm), 50)
    assert reader.length() == len(expected)
    parts = []
    while len(part := reader.read(block)):
        parts.append(part)
    assert all(len(part) == block for part in parts[:-1])
    np.testing.assert_array_equal(np.concatenate(parts), expected)


@pytest.mark.parametrize("sample", [0, 20, 50, 51, 900, 1049])
def test_a_seek_in_a_padded_recording(sample: int) -> None:
    pcm = np.arange(1, 1001, dtype=np.float32)
    expected = np.concatenate([np.zeros(50), pcm, np.zeros(50)])[sample:]
    reader = PaddedReader(ArrayReader(pcm), 50)
    reader.read(200)
    reader.seek(sample)
    np.testing.assert_array_equal(np.concatenate([reader.read(10), reader.read(5000)]), expected)
    reader.seek(5000)
    assert len(reader.read(10)) == 0


@pytest.mark.parametrize(("hop", "count"), [(40, None), (40, 3), (15, None), (90, None), (90, 2)])
@pytest.mark.parametrize(("start", "stop"), [(0, None), (33, None), (33, 250), (0, 20)])
def test_surrounded_crops_hold_the_crops_in_their_middle(
    hop: int, count: int | None, start: int, stop: int | None
) -> None:
    pcm = np.random.default_rng(0).standard_normal((300, 2)).astype(np.float32)
    plain = CropPlan(40, hop, count, start, stop)
    around = CropPlan(60, hop, count, start, None if stop is None else stop + 20)
    expected = list(read_crops(ArrayReader(pcm), plain, 4))
    found = list(read_crops(PaddedReader(ArrayReader(pcm), 10), around, 4))
    assert [i for block in found for i in block.index] == [i for block in expected for i in block.index]
    np.testing.assert_array_equal(
        np.concatenate([block.start for block in found]), np.concatenate([block.start for block in expected])
    )
    np.testing.assert_array_equal(
        np.concatenate([block.stop for block in found]) - 20, np.concatenate([block.stop for block in expected])
    )
    length = int((expected[0].stop - expected[0].start)[0])
    np.testing.assert_array_equal(
        np.concatenate([block.pcm for block in found])[:, 10 : 10 + length],
        np.concatenate([block.pcm for block in expected])[:, :length],
    )


def test_after_the_end_there_is_nothing() -> None:
    with pytest.raises(TrackError, match="no audio after its start"):
        list(read_crops(PaddedReader(ArrayReader(np.ones((300, 2), np.float32)), 10), CropPlan(60, 40, None, 500), 4))


@pytest.mark.parametrize("rate", [RATE, 48_000])
def test_silence_does_not_stand_for_a_failure(tmp_path: Path, stereo: NDArray[np.float32], rate: int) -> None:
    """What was decoded before the damage comes out without padding; then the failure does."""
    path = tmp_path / "a.flac"
    soundfile.write(path, np.tile(stereo, (4, 1)), rate)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(content)
    with open_recording(str(path), RATE, TimeLimit(60), channels=2) as reader:
        padded = PaddedReader(reader, 1000)
        with pytest.raises(TrackError, match="decoding failed"):
            while len(padded.read(30_000)):
                pass
