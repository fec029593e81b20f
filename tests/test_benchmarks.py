"""What the benchmarks share: catalogues of voices, and folders that are made of them once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks.trials import Trials
from benchmarks.vector_index import METHODS, Nearest, methods_named
from benchmarks.voices import make_once, read_voices
from singerembed.errors import InputError, OutputError, UsageError


def test_voices_are_mono_at_full_scale_whatever_the_file_is(tmp_path: Path) -> None:
    seconds = np.arange(2 * 22_050) / 22_050
    tone = 0.5 * np.sin(2 * np.pi * 220 * seconds)
    soundfile.write(tmp_path / "16.wav", np.stack([tone, tone], 1), 22_050, subtype="PCM_16")
    soundfile.write(tmp_path / "float.wav", tone, 22_050, subtype="FLOAT")
    (tmp_path / "voices.csv").write_text("path,singer\n16.wav,AC/DC\nfloat.wav,\n", encoding="utf-8")
    voices = read_voices(str(tmp_path / "voices.csv"))
    assert [(voice.singer, voice.song) for voice in voices] == [("AC/DC", "16.wav"), ("float.wav", "float.wav")]
    for voice in voices:
        samples = voice.samples()
        assert samples.shape == (88_200,)
        assert 0.49 < np.abs(samples[1000:-1000]).max() < 0.51
    (tmp_path / "16.wav").unlink()
    with pytest.raises(InputError, match=r"16\.wav"):
        voices[0].samples()


def test_a_folder_is_made_once_and_of_one_thing(tmp_path: Path) -> None:
    made, calls = tmp_path / "made", []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "one.txt").write_text("one", encoding="utf-8")
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once(made, {"font": "a"}, make)
    assert not list(tmp_path.iterdir())
    make_once(made, {"font": "a"}, make)
    make_once(made, {"font": "a"}, make)
    assert len(calls) == 2
    with pytest.raises(OutputError, match="another catalogue or sound font"):
        make_once(made, {"font": "b"}, make)


def test_the_nearest_rows_of_blocks_are_those_of_all_rows() -> None:
    scores = np.random.default_rng(0).random((3, 45), np.float32)
    nearest = Nearest(3, 10)
    for first in (0, 20, 40):  # the last has fewer rows than are wanted
        nearest.add(scores[:, first : first + 20])
    np.testing.assert_array_equal(nearest.rows, np.argsort(-scores, axis=1)[:, :10])


def test_methods_are_chosen_by_parts_of_their_names() -> None:
    assert methods_named("") == list(METHODS)
    assert methods_named("voyager, int8, lancedb") == [
        "usearch HNSW int8", "voyager 8-bit floats", "lancedb IVF_PQ",
    ]  # fmt: skip
    assert all(methods_named(name) == [name] for name in METHODS)
    with pytest.raises(UsageError, match="annoy"):
        methods_named("SQ8,annoy")


def test_crops_of_one_song_are_not_compared_unless_two_singers_sing_it() -> None:
    trials = Trials(["a", "a", "a", "b"], ["one", "one", "two", "two"])
    assert sorted(zip(trials.first, trials.second, trials.same, strict=True)) == [
        (0, 2, True), (0, 3, False), (1, 2, True), (1, 3, False), (2, 3, False),
    ]  # fmt: skip
    scores = np.array([[1, 1, 0.8, 0.1], [1, 1, 0.8, 0.1], [0.8, 0.8, 1, 0.2], [0.1, 0.1, 0.2, 1]])
    assert trials.rate(scores) == 0
    assert trials.nearest(scores) == 75  # b has no other song
