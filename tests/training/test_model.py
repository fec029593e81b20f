from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tolerances
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from singerembed.errors import CheckpointError
from singerembed.model.mel import MelExtractor
from singerembed.model.spec import ModelSpec
from training import model
from training.model import Encoder, Image, LogScale, MelSpectrogram, Predictor, Projection

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import weights  # noqa: E402

EXPECTED = np.load(GOLDEN / "expected.npz")
SPEC = ModelSpec(name="test", method="test")


def crops() -> NDArray[np.float32]:
    names = [str(name) for name in EXPECTED["names"]]
    return np.stack([soundfile.read(GOLDEN / "crops" / f"{Path(name).stem}.wav", dtype="float32")[0] for name in names])


@pytest.fixture(scope="module")
def peaked() -> NDArray[np.float32]:
    pcm = crops()
    return np.asarray(pcm / np.abs(pcm).max(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def golden_encoder() -> Encoder:
    encoder = Encoder(SPEC, normalise="crop").eval()
    encoder.backbone.load_state_dict({name: torch.from_numpy(value) for name, value in weights.state_dict().items()})
    return encoder


@pytest.mark.parametrize("normalise", ["crop", 9.2])
def test_front_end_equals_the_extension(peaked: NDArray[np.float32], normalise: str | float) -> None:
    spec = ModelSpec(name="test", method="test", normalise=normalise)
    theirs = MelExtractor(spec).log_mel(peaked).mel
    log_mel = LogScale(spec)(MelSpectrogram(spec)(torch.from_numpy(peaked)))
    ours = Image(spec, normalise)(log_mel) * torch.tensor(spec.image_std).view(3, 1, 1)
    ours += torch.tensor(spec.image_mean).view(3, 1, 1)
    for channel in range(3):
        np.testing.assert_allclose(ours[:, channel].numpy(), theirs, atol=tolerances.TRAINING_LOG_MEL)


def test_embeddings_equal_the_official_codes(peaked: NDArray[np.float32], golden_encoder: Encoder) -> None:
    with torch.inference_mode():
        ours = golden_encoder(MelSpectrogram(SPEC)(torch.from_numpy(peaked)))
    cosine = F.cosine_similarity(ours, torch.from_numpy(EXPECTED["embedding"]))
    assert float(cosine.min()) >= tolerances.TRAINING_EMBEDDING_COSINE


def test_an_embedding_depends_on_its_own_crop_alone(peaked: NDArray[np.float32], golden_encoder: Encoder) -> None:
    power = MelSpectrogram(SPEC)(torch.from_numpy(peaked))
    with torch.inference_mode():
        torch.testing.assert_close(golden_encoder(power)[2:3], golden_encoder(power[2:3]), rtol=1e-4, atol=1e-4)


def test_any_length_of_crop() -> None:
    front_end = MelSpectrogram(SPEC)
    for samples in (22_050, 88_199, 88_200):
        assert front_end(torch.randn(2, samples)).shape == (2, 128, 1 + samples // 512)


def test_batch_wide_maximum_is_the_official_one_in_training_and_a_running_mean_after() -> None:
    image = Image(SPEC, "batch")
    log_mel = torch.rand(4, 128, 10) + torch.tensor([0.0, 1.0, 2.0, 7.0]).view(4, 1, 1)
    maximum = log_mel.max()
    expected = (log_mel / maximum - 0.485) / 0.229
    torch.testing.assert_close(image.train()(log_mel)[:, 0], expected)
    for _ in range(2000):
        image(log_mel)
    torch.testing.assert_close(image.running_maximum, maximum, rtol=1e-3, atol=1e-3)
    alone, together = image.eval()(log_mel[:1]), image(log_mel)[:1]
    torch.testing.assert_close(alone, together)


def test_projection_and_predictor_are_those_of_the_paper() -> None:
    projection, predictor = Projection(1000, l2_normalise=True), Predictor()
    z = projection(torch.randn(4, 1000))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))
    assert {name: tuple(value.shape) for name, value in projection.state_dict().items()} == {
        "net.1.weight": (128, 1000),
        "net.1.bias": (128,),
    }
    assert [tuple(value.shape) for value in predictor.parameters()] == [
        (1024, 128),
        (1024,),
        (1024,),
        (128, 1024),
        (128,),
    ]
    torch.testing.assert_close(predictor(z).norm(dim=1), torch.ones(4))


def test_missing_imagenet_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**_: object) -> None:
        raise OSError("name or service not known")

    monkeypatch.setattr(model, "efficientnet_b0", unreachable)
    with pytest.raises(CheckpointError, match=r"efficientnet_b0_rwightman.*model\.initialise=random"):
        Encoder(SPEC, normalise="crop", pretrained=True)
