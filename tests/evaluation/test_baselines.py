"""Every baseline is a real model behind one interface: shapes, weights, layers, and what goes wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tolerances import MEL_OFFICIAL, SAME_CROP_COSINE

from singerembed.errors import CheckpointError, MissingDependencyError, UsageError
from singerembed.evaluation.baselines.base import count_parameters
from singerembed.evaluation.baselines.load import ModelOptions, load_model
from singerembed.evaluation.baselines.voxceleb import NETWORKS, _MelSpectrogram, load_weights

Voice = Callable[..., NDArray[np.float32]]


def crops_at(voice: Voice, sample_rate: int) -> NDArray[np.float32]:
    return np.stack([voice(4.0, sample_rate, f0) for f0 in (150.0, 300.0)])


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("name", "rate", "dim", "millions"),
    [("shipped", 44_100, 1000, 5.3), ("untrained", 44_100, 1000, 5.3), ("mfcc", 44_100, 80, 0.0),
     ("ge2e", 16_000, 256, 1.4)],
)  # fmt: skip
def test_a_crop_alone_is_as_in_a_batch(voice: Voice, name: str, rate: int, dim: int, millions: float) -> None:
    model = load_model(name)
    assert model.facts.sample_rate == rate
    assert round((model.facts.n_parameters or 0) / 1e6, 1) == millions
    crops = crops_at(voice, rate)
    (both,) = model.embed(crops).values()
    (alone,) = model.embed(crops[1:]).values()
    model.close()
    assert both.shape == (2, dim)
    assert both.dtype == np.float32
    assert np.isfinite(both).all()
    assert cosine(both[1], alone[0]) > SAME_CROP_COSINE
    assert cosine(both[0], both[1]) < SAME_CROP_COSINE


def test_the_untrained_encoder_is_always_the_same_and_leaves_the_generator_alone(voice: Voice) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    crops = crops_at(voice, 44_100)
    one, other = (load_model("untrained").embed(crops)[""] for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert torch.rand(1) == expected


def test_engine_and_checkpoint_files(voice: Voice, reference_engine: str, release_folder: Path) -> None:
    crops = crops_at(voice, 44_100)
    engine, checkpoint = load_model(reference_engine), load_model(str(release_folder))
    assert (engine.facts.name, checkpoint.facts.name) == ("reference", "byol")
    for a, b in zip(engine.embed(crops)[""], checkpoint.embed(crops)[""], strict=True):
        assert cosine(a, b) > SAME_CROP_COSINE


# --- the VoxCeleb trainer's networks --------------------------------------------------------------------------------

# From github clovaai/voxceleb_trainer, models/ResNetSE34L.py and ResNetSE34V2.py: names in its published files.
TRAINER_TENSORS = {
    "fast-resnet34": {
        "conv1.weight": (16, 1, 7, 7), "bn1.running_var": (16,), "layer1.0.conv1.weight": (16, 16, 3, 3),
        "layer2.0.downsample.0.weight": (32, 16, 1, 1), "layer3.5.se.fc.2.weight": (64, 8),
        "layer4.2.bn2.num_batches_tracked": (), "attention": (128, 1), "sap_linear.weight": (128, 128),
        "fc.weight": (512, 128), "torchfb.spectrogram.window": (400,), "torchfb.mel_scale.fb": (257, 40),
    },
    "h-asp": {
        "conv1.weight": (32, 1, 3, 3), "conv1.bias": (32,), "layer4.0.conv1.weight": (256, 128, 3, 3),
        "layer4.0.downsample.1.weight": (256,), "layer2.3.se.fc.0.weight": (8, 64),
        "attention.0.weight": (128, 2048, 1),
        "attention.2.running_mean": (128,), "attention.3.bias": (2048,), "fc.weight": (512, 4096),
        "torchfb.0.flipped_filter": (1, 1, 2), "torchfb.1.spectrogram.window": (400,),
        "torchfb.1.mel_scale.fb": (257, 64),
    },
}  # fmt: skip
PARAMETERS = {"fast-resnet34": 1_437_078, "h-asp": 8_028_492}


@pytest.fixture(params=sorted(NETWORKS))
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, dict[str, Any]]:
    """A file as the trainer saves it: the network under `__S__.`, its loss under `__L__.`."""
    torch.manual_seed(1)
    network = NETWORKS[request.param]()
    content = {f"__S__.{name}": tensor for name, tensor in network.state_dict().items()}
    content |= {"__L__.w": torch.tensor(10.0), "__L__.b": torch.tensor(-5.0)}
    path = tmp_path / "baseline.model"
    torch.save(content, path)
    return request.param, path, content


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_tensors_are_called_and_shaped_as_in_the_trainer(name: str) -> None:
    network = NETWORKS[name]()
    tensors = network.state_dict()
    for tensor, shape in TRAINER_TENSORS[name].items():
        assert tuple(tensors[tensor].shape) == shape, tensor
    assert count_parameters(network) == PARAMETERS[name]


@pytest.mark.parametrize("n_mels", [40, 64])
def test_the_front_end_is_that_of_torchaudios_defaults(voice: Voice, n_mels: int) -> None:
    """Against librosa told to do the same: HTK scale, triangles of height 1, periodic Hamming window, reflection."""
    librosa = pytest.importorskip("librosa")
    audio = voice(1.0, 16_000)
    ours = _MelSpectrogram(n_mels)(torch.from_numpy(audio)[None])[0].numpy()
    theirs = librosa.feature.melspectrogram(
        y=audio, sr=16_000, n_fft=512, hop_length=160, win_length=400, window="hamming", center=True,
        pad_mode="reflect", power=2.0, n_mels=n_mels, htk=True, norm=None, fmin=0, fmax=8000,
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs, atol=MEL_OFFICIAL * theirs.max(), rtol=0)


def test_a_published_file_loads(voice: Voice, weights: tuple[str, Path, dict[str, Any]]) -> None:
    name, path, content = weights
    model = load_model(f"{name}={path}")
    (embedding,) = model.embed(crops_at(voice, 16_000)).values()
    assert embedding.shape == (2, 512)
    network = NETWORKS[name]()
    load_weights(network, content, str(path))
    with torch.inference_mode():
        expected = network.eval()(torch.from_numpy(crops_at(voice, 16_000))).numpy()
    assert min(map(cosine, embedding, expected)) > SAME_CROP_COSINE


def test_a_file_without_front_end_buffers_loads(weights: tuple[str, Path, dict[str, Any]]) -> None:
    name, path, content = weights
    torch.save({key: value for key, value in content.items() if "torchfb" not in key}, path)
    assert load_model(f"{name}={path}") is not None


def test_a_file_of_another_network_is_refused(weights: tuple[str, Path, dict[str, Any]]) -> None:
    name, path, content = weights
    other = next(other for other in NETWORKS if other != name)
    with pytest.raises(CheckpointError, match="holds another network"):
        load_model(f"{other}={path}")
    del content["__S__.fc.bias"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"1 tensors do not fit \(first: fc.bias is missing"):
        load_model(f"{name}={path}")


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.model"
    torch.save({"f": test_a_file_that_would_run_code_is_refused}, path)
    with pytest.raises(CheckpointError, match="not a file of weights"):
        load_model(f"h-asp={path}")


def test_a_url_is_fetched_once_into_the_cache(
    weights: tuple[str, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, path, _ = weights
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    url = f"file://{path}"
    assert load_model(f"{name}={url}") is not None
    path.unlink()
    assert load_model(f"{name}={url}") is not None
    assert list((tmp_path / "home").rglob("*")), "the cache is where TORCH_HOME says"


@pytest.mark.parametrize("offline", ["1", ""])
def test_what_cannot_be_fetched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: str) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(torch.hub, "download_url_to_file", _refuse)
    with pytest.raises(CheckpointError, match=r"baseline_lite_ap\.model cannot be fetched: .* Download it on another"):
        load_model("fast-resnet34")


def _refuse(*_arguments: object, **_options: object) -> None:
    raise OSError("no network")


# --- transformers ---------------------------------------------------------------------------------------------------


def save_small(kind: str, folder: Path) -> Path:
    """A small model of a real class, with its feature extractor, in `folder`."""
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
             "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
    torch.manual_seed(0)
    extractor: Any = transformers.Wav2Vec2FeatureExtractor(sampling_rate=16_000, do_normalize=True)
    if kind == "xvector":
        model: Any = transformers.WavLMForXVector(
            transformers.WavLMConfig(**small, tdnn_dim=(32,) * 4 + (48,), xvector_output_dim=24)
        )
    elif kind == "whisper":
        config = transformers.WhisperConfig(
            d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        )  # fmt: skip
        model, extractor = transformers.WhisperModel(config), transformers.WhisperFeatureExtractor()
    else:
        classes = {"wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config"), "hubert": ("HubertModel", "HubertConfig")}
        name, config_name = classes[kind]
        model = getattr(transformers, name)(getattr(transformers, config_name)(**small))
    model.eval().save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
def test_layers_are_averaged_over_time(kind: str, tmp_path: Path, voice: Voice) -> None:
    import transformers

    model = load_model(str(save_small(kind, tmp_path)))
    crops = crops_at(voice, 16_000)
    layers = model.embed(crops)
    assert {name: layer.shape for name, layer in layers.items()} == dict.fromkeys("123", (2, 32))
    # The same through the library by hand, one crop at a time.
    reference = transformers.AutoModel.from_pretrained(tmp_path)
    normalised = (crops[1] - crops[1].mean()) / np.sqrt(crops[1].var() + 1e-7)
    with torch.inference_mode():
        hidden = reference(torch.from_numpy(normalised)[None], output_hidden_states=True).hidden_states
    for number in (1, 2, 3):
        assert cosine(layers[str(number)][1], hidden[number][0].mean(dim=0).numpy()) > SAME_CROP_COSINE


def test_one_layer_by_name(tmp_path: Path, voice: Voice) -> None:
    save_small("wav2vec2", tmp_path)
    model = load_model(f"wav2vec2-base={tmp_path}@2")
    assert model.facts.name == "wav2vec2-base@2"
    assert list(model.embed(crops_at(voice, 16_000))) == ["2"]
    with pytest.raises(UsageError, match="has no layer 4: it has 1 to 3"):
        load_model(f"xlsr-53={tmp_path}@4")


def test_a_speaker_head_is_one_more_layer(tmp_path: Path, voice: Voice) -> None:
    layers = load_model(str(save_small("xvector", tmp_path))).embed(crops_at(voice, 16_000))
    assert list(layers) == ["1", "2", "3", "speaker"]
    assert layers["speaker"].shape == (2, 24)


def test_padding_is_not_averaged(tmp_path: Path, voice: Voice) -> None:
    """Whisper pads to 30 s: what its decoder would hear of 4 s are 200 of 1500 frames."""
    import transformers

    folder = save_small("whisper", tmp_path)
    crops = crops_at(voice, 16_000)
    layers = load_model(f"transformers:{folder}").embed(crops)
    reference = transformers.WhisperModel.from_pretrained(folder).get_encoder()
    features = transformers.WhisperFeatureExtractor()(crops[0], sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        hidden = reference(features["input_features"], output_hidden_states=True).hidden_states
    assert cosine(layers["2"][0], hidden[2][0, :200].mean(dim=0).numpy()) > SAME_CROP_COSINE


def test_the_real_sizes_of_wav2vec2_and_xlsr() -> None:
    """Parameters and layers of the published configurations, without memory for the weights."""
    import transformers

    base = transformers.Wav2Vec2Config()
    large = transformers.Wav2Vec2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, conv_bias=True,
        feat_extract_norm="layer", do_stable_layer_norm=True,
    )  # fmt: skip
    with torch.device("meta"):
        counts = [count_parameters(transformers.Wav2Vec2Model(config)) for config in (base, large)]
    assert [round(count / 1e6) for count in counts] == [94, 315]  # the poster: 95 M and 300 M


def test_a_model_that_is_not_there_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"cannot load config\.json"):
        load_model(f"transformers:{tmp_path}/nothing")
    folder = save_small("wav2vec2", tmp_path / "small")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot load model\.safetensors"):
        load_model(str(folder))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot load preprocessor_config\.json"):
        load_model(str(folder))


# --- by name --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [("nothing", "no such file, and no baseline of that name"), ("mfcc=x.pt", "mfcc takes no weights")],
)
def test_unknown_names(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(text, ModelOptions())


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resemblyzer", None)
    with pytest.raises(MissingDependencyError, match=r"needs the package resemblyzer: .*singerembed\[eval\]"):
        load_model("ge2e")
