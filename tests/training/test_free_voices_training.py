"""The recipe of the bundled checkpoint, on the CPU: what is drawn, and what it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from training_audio import RATE, write

from singerembed.evaluation.metrics import effective_rank
from singerembed.model.checkpoint import Checkpoint, load_checkpoint
from singerembed.model.spec import ModelSpec
from training.export import LAST_BIAS, LAST_WEIGHT
from training.model import Encoder
from training.recipes import free_voices_training, memory_corpus
from training.recipes.free_voices_training import main
from training.recipes.last_layer import whitened
from training.recipes.memory_corpus import Corpus, Recordings, through_channel
from training.synthetic import draw_singer, sing
from training.targets import Windows, read_targets, write_targets

CPU = torch.device("cpu")
DIM = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three singers, two recordings each, a table of targets of all but one, and a band."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    windows = {}
    for name in "abc":
        singer = draw_singer(rng)
        for i in range(2):
            write(folder / "voices" / name / f"{i}.flac", sing(singer, 3.0, rng))
            windows[f"{name}/{i}.flac"] = Windows(np.array([1.5]), rng.standard_normal((1, DIM)).astype(np.float32))
    del windows["c/1.flac"]
    write_targets(folder / "targets.parquet", windows, "made")
    write(folder / "bands" / "0.flac", np.sin(2 * np.pi * 220 / RATE * np.arange(4 * RATE)))
    return folder


def corpus(folder: Path, backing: str | None = None) -> Corpus:
    return Corpus(
        [folder / "voices"], read_targets(str(folder / "targets.parquet")), folder / backing if backing else None, CPU
    )


def test_crops_come_with_the_targets_of_their_recordings(folder: Path) -> None:
    torch.manual_seed(0)
    voices = corpus(folder)
    assert voices.seconds == pytest.approx(15.0, abs=0.1)  # the recording without a target is left out
    pcm, targets = voices.draw(32, 22_050)
    assert pcm.shape == (32, 22_050)
    table = read_targets(str(folder / "targets.parquet"))
    known = np.stack([table.of_crop(f"{name}.flac", 0, 3.0) for name in ("a/0", "a/1", "b/0", "b/1", "c/0")])
    nearest = (targets.numpy() @ known.T).argmax(axis=1)
    np.testing.assert_allclose(targets.numpy(), known[nearest], rtol=1e-6)
    assert set(nearest.tolist()) == {0, 1, 2, 3, 4}
    peaks = pcm.abs().amax(1)
    assert (peaks <= 1 + 1e-6).all()
    assert (peaks >= 10 ** (-12 / 20) - 1e-6).all()


def test_a_crop_longer_than_the_recording_ends_in_silence(folder: Path) -> None:
    recordings = Recordings(sorted((folder / "voices").rglob("*.flac")), CPU)
    pcm, _ = recordings.cut(torch.tensor([0, 3]), 5 * RATE)
    assert (pcm[:, -RATE // 4 :] == 0).all()
    assert (pcm[:, : RATE // 2].abs().amax(1) > 0).all()
    torch.testing.assert_close(pcm.abs().amax(1), torch.ones(2))


def test_each_crop_goes_through_a_channel_of_its_own(folder: Path) -> None:
    recordings = Recordings(sorted((folder / "voices").rglob("*.flac")), CPU)
    pcm, _ = recordings.cut(recordings.draw(8), 22_050)
    once, again = through_channel(pcm), through_channel(pcm)
    assert torch.isfinite(once).all()
    assert ((once - again).abs().amax(1) > 0.01).all()


def test_a_band_plays_under_some_crops_as_loud_as_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(memory_corpus, "_WITH_BAND", 0.5)
    monkeypatch.setattr(memory_corpus, "_VOICE_OVER_BAND_DB", (0.0, 0.0))
    pcm, _ = corpus(folder, "bands").draw(64, 22_050)
    spectrum: torch.Tensor = torch.fft.rfft(pcm * torch.hann_window(22_050)).abs().square()
    share = spectrum[:, 108:113].sum(1) / spectrum.sum(1)  # of the band, a tone of 220 Hz
    assert ((share > 0.4) & (share < 0.6)).sum() > 16
    assert (share < 0.3).sum() > 16


def test_a_checkpoint_that_the_encoder_reads_and_starts_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_voices_training, "WHITENED_ON", 5)
    target = tmp_path / "voices.pt"
    arguments = [str(folder / "voices"), str(folder / "targets.parquet"), "--device", "cpu", "--minutes", "0.05"]
    arguments += ["--batch-seconds", "6.5", "--backing", str(folder / "bands")]
    result = CliRunner().invoke(main, [*arguments[:2], str(target), *arguments[2:]])
    assert result.exit_code == 0, result.output
    checkpoint = load_checkpoint(str(target))
    assert checkpoint.facts["step"] >= 1
    assert checkpoint.spec.normalise == 9.2
    assert checkpoint.spec.centred_on == "5 crops of the training"
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.state_dict.values())
    hours = checkpoint.facts["hours"]
    write(tmp_path / "separated" / "a" / "0.flac", np.sin(np.arange(36 * RATE) / 30))  # so long that hours show it
    arguments += ["--separated", str(tmp_path / "separated"), "--initial", str(target)]
    result = CliRunner().invoke(main, [*arguments[:2], str(tmp_path / "on.pt"), *arguments[2:]])
    assert result.exit_code == 0, result.output
    trained_on = load_checkpoint(str(tmp_path / "on.pt"))
    assert trained_on.facts["hours"] == pytest.approx(hours + 0.01, abs=0.002)
    for name, kept in (("features.0.0.weight", True), ("features.5.0.block.0.0.weight", False)):
        assert torch.equal(trained_on.state_dict[name], checkpoint.state_dict[name]) == kept


def test_a_whitened_encoder_counts_weak_directions() -> None:
    """Of what goes into the last layer 20 directions are loud and 80 weak, as where a student is unsure."""
    torch.manual_seed(0)
    spec, rng = ModelSpec(name="made", method="made"), np.random.default_rng(0)
    checkpoint = Checkpoint(spec, Encoder(spec, normalise="crop").backbone.state_dict(), "", {})
    pooled = rng.standard_normal((4000, 1280)).astype(np.float32) * 0.1
    weight, bias = (checkpoint.state_dict[name].numpy() for name in (LAST_WEIGHT, LAST_BIAS))
    axes = np.linalg.svd(weight, full_matrices=False)[2]
    learnt = pooled @ (axes[:20].T @ axes[:20] + 0.1 * axes[20:100].T @ axes[20:100])
    given = learnt @ weight.T + bias
    made = whitened(checkpoint, given, rank=100)
    after = learnt @ made.state_dict[LAST_WEIGHT].numpy().T + made.state_dict[LAST_BIAS].numpy()
    np.testing.assert_allclose(after.mean(axis=0), 0, atol=1e-2)
    assert effective_rank(given) < 30
    assert effective_rank(after) > 90
    assert np.trace(np.cov(after.T, given.T)[:1000, 1000:]) > 0  # it turns nothing around


def test_what_is_no_corpus_is_said(folder: Path, tmp_path: Path) -> None:
    targets = str(folder / "targets.parquet")
    result = CliRunner().invoke(main, [str(tmp_path), targets, str(tmp_path / "voices.pt"), "--device", "cpu"])
    assert result.exit_code == 2
    assert "is in the table of targets" in result.output
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.flac").write_bytes(b"junk")
    result = CliRunner().invoke(main, [str(tmp_path), targets, str(tmp_path / "voices.pt"), "--device", "cpu"])
    assert "0.flac cannot be read" in result.output
