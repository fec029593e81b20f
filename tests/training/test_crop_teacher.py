"""Asking the teacher about every crop: it hears what the encoder hears, at the speed that was drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from scipy.signal import lfilter
from torch import Tensor
from training_audio import RATE, write

from singerembed.errors import UsageError
from singerembed.evaluation.baselines.campplus import EMBEDDING_DIM, SAMPLE_RATE, CamPlusPlus
from training import teacher
from training.recipes import crop_teacher, free_voices_training
from training.recipes.crop_teacher import CropTeacher, even_lengths, resampled
from training.recipes.formants import with_moved_formants
from training.recipes.memory_corpus import Corpus
from training.targets import Targets, Windows, read_targets, write_targets

CPU = torch.device("cpu")
SECONDS = 0.5


@pytest.fixture
def campplus(monkeypatch: pytest.MonkeyPatch) -> CamPlusPlus:
    """CAM++ with drawn weights, in the place of the published ones."""
    torch.manual_seed(0)
    model = CamPlusPlus().eval()
    for module in (crop_teacher, teacher):
        monkeypatch.setattr(module, "load_campplus", lambda *_: model)
    return model


def table(names: list[str], dim: int = 2 * EMBEDDING_DIM) -> dict[str, Windows]:
    rng = np.random.default_rng(0)
    return {name: Windows(np.array([1.0]), rng.standard_normal((1, dim)).astype(np.float32)) for name in names}


def tone(hertz: float) -> NDArray[np.float64]:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(3 * RATE) / RATE)


def loudest_hz(pcm: Tensor, rate: float) -> Tensor:
    """The frequency of the tone in each row."""
    spectrum: Tensor = torch.fft.rfft(pcm * torch.hann_window(pcm.shape[1]), 8 * pcm.shape[1])
    return spectrum.abs().argmax(1) * (rate / (8 * pcm.shape[1]))


class _Listener:
    """Takes the frequency of what it hears for the target."""

    sample_rate = SAMPLE_RATE

    def __call__(self, pcm: Tensor) -> Tensor:
        return loudest_hz(pcm, self.sample_rate)[:, None]


def test_targets_are_those_of_a_table_of_the_same_crops(campplus: CamPlusPlus) -> None:
    rng = np.random.default_rng(1)
    targets, pcm = Targets(table(list("abcdefgh"))), rng.standard_normal((3, SAMPLE_RATE)).astype(np.float32)
    pcm /= np.abs(pcm).max(axis=1, keepdims=True)
    asked = CropTeacher(targets, CPU)(torch.from_numpy(pcm)).numpy()
    reader = teacher.CamPlusPlusTeacher(hop_seconds=1.0, window_seconds=1.0)
    for row, samples in zip(asked, pcm, strict=True):
        windows = reader.windows(samples.copy())
        assert windows is not None
        wanted = (windows.embeddings[0] - targets.mean) @ targets.whitening
        np.testing.assert_allclose(row, wanted / np.linalg.norm(wanted), atol=1e-4)


def test_a_table_of_another_teacher_is_refused(campplus: CamPlusPlus) -> None:
    with pytest.raises(UsageError, match="targets of 8 dimensions, and CAM"):
        CropTeacher(Targets(table(["a", "b"], dim=8)), CPU)


@pytest.mark.parametrize("samples", [16_000, 44_100, 52_920])
def test_a_tone_keeps_its_periods_when_it_is_resampled(samples: int) -> None:
    pcm = torch.sin(2 * torch.pi * 100 * torch.arange(44_100) / 44_100)[None]
    expected = torch.sin(2 * torch.pi * 100 * torch.arange(samples) / samples)[None]
    torch.testing.assert_close(resampled(pcm, samples), expected, atol=1e-4, rtol=0)


def test_lengths_of_fast_transforms() -> None:
    assert even_lengths(90, 110) == [90, 96, 98, 100, 108]


def test_the_teacher_hears_the_same_crop_at_the_same_speed(tmp_path: Path) -> None:
    """A separated recording, of another tone so that it can be told, is heard by the teacher as it was before."""
    write(tmp_path / "voices" / "a.flac", tone(400))
    write(tmp_path / "separated" / "a.flac", tone(800))
    listener: Any = _Listener()
    folders = [tmp_path / "voices", tmp_path / "separated"]
    voices = Corpus(folders, Targets(table(["a.flac", "b.flac"])), None, CPU, listener)
    torch.manual_seed(0)
    samples = round(SECONDS * RATE)
    pcm, heard = voices._as_other_voices(torch.arange(64) % 2, samples, listener)
    hertz = loudest_hz(pcm, RATE)
    assert pcm.shape == (64, samples)
    torch.testing.assert_close(hertz, heard[:, 0] * (1 + torch.arange(64) % 2), atol=2.0, rtol=0)
    speeds = heard[:, 0] / 400
    assert len(set(speeds.tolist())) == 4  # 16 crops have one speed
    assert ((speeds > 2**-0.21) & (speeds < 2**0.21)).all()
    assert (speeds - 1).abs().max() > 0.05


@pytest.mark.parametrize("factor", [0.85, 1.0, 1.2])
def test_formants_move_and_the_pitch_stays(factor: float) -> None:
    """Pulses at 105 Hz through a resonance at 2 kHz."""
    pulses = np.zeros(2 * RATE)
    pulses[:: RATE // 105] = 1
    turn, radius = 2 * np.pi * 2000 / RATE, 0.98
    pcm = lfilter([1.0], [1.0, -2 * radius * np.cos(turn), radius**2], pulses)
    moved = with_moved_formants(torch.from_numpy(pcm).float()[None], torch.tensor([factor]))[0].numpy()
    power = np.abs(np.fft.rfft(moved)[:16_000]) ** 2  # bins of half a hertz
    assert np.average(np.arange(2000, 8000) / 2, weights=power[2000:8000]) == pytest.approx(2000 * factor, rel=0.06)
    harmonics = 2 * 105 * np.arange(5, 40)
    assert power[(harmonics[:, None] + np.arange(-6, 7)).ravel()].sum() > 0.9 * power[1000:8200].sum()
    if factor == 1.0:
        np.testing.assert_allclose(moved, pcm, atol=1e-4 * np.abs(pcm).max())


def test_training_asks_it(campplus: CamPlusPlus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_voices_training, "WHITENED_ON", 4)
    for name, hertz in (("a.flac", 300), ("b.flac", 500)):
        write(tmp_path / "voices" / name, tone(hertz))
    write_targets(tmp_path / "targets.parquet", table(["a.flac", "b.flac"]), "campplus")
    assert read_targets(str(tmp_path / "targets.parquet")).dim == 2 * EMBEDDING_DIM
    arguments = [str(tmp_path / "voices"), str(tmp_path / "targets.parquet"), str(tmp_path / "voices.pt")]
    options = ["--device", "cpu", "--minutes", "0.03", "--batch-seconds", "12", "--ask-teacher"]
    result = CliRunner().invoke(free_voices_training.main, [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "voices.pt").exists()
