"""The recipe of free voices: speech taken apart, made to sing, recorded, and laid out."""

from __future__ import annotations

import io
import struct
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pyworld
import soundfile
import tolerances
from click.testing import CliRunner

from singerembed.errors import UsageError
from training.recipes import free_voices
from training.recipes.channel import through_channel
from training.recipes.singing import Speech, analyse, draw_notes, draw_phrases, draw_tract, render
from training.recipes.speakers import SAMPLE_RATE, SPEAKERS, Samples, Speaker, read_lines, read_speech
from training.synthetic import draw_singer, sing


@pytest.fixture(scope="module")
def speech() -> Speech:
    rng = np.random.default_rng(0)
    pieces = [np.concatenate([sing(draw_singer(rng), 0.8, rng), np.zeros(8000)]) for _ in range(4)]
    return analyse(np.concatenate(pieces), SAMPLE_RATE)


@pytest.mark.parametrize("draw", [draw_notes, draw_phrases])
def test_the_voice_sings_the_pitch_of_the_score(speech: Speech, draw) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(1)
    tract = draw_tract(speech, rng)
    score = draw(speech, tract, 2.0, rng)
    pcm = render(speech, tract, score, effort_db=0.0)
    assert len(pcm) / SAMPLE_RATE == pytest.approx(2.0, abs=0.02)
    pitch, times = pyworld.dio(pcm, SAMPLE_RATE, frame_period=5.0)
    pitch = pyworld.stonemask(pcm, pitch, times, SAMPLE_RATE)[: len(score.pitch)]
    both = (pitch > 0) & (score.pitch[: len(pitch)] > 0)
    assert both.sum() > 100
    cents = 1200 * np.abs(np.log2(pitch[both] / score.pitch[: len(pitch)][both]))
    assert np.median(cents) < tolerances.SUNG_CENTS


def test_a_shorter_tract_has_higher_formants(speech: Speech) -> None:
    rng = np.random.default_rng(2)
    own = draw_tract(speech, rng, octaves=0.0)
    score = draw_phrases(speech, own, 2.0, rng)

    def envelope(stretch: float) -> Samples:
        pcm = render(speech, replace(own, stretch=stretch), score, effort_db=0.0)
        times = np.arange(len(score.pitch)) * 0.005
        return np.asarray(
            np.log(pyworld.cheaptrick(pcm, score.pitch, times, SAMPLE_RATE)[score.pitch > 0]).mean(axis=0)
        )

    plain, short = envelope(1.0), envelope(1.25)
    bins = np.arange(40, 200)  # 0.9 to 4.3 kHz
    moved = np.interp(bins / 1.25, np.arange(len(plain)), plain)
    assert np.corrcoef(short[bins], moved)[0, 1] > np.corrcoef(short[bins], plain[bins])[0, 1] + 0.1


def test_identities_differ_and_the_first_is_the_speakers_own(speech: Speech) -> None:
    own = draw_tract(speech, np.random.default_rng(0), octaves=0.0)
    assert own.stretch == 1.0
    assert set(own.knots) == {1.0}
    assert draw_tract(speech, np.random.default_rng(1)) != draw_tract(speech, np.random.default_rng(2))


def test_the_channel_keeps_length_and_level_and_is_a_function_of_the_generator() -> None:
    pcm = np.sin(2 * np.pi * 220 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    outcomes = [through_channel(pcm, np.random.default_rng(seed)) for seed in range(40)]
    for outcome in outcomes:
        assert outcome.shape == pcm.shape
        assert np.isfinite(outcome).all()
        assert 0.3 < np.abs(outcome).max() <= 1.0
    assert np.array_equal(outcomes[3], through_channel(pcm, np.random.default_rng(3)))
    assert not np.array_equal(outcomes[3], outcomes[4])


def test_speakers_held_out_are_speakers_and_nobody_is_in_two_sets() -> None:
    names = {speaker.name for speaker in SPEAKERS}
    assert len(names) == len(SPEAKERS)
    assert names >= {*free_voices.VALIDATION, *free_voices.TEST}
    assert not set(free_voices.VALIDATION) & set(free_voices.TEST)


def test_a_package_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="klettres-data"):
        read_speech(SPEAKERS[0], tmp_path, np.random.default_rng(0))
    silent = Speaker("nobody", "festvox-nobody", festival="nobody_of_this_name", text="en")
    with pytest.raises(UsageError, match="festvox-nobody"):
        read_speech(silent, tmp_path, np.random.default_rng(0))


def test_a_faster_excerpt_is_higher() -> None:
    tone = np.sin(2 * np.pi * 300 * np.arange(10 * SAMPLE_RATE) / SAMPLE_RATE)
    for speed in (1.0, 1.2, 0.85):
        clip = free_voices._excerpt([tone], speed, np.random.default_rng(0))
        assert len(clip) / SAMPLE_RATE == pytest.approx(free_voices.CLIP_SECONDS, abs=1e-3)
        loudest = np.abs(np.fft.rfft(clip)).argmax() * SAMPLE_RATE / len(clip)
        assert loudest == pytest.approx(300 * speed, rel=1e-2)


def test_only_files_of_a_speakers_pattern_are_read(tmp_path: Path) -> None:
    for name, hz in (("x/nl/a-m-1.wav", 300), ("x/nl/a-v-1.wav", 500)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, np.sin(2 * np.pi * hz * np.arange(SAMPLE_RATE) / SAMPLE_RATE), SAMPLE_RATE)
    pcm, _ = read_speech(Speaker("v", "p", "x", "nl/*-v-*.wav"), tmp_path, np.random.default_rng(0))
    assert np.abs(np.fft.rfft(pcm)).argmax() * SAMPLE_RATE / len(pcm) == pytest.approx(500, rel=1e-2)


def _tone(hz: float, rate: int = SAMPLE_RATE, seconds: float = 1.2) -> Samples:
    return np.asarray(np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate))


def _encoded(pcm: Samples, rate: int, kind: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, pcm, rate, format=kind)
    return file.getvalue()


def _heard(pcm: Samples) -> float:
    return round(float(np.abs(np.fft.rfft(pcm)).argmax()) * SAMPLE_RATE / len(pcm), -1)


def _pitches(speaker: Speaker, root: Path) -> list[float]:
    return sorted(_heard(line) for line in read_lines(speaker, root, np.random.default_rng(0), 9))


def test_only_the_folder_and_the_patterns_of_an_archive_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pk3", "w") as file:
        for name, hz in (("v/x/a_ack1.ogg", 300), ("v/a_sel.ogg", 400), ("v/a_die.ogg", 500), ("w/a_ack.ogg", 600)):
            file.writestr(name, _encoded(_tone(hz), SAMPLE_RATE, "OGG"))
        file.writestr("v/a_ack.txt", "no audio")
    assert _pitches(Speaker("s", "p", "v", "*_ack*|*_sel*", "a.pk3"), tmp_path) == [300, 400]
    with pytest.raises(UsageError, match="Install the package p"):
        read_lines(Speaker("s", "p", "v", archive="b.pk3"), tmp_path, np.random.default_rng(0), 1)


def test_the_roles_of_dialogues_are_told_apart(tmp_path: Path) -> None:
    dialogue = bytes(24) + (7).to_bytes(2) + bytes(10)
    files = {"BOB2.DOG": dialogue} | {
        name: _encoded(_tone(hz, 11_025), 11_025, "MP3")
        for name, hz in (("070001P1.SB", 300), ("070001J1.SB", 400), ("JOE001.SB", 500), ("C1A00101.SB", 600))
    }
    table, data, offset = b"", b"", 15 + 21 * len(files)
    for name, content in files.items():
        table += struct.pack(">12sBII", name.encode(), 1, offset + len(data), len(content))
        data += content
    (tmp_path / "queen.1c").write_bytes(b"QTBLCEM10".ljust(13, b"\0") + len(files).to_bytes(2) + table + data)
    for role, pitches in (("BOB", [300]), ("JOE", [400, 500]), ("scenes", [600])):
        assert _pitches(Speaker("s", "p", role, archive="queen.1c"), tmp_path) == pitches


def test_packed_speech_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packer = types.ModuleType("propack")
    packer.unpack = lambda data: data[3:]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "propack", packer)
    disk, table = bytes(32), b""
    for number, hz in ((50_001, 300), (60_001, 400)):
        content = bytes(22) + b"RNC" + (128 + 100 * _tone(hz, 11_025)).astype(np.uint8).tobytes()
        table += struct.pack("<H", number) + (len(disk) // 16 | 1 << 23).to_bytes(3, "little")
        table += len(content).to_bytes(3, "little")
        disk += content + bytes(-len(content) % 16)
    (tmp_path / "sky.dsk").write_bytes(disk)
    (tmp_path / "sky.dnr").write_bytes((2).to_bytes(4, "little") + table)
    assert _pitches(Speaker("s", "p", "speech", archive="sky.dsk"), tmp_path) == [300]


def test_an_excerpt_is_of_one_line_and_fills_the_clip() -> None:
    lines = [_tone(hz) for hz in (300, 500)]
    clips = [free_voices._excerpt(lines, 1.0, np.random.default_rng(seed)) for seed in range(8)]
    assert {len(clip) / SAMPLE_RATE for clip in clips} == {free_voices.CLIP_SECONDS}
    assert {_heard(clip) for clip in clips} == {300, 500}
    assert all(np.abs(clip[-SAMPLE_RATE:]).max() > 0.9 for clip in clips)


def test_the_corpus_is_laid_out_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speakers = []
    for number, name in enumerate(("a", "b", "c")):
        home = tmp_path / "root" / "voices" / name
        home.mkdir(parents=True)
        rng = np.random.default_rng(number)
        singer = draw_singer(rng)
        for file in range(3):
            soundfile.write(home / f"{file}.wav", sing(singer, 1.0, rng), SAMPLE_RATE)
        (home / "broken.ogg").write_bytes(b"not audio")
        speakers.append(Speaker(name, "voices", f"voices/{name}"))
    monkeypatch.setattr(free_voices, "SPEAKERS", tuple(speakers))
    monkeypatch.setattr(free_voices, "VALIDATION", ("b",))
    monkeypatch.setattr(free_voices, "TEST", ("c",))
    monkeypatch.setattr(free_voices, "_HELD_OUT_CLIPS", 1)
    command = [
        str(tmp_path / "corpus"), "--root", str(tmp_path / "root"), "--tracts", "2", "--clips", "2", "--synthetic", "1",
        "--speeds", "2",
    ]  # fmt: skip
    result = CliRunner().invoke(free_voices.main, command)
    assert result.exit_code == 0, result.output
    files = {str(path.relative_to(tmp_path / "corpus")) for path in (tmp_path / "corpus").rglob("*") if path.is_file()}
    singers = ("a-00", "a-01", "a-spoken-00", "a-spoken-01", "synthetic-000")
    assert files == {
        *(f"train/{singer}/{clip}.flac" for singer in singers for clip in (0, 1)),
        *(f"validation/b-0{tract}/0.flac" for tract in range(4)),
        *(f"test/sung/c-0{tract}/0.flac" for tract in range(4)),
        "test/spoken/c-00/0.flac",
    }
    made = {path: (tmp_path / "corpus" / path).read_bytes() for path in files}
    (tmp_path / "corpus" / "train/a-01/1.flac").unlink()
    assert CliRunner().invoke(free_voices.main, command).exit_code == 0
    assert {path: (tmp_path / "corpus" / path).read_bytes() for path in files} == made
