"""Learning from a teacher: its windows, the targets of crops, and the terms of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from training_audio import RATE, tone, write
from training_config import small_config

from singerembed.errors import SingerEmbedError, UsageError
from singerembed.evaluation.baselines.campplus import CamPlusPlus
from training import losses, teacher
from training.config import TrainConfig
from training.data import PairBatch, PairDataset, PairKey
from training.losses import orthonormal_map
from training.methods import build_method
from training.recordings import TRAIN, build_index
from training.targets import Targets, Windows, read_targets, relative_path, write_targets

DIM = 8


def windows_of(corpus: Path, seed: int = 0) -> dict[str, Windows]:
    rng = np.random.default_rng(seed)
    names = sorted(str(path.relative_to(corpus)) for path in corpus.rglob("*.wav"))
    return {
        name: Windows(np.array([0.8, 2.4, 4.0]), rng.standard_normal((3, DIM)).astype(np.float32)) for name in names
    }


def taught(corpus: Path, table: Path, **settings: Any) -> TrainConfig:
    write_targets(table, windows_of(corpus), "random")
    return small_config(corpus, data={"validation_fraction": 0}, teacher={"targets": str(table), **settings})


def batch_of(config: TrainConfig, size: int = 6) -> PairBatch:
    dataset = PairDataset([each for each in build_index(config) if each.split == TRAIN], config)
    items = [dataset[PairKey(0, position, position)] for position in range(size)]
    clips, targets = (
        torch.from_numpy(np.stack([np.asarray(item[key]) for item in items])) for key in ("clips", "targets")
    )
    return {"clips": clips, "targets": targets, "groups": torch.arange(size)}


def test_a_target_is_the_centred_mean_of_the_windows_in_the_crop_or_the_nearest_one() -> None:
    rows = np.eye(4, DIM, dtype=np.float32)
    targets = Targets({"a": Windows(np.array([1.0, 2.0, 3.0]), rows[:3]), "b": Windows(np.array([1.0]), rows[3:])})
    mean = rows.mean(axis=0)
    for (start, seconds), wanted in {
        (0.5, 2.0): rows[:2].mean(axis=0),
        (2.1, 0.2): rows[1],
        (8.0, 1.0): rows[2],
    }.items():
        expected = (wanted - mean) / np.linalg.norm(wanted - mean)
        np.testing.assert_allclose(targets.of_crop("a", start, seconds), expected, rtol=1e-6)
    with pytest.raises(KeyError):
        targets.of_crop("c", 0.0, 1.0)
    with pytest.raises(KeyError, match="a has no window near 20 s"):
        targets.of_crop("a", 20.0, 1.0)


def test_a_table_of_targets_is_read_as_it_was_written(tmp_path: Path) -> None:
    windows = {"a/0.wav": Windows(np.array([0.8, 1.3]), np.eye(2, DIM, dtype=np.float32))}
    windows["b/1.wav"] = Windows(np.array([0.8]), np.full((1, DIM), 0.5, np.float32))
    write_targets(tmp_path / "t.parquet", windows, "me")
    read = read_targets(str(tmp_path / "t.parquet"))
    assert read.dim == DIM
    for name, each in windows.items():
        for centre in each.centres:
            np.testing.assert_array_equal(read.of_crop(name, centre, 0.0), Targets(windows).of_crop(name, centre, 0.0))


@pytest.mark.parametrize("content", [b"", b"not a table"])
def test_another_file_is_no_table_of_targets(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(UsageError, match=r"t\.parquet is not a table of targets"):
        read_targets(str(tmp_path / "t.parquet"))


def test_files_are_named_relative_to_the_data(tmp_path: Path) -> None:
    assert relative_path(str(tmp_path / "a" / "0.wav"), str(tmp_path)) == "a/0.wav"
    assert relative_path("/elsewhere/0.wav", str(tmp_path)) == "/elsewhere/0.wav"


def test_the_terms_are_least_at_the_targets_and_blind_to_what_no_cosine_sees() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(6, DIM, generator=generator)
    mapped = targets @ orthonormal_map(DIM, 20)
    assert float(losses.towards(3 * mapped, mapped)) == pytest.approx(0, abs=1e-6)
    assert float(losses.towards(-mapped, mapped)) == pytest.approx(2, abs=1e-6)
    assert float(losses.relations(7 * mapped, targets)) == pytest.approx(0, abs=1e-10)  # the map keeps cosines
    assert float(losses.relations(mapped.roll(1, 0), targets)) > 0.01


def test_the_gradient_of_the_terms_equals_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    embeddings, targets = (torch.randn(5, DIM, dtype=torch.float64, generator=generator) for _ in range(2))
    embeddings.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: losses.towards(z, targets), (embeddings,))


def test_a_few_steps_come_nearer_to_the_teacher(corpus: Path, tmp_path: Path) -> None:
    config = taught(corpus, tmp_path / "t.parquet", method=0.1)
    batch = batch_of(config)
    torch.manual_seed(0)
    method = build_method(config, steps_per_epoch=10)
    optimiser = torch.optim.Adam(method.parameters(), lr=3e-4)
    history = []
    for _ in range(8):
        torch.manual_seed(1)
        terms, _ = method.pair_terms(batch)
        optimiser.zero_grad()
        torch.autograd.backward(torch.stack(list(terms.values())).sum())
        optimiser.step()
        history.append({name: float(term.detach()) for name, term in terms.items()})
    assert set(history[0]) == {"teacher", "relations", "contrastive"}
    assert history[-1]["teacher"] < 0.8 * history[0]["teacher"]
    assert history[-1]["relations"] < history[0]["relations"]
    assert all(each.grad is not None for each in method.parameters() if each.requires_grad)


def test_the_targets_of_a_pair_are_of_its_own_crops(corpus: Path, tmp_path: Path) -> None:
    config = taught(corpus, tmp_path / "t.parquet")
    table = read_targets(config.teacher.targets)
    dataset = PairDataset(build_index(config), config)
    item = dataset[PairKey(0, 0, 3)]
    name = relative_path(build_index(config)[3].path, str(corpus))
    possible = np.stack([table.of_crop(name, centre, 0.0) for centre in (0.8, 2.4, 4.0)])
    for target in item["targets"]:
        assert np.isclose(possible @ target, 1.0).any()
        assert target @ target == pytest.approx(1.0)


def test_a_recording_without_windows_is_replaced_and_none_at_all_is_an_error(corpus: Path, tmp_path: Path) -> None:
    write_targets(tmp_path / "t.parquet", {"other.wav": Windows(np.array([1.0]), np.ones((1, DIM), np.float32))}, "x")
    config = small_config(corpus, teacher={"targets": str(tmp_path / "t.parquet")})
    with pytest.raises(SingerEmbedError, match="no windows of it"):
        PairDataset(build_index(config), config)[PairKey(0, 0, 0)]


def test_what_does_not_go_with_a_teacher_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = taught(corpus, tmp_path / "t.parquet")
    with pytest.raises(UsageError, match="byol has a teacher of its own"):
        build_method(config.model_copy(update={"method": "byol"}), steps_per_epoch=1)
    with pytest.raises(UsageError, match="pair_speed"):
        small_config(corpus, teacher={"targets": "t"}, augment={"pair_speed": 1.1})
    with pytest.raises(UsageError, match="2000 dimensions"):
        orthonormal_map(2000, 1000)


class _Levels:
    """A teacher whose embedding is the level of each half second."""

    name, sample_rate = "levels", 8000

    def __init__(self, hop_seconds: float) -> None:
        self.hop = hop_seconds

    def windows(self, pcm: np.ndarray[Any, Any]) -> Windows | None:
        if not pcm.any():
            return None
        size = self.sample_rate // 2
        parts = pcm[: len(pcm) // size * size].reshape(-1, size)
        return Windows(
            0.25 + 0.5 * np.arange(len(parts), dtype=np.float64),
            np.abs(parts).max(axis=1, keepdims=True).repeat(DIM, axis=1),
        )


def test_the_command_embeds_what_can_be_read_and_is_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "Ge2eTeacher", _Levels)
    write(tmp_path / "data" / "a" / "0.wav", tone(2))
    write(tmp_path / "data" / "a" / "silent.wav", np.zeros(RATE))
    (tmp_path / "data" / "a" / "broken.wav").write_bytes(b"RIFF")
    done = CliRunner().invoke(
        teacher.main, [str(tmp_path / "data"), str(tmp_path / "t.parquet"), "--jobs", "1", "--teacher", "ge2e"]
    )
    assert done.exit_code == 0, done.output
    assert "4 windows of 1 of 2 files" in done.output
    targets = read_targets(str(tmp_path / "t.parquet"))
    with pytest.raises(KeyError):
        targets.of_crop("a/silent.wav", 0.0, 1.0)
    targets.of_crop("a/0.wav", 0.0, 1.0)


def test_windows_reach_to_the_end_of_a_long_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in blocks, each of which has windows of its own."""
    monkeypatch.setattr(teacher, "Ge2eTeacher", _Levels)
    monkeypatch.setattr(teacher, "_BLOCK_SECONDS", 2.0)
    loudness = np.repeat([0.2, 0.4, 0.6], 2 * RATE)
    write(tmp_path / "data" / "a" / "0.wav", loudness * tone(6))
    done = CliRunner().invoke(
        teacher.main, [str(tmp_path / "data"), str(tmp_path / "t.parquet"), "--jobs", "1", "--teacher", "ge2e"]
    )
    assert "12 windows of 1 of 1 files" in done.output
    table = pq.read_table(tmp_path / "t.parquet")
    np.testing.assert_allclose(table["centre"].to_numpy(), 0.25 + 0.5 * np.arange(12))
    levels = np.array([row[0] for row in table["embedding"].to_pylist()])
    assert levels[0] < 0.6 * levels[5] < 0.6 * levels[11]


def test_ge2e_embeds_overlapping_windows_on_the_unit_sphere() -> None:
    pytest.importorskip("resemblyzer")
    made = teacher.Ge2eTeacher(0.5)
    voice = np.random.default_rng(0).standard_normal(3 * made.sample_rate).astype(np.float32)
    found = made.windows(voice)
    assert found is not None
    np.testing.assert_allclose(found.centres, [0.8, 1.3, 1.8])
    np.testing.assert_allclose(np.linalg.norm(found.embeddings, axis=1), 1, rtol=1e-5)
    assert made.windows(np.zeros(made.sample_rate, np.float32)) is None
    short = made.windows(voice[: made.sample_rate // 2])
    assert short is not None
    assert len(short.centres) == 1


def test_campplus_embeds_windows_and_keeps_both_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(teacher, "load_campplus", lambda: CamPlusPlus().eval())
    made = teacher.CamPlusPlusTeacher(0.5, 1.0)
    voice = np.random.default_rng(0).standard_normal(2 * made.sample_rate).astype(np.float32)
    voice[: made.sample_rate] = 0
    found = made.windows(voice)
    assert found is not None
    np.testing.assert_allclose(found.centres, [1.0, 1.5])  # the first window is silent
    assert found.embeddings.shape == (2, 384)
    assert (found.embeddings >= 0).all()
    assert not (found.embeddings[:, :192] * found.embeddings[:, 192:]).any()
    short = made.windows(voice[-made.sample_rate // 2 :])
    assert short is not None
    np.testing.assert_allclose(short.centres, [0.25])
    assert made.windows(np.zeros(made.sample_rate, np.float32)) is None
