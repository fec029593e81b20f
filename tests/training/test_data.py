from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from numpy.typing import NDArray
from training_audio import RATE, tone, write
from training_config import small_config

from singerembed.errors import SingerEmbedError, UsageError
from training import evaluate, pitch_variants
from training.augment import PitchShifter, Samples
from training.config import TrainConfig
from training.data import PairData, PairDataset, PairKey, PairSampler
from training.reading import active_share, draw_crop, read_crop
from training.recordings import TRAIN, VALIDATION, Recording, build_index
from training.validation import CropDataset


def pairs(config: TrainConfig, devices: int = 1) -> tuple[PairDataset, PairSampler]:
    recordings = [each for each in build_index(config) if each.split == TRAIN]
    dataset = PairDataset(recordings, config)
    return dataset, PairSampler(dataset, len(recordings), config, devices)


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_reading_by_seeking_equals_a_slice(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, RATE)
    path = write(tmp_path / f"a.{suffix}", np.stack([noise, -noise / 2], axis=1))
    whole = soundfile.read(path, dtype="float32")[0].mean(axis=1)
    np.testing.assert_allclose(read_crop(path, 0.25, 1000, RATE), whole[11_025:12_025], atol=1e-6)
    tail = read_crop(path, 0.99, 1000, RATE)
    np.testing.assert_allclose(tail[:441], whole[-441:], atol=1e-6)
    assert not tail[441:].any()


def test_reading_resamples(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", tone(2, 48_000), 48_000)
    crop = read_crop(path, 1.0, RATE // 2, RATE)
    np.testing.assert_allclose(crop, tone(2)[RATE : RATE + RATE // 2], atol=2e-3)


def test_active_share() -> None:
    pcm = np.zeros(RATE, np.float32)
    assert active_share(pcm, RATE, -60.0) == -1.0
    pcm[: RATE // 4] = tone(0.25).astype(np.float32)
    assert active_share(pcm, RATE, -60.0) == pytest.approx(0.25)
    assert active_share(pcm * np.float32(1e-3), RATE, -60.0) == -1.0  # -66 dBFS
    for broken in (np.nan, np.inf, -np.inf):
        pcm[7] = broken
        assert active_share(pcm, RATE, -60.0) == -1.0


def test_what_lies_behind_the_end_of_a_recording_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", np.concatenate([tone(1), np.full(RATE, 0.9)]))
    crop, _ = draw_crop(
        Recording(path, "s", 1.0), path, RATE + 400, RATE, small_config(tmp_path), np.random.default_rng()
    )
    assert crop.shape == (RATE + 400,)
    np.testing.assert_allclose(crop[:RATE], 2 * tone(1), atol=1e-3)
    assert not crop[RATE:].any()


def test_silence_is_avoided(tmp_path: Path) -> None:
    pcm = np.concatenate([np.zeros(4 * RATE), tone(2), np.zeros(4 * RATE)])
    recording = Recording(write(tmp_path / "a.wav", pcm), "s", 10.0)
    config = small_config(tmp_path)
    crops = [
        draw_crop(recording, recording.path, 2 * RATE, RATE, config, np.random.default_rng(i))[0] for i in range(20)
    ]
    assert all(float(np.abs(crop).max()) == pytest.approx(1.0) for crop in crops)
    # One blind draw in three would have the share of voice that is asked for, one in two would be all silence.
    assert np.mean([active_share(crop, RATE, -60.0) >= config.data.min_active for crop in crops]) > 0.9


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_a_pair_is_two_crops_of_its_recording_and_a_function_of_its_key(corpus: Path) -> None:
    dataset, _ = pairs(small_config(corpus))
    first, again, later = dataset[PairKey(0, 1, 2)], dataset[PairKey(0, 1, 2)], dataset[PairKey(1, 1, 2)]
    assert first["groups"] == 2
    clips = first["clips"]
    assert (clips.shape, clips.dtype) == ((2, 22_050), np.float32)
    assert not np.array_equal(clips[0], clips[1])
    np.testing.assert_array_equal(clips, np.asarray(again["clips"]))
    assert not np.array_equal(clips, np.asarray(later["clips"]))


def test_pairs_of_a_singer_are_of_two_recordings(tmp_path: Path) -> None:
    for singer in range(3):
        for recording in range(2):  # the level says which recording a crop is of
            write(
                tmp_path / f"s{singer}" / f"{recording}.wav",
                np.full(RATE, 0.1) * tone(1) + (0.2 if recording else -0.2),
            )
    nothing = {f"{name}_probability": 0 for name in ("pitch", "noise", "gain", "mask")}
    config = small_config(tmp_path, data={"pairs": "singer", "validation_fraction": 0}, augment=nothing)
    dataset, sampler = pairs(config)
    assert len(dataset.groups) == 3
    for position in range(8):
        clips = np.asarray(dataset[PairKey(0, position, position % 3)]["clips"])
        assert {bool(clip.mean() > 0) for clip in clips} == {True, False}
    for batch in sampler:
        assert len({key.group for key in batch}) == 3  # three pairs a batch, three singers


def test_pairs_of_singers_need_singers(corpus: Path, tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav"):
        write(tmp_path / name, tone(1))
    with pytest.raises(UsageError, match="2 recordings of 2 singers"):
        pairs(small_config(tmp_path, data={"pairs": "singer", "validation_fraction": 0}))


def test_a_recording_that_is_gone_or_silent_gives_way(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "corpus"
    shutil.copytree(corpus, home)
    config = small_config(home, data={"validation_fraction": 0})
    dataset, _ = pairs(config)
    recordings = build_index(config)
    Path(recordings[0].path).unlink()
    write(Path(recordings[1].path), np.zeros(5 * RATE))
    for broken, reason in ((0, "not found"), (1, "silent")):
        item = dataset[PairKey(0, 0, broken)]
        assert item["groups"] not in {0, 1}
        assert reason in caplog.text
        caplog.clear()
        dataset[PairKey(1, 0, broken)]
        assert not caplog.records  # once is enough
    shutil.rmtree(home)
    with pytest.raises(SingerEmbedError, match="50 recordings drawn one after the other"):
        dataset[PairKey(0, 0, 0)]


def test_the_recording_of_a_singer_that_is_gone_is_the_one_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a/0", "a/1", "b/0", "b/1"):
        write(tmp_path / f"{name}.wav", tone(1))
    dataset, _ = pairs(small_config(tmp_path, data={"pairs": "singer", "validation_fraction": 0, "batch_size": 2}))
    (tmp_path / "a" / "1.wav").unlink()
    assert dataset[PairKey(0, 0, 0)]["groups"] == 1
    assert "a/1.wav: file not found" in caplog.text
    assert "a/0.wav" not in caplog.text


def test_an_epoch_has_each_recording_as_often_as_asked(corpus: Path) -> None:
    _, sampler = pairs(small_config(corpus, data={"validation_fraction": 0, "pairs_per_recording": 2}))
    epochs = [keys_from(sampler, epoch * len(sampler)) for epoch in range(2)]
    for number, keys in enumerate(epochs):
        assert [key.epoch for key in keys] == [number] * 24
        assert [key.position for key in keys] == list(range(24))
        assert np.bincount([key.group for key in keys]).tolist() == [2] * 12
    assert [key.group for key in epochs[0]] != [key.group for key in epochs[1]]


@pytest.mark.parametrize("step", [0, 1, 3, 4, 7])
def test_the_sampler_goes_on_from_any_step(corpus: Path, step: int) -> None:
    _, sampler = pairs(small_config(corpus, data={"validation_fraction": 0}))
    epoch, done = divmod(step, len(sampler))
    whole = keys_from(sampler, epoch * len(sampler))
    assert keys_from(sampler, step) == whole[done * 3 :]


def keys_from(sampler: PairSampler, step: int) -> list[PairKey]:
    sampler.follow(0, lambda: step)
    return [key for batch in sampler for key in batch]


def test_two_devices_share_what_one_would_have(corpus: Path) -> None:
    joined = pairs(small_config(corpus, data={"validation_fraction": 0, "batch_size": 4}))[1]
    parts = []
    for rank in (0, 1):
        sampler = pairs(small_config(corpus, data={"validation_fraction": 0, "batch_size": 2}), devices=2)[1]
        sampler.follow(rank, lambda: 0)
        parts.append(list(sampler))
    assert [first + second for first, second in zip(*parts, strict=True)] == list(joined)


def test_an_epoch_without_a_batch_is_an_error(corpus: Path) -> None:
    with pytest.raises(UsageError, match="8 pairs, fewer than a batch of 9"):
        pairs(small_config(corpus, data={"batch_size": 9}))


def test_an_epoch_of_one_recording_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", tone(1))
    with pytest.raises(UsageError, match="one recording to train on"):
        pairs(small_config(tmp_path, data={"validation_fraction": 0, "pairs_per_recording": 3}))


# --- variants and validation ----------------------------------------------------------------------------------------


def test_pitch_variants_are_made_once_and_used(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "variants"
    arguments = [str(corpus), str(out), "--count", "1"]
    result = CliRunner().invoke(pitch_variants.main, arguments)
    assert "12 variants" in result.output, result.output
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*.flac")}
    CliRunner().invoke(pitch_variants.main, arguments)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.flac")} == files

    nothing = {f"{name}_probability": 0 for name in ("noise", "gain", "mask")}
    data = {"pitch_variants": str(out), "validation_fraction": 0}
    shifted, _ = pairs(small_config(corpus, augment={**nothing, "pitch_probability": 1.0}, data=data))
    plain, _ = pairs(small_config(corpus, augment={**nothing, "pitch_probability": 0.0}, data=data))
    assert not np.array_equal(
        np.asarray(shifted[PairKey(0, 0, 0)]["clips"]), np.asarray(plain[PairKey(0, 0, 0)]["clips"])
    )
    for path in files:
        path.unlink()
    with pytest.raises(UsageError, match="holds no variants"):
        pairs(small_config(corpus, data=data))


def test_pitch_variants_of_short_recordings_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in" / "short.wav", tone(0.5))
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--count", "1"]

    def full_disk(_path: Path, _content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_disk)
        result = CliRunner().invoke(pitch_variants.main, arguments)
    assert result.exit_code == 1
    assert re.search(r"^Error: .*short\.wav\.0\.flac cannot be written: No space left on device", result.output, re.M)
    assert "1 variants" in CliRunner().invoke(pitch_variants.main, arguments).output


def test_the_pitch_variant_of_a_quiet_recording_loses_nothing(tmp_path: Path) -> None:
    class Inverter(PitchShifter):
        def shift(self, pcm: Samples, *_: Any, **__: Any) -> Samples:
            return -pcm

    quiet = 2e-3 * tone(1)
    soundfile.write(tmp_path / "a.wav", quiet, RATE, "FLOAT")
    config = small_config(tmp_path, data={"pitch_variants": str(tmp_path / "out")})
    recording = Recording(str(tmp_path / "a.wav"), "a", 1.0)
    assert pitch_variants.make_variant(recording, 0, config, Inverter(), seed=0)
    np.testing.assert_allclose(soundfile.read(tmp_path / "out" / "a.wav.0.flac")[0], -quiet, atol=2**-23)


def test_validation_crops_are_the_encoders_length_and_always_the_same(corpus: Path) -> None:
    config = small_config(corpus, data={"validation_crops": 3})
    recordings = [each for each in build_index(config) if each.split == VALIDATION]
    crops = CropDataset(recordings, config)
    assert len(crops) == 12
    assert crops.labels.recordings.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert crops.labels.singers.tolist() == [0] * 6 + [1] * 6
    clip = np.asarray(crops[4]["clips"])
    assert clip.shape == (176_400,)
    np.testing.assert_array_equal(clip, np.asarray(CropDataset(recordings, config)[4]["clips"]))


def made_recordings(n_singers: int, of_each: int, seconds: float = 20.0) -> list[Recording]:
    return [
        Recording(f"{singer}/{i}.wav", str(singer), seconds, split=VALIDATION)
        for singer in range(n_singers)
        for i in range(of_each)
    ]


def test_validation_keeps_two_recordings_of_each_singer_it_draws(corpus: Path) -> None:
    """Where there are more recordings than are compared; else the error rate would rest on a handful of pairs."""
    config = small_config(corpus, data={"validation_crops": 4})
    labels = CropDataset(made_recordings(5000, 4), config).labels
    assert len(labels.singers) == 4096
    per_singer = np.bincount(labels.singers)
    assert (per_singer == 8).all()  # two recordings
    assert len(per_singer) == 512
    assert len(np.unique(labels.recordings)) == 1024


def test_crops_of_one_recording_that_make_a_pair_do_not_overlap(corpus: Path, tmp_path: Path) -> None:
    """Where no singer has two recordings, a pair is two crops of one; a recording too short for two has none."""
    config = small_config(corpus, data={"validation_crops": 3})
    recordings = []
    for number, seconds in enumerate((3.5, 2.2, 1.9)):
        counting = np.arange(round(seconds * RATE)) / (10 * RATE)
        path = write(tmp_path / f"{number}.wav", np.maximum(counting, 1e-3) * tone(seconds))
        recordings.append(Recording(path, str(number), seconds, split=VALIDATION))
    crops = CropDataset(recordings, config, seconds=1.0)
    assert crops.labels.singers.tolist() == [0, 0, 0, 1, 1]
    for i in range(len(crops)):
        stretch = crops._recordings[i]
        assert stretch.seconds >= 1.0
        if i and crops.labels.recordings[i] == crops.labels.recordings[i - 1]:
            before = crops._recordings[i - 1]
            assert stretch.start >= before.start + before.seconds - 1e-9


def test_validation_crops_that_cannot_be_read_do_not_count(corpus: Path) -> None:
    config = small_config(corpus, data={"validation_crops": 2})
    data = PairData(build_index(config), config, devices=1)
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(9, 4)).astype(np.float32)
    without = data.validation_metrics(embeddings[:7], np.array([0, 1, 2, 3, 4, 5, 6]))
    repeated_and_unread = data.validation_metrics(
        embeddings[[0, 1, 2, 3, 4, 5, 6, 0, 8]], np.array([0, 1, 2, 3, 4, 5, 6, 0, -1])
    )
    assert repeated_and_unread == without
    assert all(np.isnan(value) for value in data.validation_metrics(embeddings, np.full(9, -1)).values())


def test_the_score_leaves_out_silent_recordings(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a/0", "a/1", "b/0", "b/1"):
        write(tmp_path / f"{name}.wav", 0.1 * rng.standard_normal(RATE // 2))
    crops = evaluate.labelled_crops(str(tmp_path), 2, seconds=0.25)
    mfcc = evaluate.mfcc_statistics(crops.n_samples)
    alone = evaluate.score(mfcc, crops)
    for name in ("c/0", "c/1"):
        write(tmp_path / f"{name}.wav", np.zeros(RATE // 2))
    assert len(beside := evaluate.labelled_crops(str(tmp_path), 2, seconds=0.25)) == 12
    assert evaluate.score(mfcc, beside) == alone
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(UsageError, match="no two singers"):
        evaluate.score(mfcc, evaluate.labelled_crops(str(tmp_path), 2, seconds=0.25))


def test_both_crops_of_a_pair_are_played_at_one_speed(tmp_path: Path) -> None:
    for name in "abcd":
        write(tmp_path / name / "x.wav", tone(3))
    augment = {"pair_speed": 1.25, "noise_probability": 0.0, "mask_probability": 0.0}
    config = small_config(tmp_path, augment=augment, data={"validation_fraction": 0, "crop_seconds": 1.0})
    dataset, _ = pairs(config)

    def pitch(pcm: NDArray[np.floating]) -> float:
        return float(np.abs(np.fft.rfft(pcm * np.hanning(len(pcm)))).argmax())  # Hz: the crop lasts a second

    speeds = []
    for position in range(8):
        one, other = dataset[PairKey(0, position, position % 4)]["clips"]
        assert one.shape == (RATE,)
        assert pitch(one) == pytest.approx(pitch(other), abs=1)
        speeds.append(pitch(one) / 440)
    assert min(speeds) >= 1 / 1.25 - 0.01
    assert max(speeds) <= 1.25 + 0.01
    assert np.std(speeds) > 0.05
