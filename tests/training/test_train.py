"""Whole runs: interrupted, exported, built into an engine, and better than the floors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import pytest
import tolerances
import torch
from click.testing import CliRunner
from torch.utils.data import DataLoader, Dataset
from training_config import small_config

from singerembed.engine.build import build_engine
from singerembed.errors import CheckpointError, OutputError, SingerEmbedError, TrackError, UsageError
from singerembed.evaluation.baselines.encoders import untrained_checkpoint
from singerembed.model.checkpoint import load_checkpoint
from training import evaluate, export, train
from training.callbacks import LastCheckpoint, WholeCheckpoints
from training.command import command
from training.config import load_config
from training.data import PairData
from training.synthetic import make_corpus

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs"
GOLDEN = ROOT / "tests" / "golden"


# --- kill and resume ------------------------------------------------------------------------------------------------


# `python -m training.train` that dies at once when the checkpoint of step KILL_AT is there, as a kill would have it.
KILLED = """
import os, signal
from training import train
from training.callbacks import WholeCheckpoints

class DyingCheckpoints(WholeCheckpoints):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path, storage_options)
        if checkpoint["global_step"] == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)

train.WholeCheckpoints = DyingCheckpoints
train.main()
"""


def run(corpus: Path, out: Path, method: str, workers: int, kill_at: int | None = None) -> None:
    """Run two epochs of four steps in a process of its own, with a checkpoint at every third step."""
    settings = (
        "data.crop_seconds=0.5", "data.batch_size=3", f"data.workers={workers}", "data.validation_fraction=0",
        "data.pairs_per_recording=1", "trainer.threads=1",
        "trainer.checkpoint_every_steps=3", "trainer.deterministic=true", "trainer.accelerator=cpu",
        "trainer.max_epochs=2", "model.stochastic_depth=0.2", "model.dropout=0.2", "optimiser.cosine_epochs=2",
    )  # fmt: skip
    configs = [argument for name in (method, "small") for argument in ("--config", str(CONFIGS / f"{name}.yaml"))]
    program = ["-m", "training.train"] if kill_at is None else ["-c", KILLED]
    command = [sys.executable, *program, *configs, "--data", str(corpus), "--out", str(out)]
    finished = subprocess.run(
        [*command, *(argument for setting in settings for argument in ("--set", setting))],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "KILL_AT": str(kill_at)},
    )  # fmt: skip
    assert finished.returncode == (0 if kill_at is None else -signal.SIGKILL), finished.stderr.decode()


def step_of(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["global_step"])


# In the middle of an epoch, with a worker that reads ahead, and at an epoch's end; Praat, an equaliser, dropout and a
# moving average take part.
@pytest.mark.parametrize(("method", "workers", "step"), [("contrastive", 1, 3), ("byol", 0, 4)])
def test_kill_and_resume_gives_the_weights_of_an_undisturbed_run(
    method: str, workers: int, step: int, corpus: Path, tmp_path: Path
) -> None:
    undisturbed, out = tmp_path / "undisturbed" / "run", tmp_path / "run"  # the folder's name is the weights'
    run(corpus, undisturbed, method, workers)
    run(corpus, out, method, workers, kill_at=step)
    assert step_of(out / "last.ckpt") == step
    run(corpus, out, method, workers)
    ours, expected = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (out, undisturbed))
    assert ours["global_step"] == expected["global_step"] == 8
    assert ours["lr_schedulers"] == expected["lr_schedulers"]
    assert_equal(ours["state_dict"], expected["state_dict"])
    (our_optimiser,), (expected_optimiser,) = ours["optimizer_states"], expected["optimizer_states"]
    assert our_optimiser["param_groups"] == expected_optimiser["param_groups"]
    assert_equal(our_optimiser["state"], expected_optimiser["state"])


def test_a_run_killed_in_validation_validates_when_it_goes_on_and_knows_its_best(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, data = tmp_path / "run", {"batch_size": 4, "validation_crops": 2}

    def go_on(epochs: int, *error_rates: float) -> None:
        """Train up to `epochs`, two steps each; validation finds `error_rates`, then the run is killed in it."""
        found = list(error_rates)
        monkeypatch.setattr(PairData, "validation_metrics", lambda *_: {"eer": found.pop(0)})
        train.train(small_config(corpus, data=data, trainer={"max_epochs": epochs, "validate_every_epochs": 1}), out)
        assert not found

    with pytest.raises(IndexError):
        go_on(2, 0.3)
    assert step_of(out / "best.ckpt") == 2
    go_on(2, 0.1)
    assert step_of(out / "best.ckpt") == 4
    go_on(3, 0.2)
    assert (step_of(out / "best.ckpt"), step_of(out / "last.ckpt")) == (4, 6)


def assert_equal(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# --- checkpoints that are whole ---------------------------------------------------------------------------------------


def test_a_checkpoint_is_written_beside_its_name_and_a_full_disk_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "another file system, which is full"))
    last, writer = tmp_path / "run" / "last.ckpt", WholeCheckpoints()
    writer.save_checkpoint({"step": torch.tensor(1)}, last)

    def full_disk(_content: object, file: IO[bytes]) -> None:
        file.write(b"half a checkpoint")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # as torch has it

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OutputError, match=r"last\.ckpt cannot be written.*room on the disk"):
        writer.save_checkpoint({"step": torch.tensor(2)}, last)
    assert torch.load(last, weights_only=True) == {"step": torch.tensor(1)}
    assert list(last.parent.iterdir()) == [last]


def test_weights_that_hold_nan_end_the_run_and_are_not_kept() -> None:
    kept: list[Path] = []
    trainer: Any = SimpleNamespace(
        global_step=4,
        num_training_batches=8,
        save_checkpoint=lambda path, **_: kept.append(path),
        strategy=SimpleNamespace(reduce_boolean_decision=lambda found, **_: found),
    )
    callback = LastCheckpoint(Path("last.ckpt"), every_steps=2)
    network: Any = torch.nn.Linear(2, 2)
    callback.on_train_batch_end(trainer, network, None, None, 3)
    assert kept == [Path("last.ckpt")]
    network.register_buffer("mean", torch.zeros(2))
    network.mean[0] = torch.inf  # running statistics, which a step that overflowed leaves behind
    with pytest.raises(SingerEmbedError, match=r"1 of .* \(first: mean\)"):
        callback.on_train_batch_end(trainer, network, None, None, 3)
    network.mean[0] = 0
    network.bias.data[1] = torch.nan
    for batch in (3, 7):  # and before the validation of the epoch's last step
        with pytest.raises(SingerEmbedError, match=r"diverged: at step 4, 1 of .* \(first: bias\)"):
            callback.on_train_batch_end(trainer, network, None, None, batch)
    assert kept == [Path("last.ckpt")]


def test_what_cannot_be_run_is_said_in_a_line(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"file cannot be made a folder.*--out"):
        train.train(small_config(corpus), tmp_path / "file")
    with pytest.raises(UsageError, match=r"trainer section"):
        train.train(small_config(corpus, trainer={"devices": "abc"}), tmp_path / "run")


# --- one short run in this process ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a BYOL run of one epoch with validation, normalised by the official code's batch-wide maximum."""
    out = tmp_path_factory.mktemp("short") / "run"
    out.mkdir()
    (out / ".last.ckpt.7-0123abcd.tmp").write_bytes(b"what a kill left")
    sections: dict[str, dict[str, Any]] = {
        "model": {"normalise": "batch"},
        "data": {"validation_crops": 2, "workers": 1},
        "trainer": {"validate_every_epochs": 1, "log_every_steps": 1},
    }
    train.train(small_config(corpus, "byol", **sections), out)
    return out


def test_a_run_leaves_checkpoints_metrics_and_events(short_run: Path) -> None:
    assert {"last.ckpt", "best.ckpt", "recordings.parquet", "tensorboard"} == {
        path.name for path in short_run.iterdir()
    }
    facts = export.training_facts(short_run / "best.ckpt")
    for name in ("eer", "mean_rank", "alignment", "uniformity", "spread"):
        assert np.isfinite(facts["metrics"][f"validation/{name}"])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(short_run / "tensorboard"))
    events.Reload()
    assert {
        "loss", "spread", "validation/eer", "pairs_per_second", "data_wait", "lr-Adam/online", "lr-Adam/predictor",
    } <= set(events.Tags()["scalars"])  # fmt: skip


def test_products_of_matrices_are_not_rounded_and_convolutions_may_be(short_run: Path) -> None:
    del short_run
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32


def test_the_progress_bar_shows_no_version(tmp_path: Path) -> None:
    trainer = train.build_trainer(small_config(tmp_path), tmp_path)
    bar: Any = trainer.progress_bar_callback
    assert bar.get_metrics(trainer, None) == {}
    assert trainer.log_dir is not None
    assert Path(trainer.log_dir) == tmp_path / "tensorboard"


class _BrokenData(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        try:
            raise TrackError("not_found", f"file {index} not found")
        except TrackError as exc:
            raise UsageError("Is the data: still there?") from exc


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_one_line(workers: int) -> None:
    @command
    def read() -> None:
        list(DataLoader(_BrokenData(), sampler=[0], num_workers=workers))

    result = CliRunner().invoke(read)
    assert (result.output, result.exit_code) == ("Error: Is the data: still there?\n", UsageError.exit_code)


def test_hyper_parameters_are_plain_and_the_readers_layout(short_run: Path) -> None:
    checkpoint = load_checkpoint(str(short_run / "last.ckpt"))
    assert (checkpoint.spec.method, checkpoint.spec.name) == ("byol", "small")
    # A batch-wide maximum becomes a constant, the running mean of the maxima that were met.
    assert isinstance(checkpoint.spec.normalise, float)
    assert 5 < checkpoint.spec.normalise < 12
    state = torch.load(short_run / "last.ckpt", weights_only=True)["state_dict"]
    roots = {".".join(name.split(".")[:2]) for name in state}
    assert roots == {"encoder.net", "projection.net", "predictor.model", "teacher.encoder", "teacher.projection"}


def test_another_configuration_is_refused_with_the_difference(short_run: Path, corpus: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.batch_size: 2 here, 3 there"):
        config = small_config(
            corpus, "byol", model={"normalise": "batch"}, data={"validation_crops": 2, "batch_size": 2}
        )
        train.train(config, short_run)


def test_another_number_of_devices_is_refused(short_run: Path, corpus: Path, tmp_path: Path) -> None:
    content = torch.load(short_run / "last.ckpt", weights_only=True)
    assert content["devices"] == 1
    out = tmp_path / "run"
    out.mkdir()
    torch.save({**content, "devices": 2}, out / "last.ckpt")
    sections: dict[str, dict[str, Any]] = {"model": {"normalise": "batch"}, "data": {"validation_crops": 2}}
    with pytest.raises(UsageError, match=r"made on 2 device\(s\), here are 1"):
        train.train(small_config(corpus, "byol", **sections), out)


def test_export_to_the_own_layout(short_run: Path, tmp_path: Path) -> None:
    source, target = short_run / "last.ckpt", tmp_path / "new" / "encoder.pt"
    result = CliRunner().invoke(export.main, [str(source), str(target)])
    assert result.exit_code == 0, result.output
    ours, theirs = load_checkpoint(str(target)), load_checkpoint(str(source))
    assert ours.spec == theirs.spec
    assert_equal(ours.state_dict, theirs.state_dict)
    assert ours.facts["method"] == "byol"
    assert ours.facts["step"] == step_of(source)
    assert torch.__version__.startswith(ours.facts["versions"]["torch"])
    assert all(tensor.is_contiguous() for tensor in torch.load(target, weights_only=True)["state_dict"].values())


def test_an_exported_encoder_is_centred_on_the_data_that_is_named(
    short_run: Path, corpus: Path, tmp_path: Path
) -> None:
    source, plain, target = short_run / "last.ckpt", tmp_path / "plain.pt", tmp_path / "centred.pt"
    for arguments in ([str(source), str(plain)], [str(source), str(target), "--centre", str(corpus)]):
        done = CliRunner().invoke(export.main, arguments)
        assert done.exit_code == 0, done.output
    assert load_checkpoint(str(target)).spec.centred_on == f"12 crops of {corpus.name}"
    crops = evaluate.labelled_crops(str(corpus), 2)
    before, after = (
        np.stack(
            [
                evaluate.encoder_embedder(load_checkpoint(str(path)))(crops[index]["clips"])
                for index in range(0, len(crops), 2)
            ]
        )
        for path in (plain, target)
    )
    np.testing.assert_allclose(after, before - before.mean(axis=0), atol=1e-5 * np.abs(before).max())


def test_no_path_of_a_configuration_keeps_its_folders() -> None:
    config = {"data": {"source": "/library/voices/"}, "augment": {"channel": [{"ir_path": "/library/rooms"}, "x\\y"]}}
    assert export._without_folders(config) == {
        "data": {"source": "voices"}, "augment": {"channel": [{"ir_path": "rooms"}, "y"]},
    }  # fmt: skip


def test_export_in_half_the_size_names_no_folder_of_the_machine(short_run: Path, tmp_path: Path) -> None:
    source, target, whole = short_run / "last.ckpt", tmp_path / "half.pt", tmp_path / "whole.pt"
    assert CliRunner().invoke(export.main, [str(source), str(target), "--half"]).exit_code == 0
    assert CliRunner().invoke(export.main, [str(source), str(whole)]).exit_code == 0
    assert target.stat().st_size < 0.55 * whole.stat().st_size
    ours, theirs = load_checkpoint(str(target)), load_checkpoint(str(source))
    for name, tensor in ours.state_dict.items():
        torch.testing.assert_close(tensor, theirs.state_dict[name], rtol=2**-11, atol=2**-25)
    assert str(Path(ours.facts["config"]["data"]["source"])) == Path(ours.facts["config"]["data"]["source"]).name
    result = CliRunner().invoke(export.main, [str(source), str(tmp_path / "x"), "--layout", "official", "--half"])
    assert result.exit_code == 2


def test_export_to_the_official_layout(short_run: Path, tmp_path: Path) -> None:
    source, target = short_run / "last.ckpt", tmp_path / "byol"
    result = CliRunner().invoke(export.main, [str(source), str(target), "--layout", "official"])
    assert result.exit_code == 0, result.output
    assert_equal(load_checkpoint(str(target)).state_dict, load_checkpoint(str(source)).state_dict)
    # The stored kernels give the official code's mel spectrogram: it convolves with them.
    state = torch.load(target / "model.pt", weights_only=True)
    kernels = {name.rsplit(".", 1)[1]: value for name, value in state.items() if "spec_layer" in name}
    golden = np.load(GOLDEN / "expected.npz")
    import soundfile

    pcm = torch.from_numpy(soundfile.read(GOLDEN / "crops" / "tenor.wav", dtype="float32")[0])
    padded = torch.nn.functional.pad(pcm[None, None] / pcm.abs().max(), (1024, 1024), mode="reflect")
    real, imaginary = (torch.nn.functional.conv1d(padded, kernels[name], stride=512) for name in ("wcos", "wsin"))
    mel = kernels["mel_basis"] @ (real.square() + imaginary.square())[0]
    expected = golden["mel"][[str(name).removesuffix(".wav") for name in golden["names"]].index("tenor")]
    assert float(np.abs(mel.numpy() - expected).max()) <= 1e-5 * expected.max()
    assert set(kernels) == {"mel_basis", "wsin", "wcos", "window_mask"}


def test_checkpoints_of_another_making_are_not_exported(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "official.ckpt")
    torch.save(Path("an object"), tmp_path / "pickle.ckpt")
    for name in ("official.ckpt", "pickle.ckpt"):
        with pytest.raises(CheckpointError, match=r"not written by training\.train"):
            export.training_facts(tmp_path / name)


def test_build_engine_takes_the_checkpoint_unchanged(short_run: Path, tmp_path: Path) -> None:
    for source in (short_run / "last.ckpt", tmp_path / "encoder.pt"):
        if source.suffix == ".pt":
            CliRunner().invoke(export.main, [str(short_run / "last.ckpt"), str(source)])
        build_engine(str(source), str(tmp_path / f"{source.suffix[1:]}.engine"), say=lambda *_: None)
        assert (tmp_path / f"{source.suffix[1:]}.engine").stat().st_size > 20_000_000


# --- it learns ------------------------------------------------------------------------------------------------------


def test_training_beats_mfcc_statistics_and_the_untrained_network(tmp_path: Path) -> None:
    make_corpus(tmp_path / "train", singers=40, recordings=3, seconds=6.0, seed=100)
    make_corpus(tmp_path / "unseen", singers=40, recordings=2, seconds=6.0, seed=100, first=3)
    overrides = [
        f"data.source={tmp_path / 'train'}", "data.validation_fraction=0", "trainer.max_epochs=10",
        "optimiser.cosine_epochs=10",
    ]  # fmt: skip
    train.train(load_config([CONFIGS / "contrastive.yaml", CONFIGS / "small.yaml"], overrides), tmp_path / "run")
    crops = evaluate.labelled_crops(str(tmp_path / "unseen"), 2)
    trained = evaluate.score(evaluate.encoder_embedder(load_checkpoint(str(tmp_path / "run" / "last.ckpt"))), crops)[
        "eer"
    ]
    untrained = evaluate.score(evaluate.encoder_embedder(untrained_checkpoint()), crops)["eer"]
    mfcc = evaluate.score(evaluate.mfcc_statistics(crops.n_samples), crops, standardise=True)["eer"]
    figures = f"equal error rate on unseen recordings: {trained:.3f}, untrained {untrained:.3f}, MFCC {mfcc:.3f}"
    print(figures)
    assert trained < min(untrained, mfcc) - tolerances.LEARNT_EER_MARGIN, figures
