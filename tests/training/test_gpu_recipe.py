"""The recipe for one GPU, on the CPU: what is drawn, what it is to learn, and what it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
from click.testing import CliRunner
from tolerances import GE2E_AT_44_KHZ
from training_audio import RATE, write

from singerembed.evaluation.baselines.mfcc import MfccModel
from singerembed.model.checkpoint import load_checkpoint
from training.recipes.free_voices_gpu import installed_ge2e, main
from training.recipes.gpu_corpus import Cepstra, Corpus, Ge2e, Targets, through_channel
from training.synthetic import draw_singer, sing
from training.teacher import Ge2eTeacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three singers, two recordings each."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for name in "abc":
        singer = draw_singer(rng)
        for i in range(2):
            write(folder / name / f"{i}.flac", sing(singer, 3.0, rng))
    return folder


@pytest.fixture(scope="module")
def ge2e() -> Path:
    pytest.importorskip("resemblyzer")
    return installed_ge2e()


def test_pairs_are_two_crops_of_a_singer_with_a_peak_of_1(folder: Path) -> None:
    corpus = Corpus(folder, CPU)
    assert corpus.n_singers == 3
    assert corpus.seconds == pytest.approx(18.0, abs=0.1)
    pcm, singers = corpus.draw_pairs(16, 22_050)
    assert pcm.shape == (32, 22_050)
    assert set(singers.tolist()) == {0, 1, 2}
    torch.testing.assert_close(pcm.abs().amax(1), torch.ones(32))


def test_a_crop_longer_than_the_recordings_ends_in_silence(folder: Path) -> None:
    pcm, _ = Corpus(folder, CPU).draw_pairs(2, 5 * RATE)
    assert (pcm[:, -RATE // 4 :] == 0).all()
    assert (pcm[:, : RATE // 2].abs().amax(1) > 0).all()


def test_each_crop_goes_through_a_channel_of_its_own(folder: Path) -> None:
    pcm, _ = Corpus(folder, CPU).draw_pairs(8, 22_050)
    once, again = through_channel(pcm), through_channel(pcm)
    assert torch.isfinite(once).all()
    assert (once.abs().amax(1) <= 1 + 1e-6).all()
    assert (once.abs().amax(1) >= 10 ** (-12 / 20) * 0.5).all()  # gain of 12 dB, and an erased peak
    assert ((once - again).abs().amax(1) > 0.01).all()


def test_ge2e_equals_the_packaged_one_at_16_khz(folder: Path, ge2e: Path) -> None:
    pcm, _ = Corpus(folder, CPU).draw_pairs(3, round(1.6 * RATE))
    found, teacher = Ge2e(ge2e)(pcm).numpy(), Ge2eTeacher(0.5)
    for crop, embedding in zip(pcm.numpy(), found, strict=True):
        windows = teacher.windows(soxr.resample(crop, RATE, 16_000)[:25_600])
        assert windows is not None
        expected = windows.embeddings[0]
        assert float(embedding @ expected) / float(np.linalg.norm(expected)) > GE2E_AT_44_KHZ


def test_cepstra_equal_those_of_the_baseline(folder: Path) -> None:
    pcm, _ = Corpus(folder, CPU).draw_pairs(2, 4 * RATE)
    (expected,) = MfccModel("mfcc").embed(pcm.numpy()).values()
    np.testing.assert_allclose(Cepstra()(pcm).numpy(), expected, atol=1e-3, rtol=1e-4)


def test_targets_have_length_1_and_the_weight_of_cepstra(folder: Path, ge2e: Path) -> None:
    pcm, _ = Corpus(folder, CPU).draw_pairs(4, round(1.6 * RATE))
    targets = Targets(ge2e, cepstra=0.5)
    targets.fit([pcm])
    found = targets(pcm)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(found[:, 256:].norm(dim=1), torch.full((8,), 0.5 / np.sqrt(1.25), dtype=torch.float32))


def test_a_checkpoint_that_the_encoder_reads(folder: Path, ge2e: Path, tmp_path: Path) -> None:
    arguments = [
        str(folder),
        str(tmp_path / "voices.pt"),
        "--minutes",
        "0.05",
        "--batch-seconds",
        "6.5",
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    checkpoint = load_checkpoint(str(tmp_path / "voices.pt"))
    assert checkpoint.facts["step"] >= 1
    assert checkpoint.spec.normalise == 9.2
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.state_dict.values())


def test_what_is_no_corpus_is_said(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path), str(tmp_path / "voices.pt"), "--device", "cpu"])
    assert result.exit_code == 2
    assert "holds no recordings" in result.output
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.flac").write_bytes(b"junk")
    result = CliRunner().invoke(main, [str(tmp_path), str(tmp_path / "voices.pt"), "--device", "cpu"])
    assert "0.flac cannot be read" in result.output
