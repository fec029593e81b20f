"""Whether recordings hold a band beside the voice, and what a run says of a library of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import RATE
from numpy.typing import NDArray

from singerembed.jobs.mixture_watch import MixtureWatch
from singerembed.jobs.run import run
from singerembed.model.mixture import MixtureDetector
from singerembed.model.spec import ModelSpec

SECONDS = 4.0
TIMES = np.arange(round(SECONDS * RATE)) / RATE


def voice(rng: np.random.Generator) -> NDArray[np.float64]:
    """A few sung notes, with pauses between them: harmonics that fall by 12 dB an octave, and vibrato."""
    pitch = rng.uniform(180, 400) * 2 ** (0.02 * np.sin(2 * np.pi * 5.5 * TIMES))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    tone = sum(np.sin(k * phase) / k**2 for k in range(1, 12))
    return np.asarray(tone * (np.sin(2 * np.pi * 0.8 * TIMES) > -0.3) * 0.3)


def band(rng: np.random.Generator) -> NDArray[np.float64]:
    """A bass, chords, and a hi-hat, which play all the time."""
    out = np.sin(2 * np.pi * 55 * TIMES) + 0.5 * np.sin(2 * np.pi * 110 * TIMES)
    for hertz in (220, 277, 330, 440, 554, 660, 880, 1320, 1760, 2640, 3520):
        out += 0.25 * np.sin(2 * np.pi * hertz * TIMES + rng.uniform(0, 6))
    hat = np.diff(rng.standard_normal(len(TIMES) + 1)) * np.exp(-20 * (TIMES * 4 % 1))
    return np.asarray((out + 0.3 * hat) * 0.15)


def write(folder: Path, n: int, *, mixed: bool) -> str:
    rng = np.random.default_rng(0)
    lines = ["path"]
    for i in range(n):
        pcm = voice(rng) + (band(rng) if mixed else 0)
        soundfile.write(folder / f"{i}.wav", 0.9 * pcm / np.abs(pcm).max(), RATE)
        lines.append(f"{i}.wav")
    (folder / "catalog.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "catalog.csv")


def warnings_of(catalog: str, output: Path, engine: str, **options: Any) -> list[str]:
    said: list[str] = []
    run(catalog, str(output), engine=engine, say=lambda what, text: said.append(f"{what} {text}"), **options)
    return [text for text in said if "seem to hold a band" in text]


@pytest.mark.parametrize("sample_type", [np.int16, np.float32])
def test_a_band_is_told_from_a_voice(sample_type: type) -> None:
    detector, rng = MixtureDetector(ModelSpec(name="test", method="test")), np.random.default_rng(1)
    scale = 20_000 if sample_type is np.int16 else 0.6
    alone, played = voice(rng), band(rng)
    assert not detector.seems_mixed((alone * scale).astype(sample_type))
    assert detector.seems_mixed(((alone + played) * scale).astype(sample_type))


def test_other_mel_bands_are_left_alone() -> None:
    spec = ModelSpec(name="test", method="test")
    assert MixtureDetector.fits(spec)
    assert not MixtureDetector.fits(replace(spec, n_mels=80))


def test_a_library_of_mixes_is_warned_of_once_at_the_end(tmp_path: Path, reference_engine: str) -> None:
    (warning,) = warnings_of(write(tmp_path, 9, mixed=True), tmp_path / "out.parquet", reference_engine)
    assert warning.startswith("warning 9 of 9 recordings")
    assert "--separate" in warning


def test_voices_alone_are_not(tmp_path: Path, reference_engine: str) -> None:
    assert warnings_of(write(tmp_path, 9, mixed=False), tmp_path / "out.parquet", reference_engine) == []


def test_a_few_recordings_say_nothing_of_a_library(tmp_path: Path, reference_engine: str) -> None:
    assert warnings_of(write(tmp_path, 7, mixed=True), tmp_path / "out.parquet", reference_engine) == []


def test_no_more_than_half_is_no_warning() -> None:
    said: list[str] = []
    watch = MixtureWatch(lambda _what, text: said.append(text))
    watch._looked_at, watch._mixed = 20, 10
    watch.conclude()
    assert not said
    watch._mixed = 11
    watch.conclude()
    assert said
