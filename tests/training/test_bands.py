"""Made accompaniment: what is composed, how loud it is mixed, and what is missing without a synthesiser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from numpy.typing import NDArray

from singerembed.errors import MissingDependencyError
from training.recipes import bands, separated

NEEDS_SYNTHESISER = pytest.mark.skipif(
    shutil.which("fluidsynth") is None or not Path(bands.SOUND_FONT).exists(), reason="fluidsynth or its sound font"
)


def test_a_song_is_a_midi_file_of_one_track(tmp_path: Path) -> None:
    one, other = (bands._compose(4.0, np.random.default_rng(seed)) for seed in (0, 1))
    one.write(tmp_path / "a.mid")
    other.write(tmp_path / "b.mid")
    content = (tmp_path / "a.mid").read_bytes()
    assert content[:4] == b"MThd"
    assert content[14:18] == b"MTrk"
    assert int.from_bytes(content[18:22], "big") == len(content) - 22
    assert content != (tmp_path / "b.mid").read_bytes()


@pytest.mark.parametrize("voice_db", [6.0, 0.0, -6.0])
def test_the_voice_is_as_far_above_the_band_as_asked(voice_db: float) -> None:
    rng = np.random.default_rng(0)
    voice = rng.standard_normal(bands.RATE).astype(np.float32)
    band: NDArray[np.float32] = 0.01 * rng.standard_normal((bands.RATE, 2)).astype(np.float32)
    mix = bands.mixed(voice, band, voice_db)
    assert np.abs(mix).max() == pytest.approx(0.9)
    # Both are noise, and independent: their shares of the mix are its projections.
    middle, side = mix.mean(axis=1).astype(np.float64), band.mean(axis=1).astype(np.float64)
    of_voice, of_band = (
        middle @ part / (part @ part) * np.linalg.norm(part) for part in (voice.astype(np.float64), side)
    )
    assert 20 * np.log10(of_voice / of_band) == pytest.approx(voice_db, abs=0.3)


@NEEDS_SYNTHESISER
def test_the_command_renders_bands(tmp_path: Path) -> None:
    result = CliRunner().invoke(bands.main, [str(tmp_path / "bands"), "--count", "2", "--seconds", "1"])
    assert result.exit_code == 0, result.output
    one, other = (soundfile.read(tmp_path / "bands" / f"{i:04d}.flac")[0] for i in range(2))
    assert one.shape == (bands.RATE,)
    assert np.abs(one).max() == pytest.approx(0.9, abs=1e-3)
    assert not np.array_equal(one, other)


def test_a_missing_synthesiser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_arguments: object, **_options: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(MissingDependencyError, match="needs the package fluidsynth: apt install fluidsynth"):
        bands.band(1.0, 0)


def test_voices_as_a_separator_gives_them_back(separator_path: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    t = np.arange(2 * bands.RATE) / bands.RATE
    clips = {f"{name}/0.flac": 0.5 * np.sin(2 * np.pi * f * t) for name, f in (("a", 300), ("b", 500), ("c", 700))}
    for name, pcm in {**clips, "silent/0.flac": 0 * t}.items():
        (tmp_path / "voices" / name).parent.mkdir(parents=True)
        soundfile.write(tmp_path / "voices" / name, pcm, bands.RATE)
    (tmp_path / "bands").mkdir()
    soundfile.write(tmp_path / "bands" / "0.flac", 0.1 * rng.standard_normal(bands.RATE), bands.RATE)
    arguments = [str(tmp_path / "voices"), str(tmp_path / "bands"), separator_path]
    result = CliRunner().invoke(separated.main, [*arguments, str(tmp_path / "all"), "--share", "1"])
    assert result.exit_code == 0, result.output
    written = {str(path.relative_to(tmp_path / "all")): path for path in (tmp_path / "all").rglob("*.flac")}
    assert written.keys() == clips.keys()  # under the clips' names, less what is silent
    for name, path in written.items():
        pcm, rate = soundfile.read(path)
        assert (len(pcm), rate) == (len(t), bands.RATE)
        assert np.abs(pcm).max() == pytest.approx(0.9, abs=1e-3)
        found = np.abs(np.fft.rfft(pcm))
        assert np.argmax(found) == np.argmax(np.abs(np.fft.rfft(clips[name])))  # the voice is where it was
    before = {name: path.stat().st_mtime_ns for name, path in written.items()}
    CliRunner().invoke(separated.main, [*arguments, str(tmp_path / "all"), "--share", "1"])  # goes on, and has all
    assert {name: path.stat().st_mtime_ns for name, path in written.items()} == before
    result = CliRunner().invoke(separated.main, [*arguments, str(tmp_path / "some"), "--share", "0.5"])
    assert len(list((tmp_path / "some").rglob("*.flac"))) <= 2
    (tmp_path / "voices" / "a" / "0.flac").write_bytes(b"junk")
    result = CliRunner().invoke(separated.main, [*arguments, str(tmp_path / "junk"), "--share", "1"])
    assert result.exit_code == 2
    assert "0.flac cannot be read" in result.output
