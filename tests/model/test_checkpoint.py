"""Checkpoints of every layout, and those that are not what they say."""

from __future__ import annotations

import collections
import functools
import http.server
import os
import pickle
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from singerembed.errors import CheckpointError
from singerembed.model.checkpoint import FORMAT, FORMAT_VERSION, MEL_BASIS_KEY, load_checkpoint, weights_sha256
from singerembed.model.mel import mel_basis
from singerembed.model.spec import ModelSpec

Tensors = dict[str, torch.Tensor]


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_official_release(release_folder: Path, reference_tensors: Tensors) -> None:
    for source in (release_folder, release_folder / "model.pt"):
        checkpoint = load_checkpoint(str(source))
        assert same(checkpoint.state_dict, reference_tensors)
        assert checkpoint.spec.method == "byol"
        assert checkpoint.layout == "official release"
        assert checkpoint.spec.weights_sha256 == weights_sha256(reference_tensors)


def test_a_release_with_its_fixed_kernels(tmp_path: Path, reference_tensors: Tensors, spec: ModelSpec) -> None:
    path = tmp_path / "model.pt"
    kernels = {
        MEL_BASIS_KEY: torch.from_numpy(mel_basis(spec)),
        "feature_extractor.spec_layer.stft.wsin": torch.zeros(1025, 1, 2048),
    }
    torch.save({**prefixed("encoder.net.2.", reference_tensors), **kernels}, path)
    assert same(load_checkpoint(str(path)).state_dict, reference_tensors)
    kernels[MEL_BASIS_KEY] = kernels[MEL_BASIS_KEY] * 1.01
    torch.save({**prefixed("encoder.net.2.", reference_tensors), **kernels}, path)
    with pytest.raises(CheckpointError, match="another mel basis"):
        load_checkpoint(str(path))


def test_this_projects_own(tmp_path: Path, reference_tensors: Tensors, spec: ModelSpec) -> None:
    path = tmp_path / "ckpt.pt"
    content = {
        "format": FORMAT, "version": FORMAT_VERSION, "spec": spec.to_dict(),
        "state_dict": reference_tensors, "training": {"epoch": 3},
    }  # fmt: skip
    torch.save(content, path)
    checkpoint = load_checkpoint(str(path))
    assert same(checkpoint.state_dict, reference_tensors)
    assert checkpoint.facts == {"epoch": 3}
    assert checkpoint.spec.name == spec.name
    torch.save({**content, "version": 99}, path)
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(str(path))
    del content["spec"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="incomplete"):
        load_checkpoint(str(path))


def test_lightning_self_supervised(tmp_path: Path, reference_tensors: Tensors) -> None:
    path = tmp_path / "last.ckpt"
    tensors = {
        **prefixed("encoder.net.2.", reference_tensors), **prefixed("net.1.net.2.", reference_tensors),
        "projection.net.1.weight": torch.zeros(128, 1000), "projection.net.1.bias": torch.zeros(128),
    }  # fmt: skip
    hyper = {
        "feature_extractor": {"n_fft": 2048},
        "backbone": {"backbone": "efficientnet_b0"},
        "temp": 0.2,
    }
    torch.save({"state_dict": tensors, "hyper_parameters": hyper, "epoch": 12, "global_step": 345}, path)
    checkpoint = load_checkpoint(str(path))
    assert same(checkpoint.state_dict, reference_tensors)
    assert checkpoint.facts == {"epoch": 12, "global_step": 345}


@pytest.fixture
def foreign_module() -> Iterator[types.ModuleType]:
    """A stand-in for singer_identity, importable while pickles are written and gone when they are read."""
    module = types.ModuleType("singer_identity.models.byol")

    class Optimizer:
        def __init__(self) -> None:
            self.lr = 1e-4

    class SiameseArm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    for made in (Optimizer, SiameseArm):
        made.__module__, made.__qualname__ = module.__name__, made.__name__
        setattr(module, made.__name__, made)
    packages = {"singer_identity": types.ModuleType("singer_identity"), "singer_identity.models": types.ModuleType("m")}
    sys.modules.update({**packages, module.__name__: module})
    yield module
    for name in (*packages, module.__name__):
        sys.modules.pop(name, None)


def test_lightning_byol_with_foreign_classes(tmp_path: Path, reference_tensors: Tensors, foreign_module: Any) -> None:
    path = tmp_path / "byol.ckpt"
    online = prefixed("module.encoder.encoder.net.2.", reference_tensors)
    teacher = {f"teacher_network.{n.removeprefix('module.')}": torch.zeros_like(t) for n, t in online.items()}
    hyper = {
        "weight_callback": foreign_module.SiameseArm(), "optimizer": foreign_module.Optimizer(),
        "loss_fn": nn.MSELoss(), "scheduler": functools.partial(foreign_module.Optimizer),
        "backbone": {"embedding_dim": 1000}, "more": collections.deque([1, 2]),
    }  # fmt: skip
    torch.save({"state_dict": {**online, **teacher}, "hyper_parameters": hyper, "epoch": 1}, path)
    for name in list(sys.modules):
        if name.startswith("singer_identity"):
            del sys.modules[name]
    checkpoint = load_checkpoint(str(path))
    assert same(checkpoint.state_dict, reference_tensors)
    assert checkpoint.spec.method == "byol"
    assert not any(name.startswith("singer_identity") for name in sys.modules)


class Bomb:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.what = (function, args)

    def __reduce__(self) -> Any:
        return self.what


@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, getattr], ids=lambda f: f.__name__)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickle_bombs_are_refused_unexploded(tmp_path: Path, function: Callable[..., Any], legacy: bool) -> None:
    path, witness = tmp_path / "bomb.pt", tmp_path / "exploded"
    torch.save({"state_dict": Bomb(function, f"touch {witness}")}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(path))
    assert function.__name__ in str(caught.value)
    assert "would run" in str(caught.value)
    assert not witness.exists()


def test_a_plain_pickle_bomb(tmp_path: Path) -> None:
    path, witness = tmp_path / "bomb.ckpt", tmp_path / "exploded"
    path.write_bytes(pickle.dumps(Bomb(os.system, f"touch {witness}")))
    with pytest.raises(CheckpointError):
        load_checkpoint(str(path))
    assert not witness.exists()


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(CheckpointError, match="compressed"):
        load_checkpoint(str(path))


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 not really", b"hello", b"\x80\x02}q\x00", pickle.dumps([1, 2])],
    ids=["empty", "zip", "text", "cut", "list"],
)
def test_junk(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "junk.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"junk\.pt"):
        load_checkpoint(str(path))


def test_cut_and_flipped(tmp_path: Path, release_folder: Path) -> None:
    content = (release_folder / "model.pt").read_bytes()
    path = tmp_path / "model.pt"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError):
        load_checkpoint(str(path))


def change(tensors: Tensors, **changes: Any) -> Tensors:
    return {**tensors, **changes}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda t: {n: v for n, v in t.items() if not n.startswith("features.8")},
            r"6 of 360 tensors are missing .*features.8",
        ),
        (lambda t: {**t, "attention.weight": torch.zeros(3)}, r"1 of 360 tensors are unknown .*attention.weight"),
        (
            lambda t: {**t, "classifier.1.weight": torch.zeros(512, 1280)},
            r"classifier.1.weight has shape \(512, 1280\)",
        ),
        (lambda t: {**t, "classifier.1.bias": torch.full((1000,), torch.nan)}, "NaN"),
        (lambda t: {**t, "classifier.1.bias": "text"}, "not a tensor"),
        (lambda t: {}, "360 of 360 tensors are missing"),
    ],
    ids=["missing", "extra", "width", "nan", "text", "nothing"],
)
def test_other_models_are_refused(
    tmp_path: Path, reference_tensors: Tensors, make: Callable[[Tensors], Tensors], message: str
) -> None:
    path = tmp_path / "model.pt"
    torch.save(prefixed("encoder.net.2.", make(reference_tensors)), path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(path))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("feature_extractor", "n_fft", 1024),
        ("feature_extractor", "n_mels", 80),
        ("feature_extractor", "spec_layer", "stft"),
        ("encoder", "backbone", "efficientnet_b0_att"),
        ("encoder", "embedding_dim", 512),
    ],
)
def test_other_hyperparameters_are_refused(
    tmp_path: Path, reference_tensors: Tensors, section: str, key: str, value: object
) -> None:
    torch.save(prefixed("encoder.net.2.", reference_tensors), tmp_path / "model.pt")
    (tmp_path / "hyperparams.yaml").write_text(f"{section}:\n  {key}: {value}\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{key} is {value}"):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("source", ["nowhere.pt", "hf:just/two", "no-such-method"])
def test_sources_that_are_nothing(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such file|write hf:"):
        load_checkpoint(source)


# --- the hub, played by a local server ------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, release_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serves the release as the Hugging Face hub would; yields the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            asked.append(self.path)
            wanted = release_folder / Path(self.path).name
            if "/resolve/" not in self.path or "/byol/" not in self.path or not wanted.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = wanted.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{wanted.name}-{len(content)}"')
            self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield asked
    server.shutdown()
    thread.join()


def test_official_names_come_from_the_hub_and_its_cache(
    hub: list[str], reference_tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint("byol")
    assert same(checkpoint.state_dict, reference_tensors)
    assert any("BernardoTorres/singer-identity" in path for path in hub)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(load_checkpoint("hf:BernardoTorres/singer-identity/byol").state_dict, reference_tensors)


def test_the_endpoint_comes_from_the_environment(hub: list[str], tmp_path: Path) -> None:
    from huggingface_hub import constants

    code = "from singerembed.model.checkpoint import load_checkpoint as load; print(load('byol').spec.weights_sha256)"
    environment = {**os.environ, "HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path / "home")}
    for offline in ("0", "1"):  # the second time from the cache alone
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
            check=True,
        )
        assert len(result.stdout.strip()) == 64
    assert hub


def test_what_the_hub_does_not_have(hub: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"no/body/here could not be fetched"):
        load_checkpoint("hf:no/body/here")


def test_no_hub_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="not in the local cache"):
        load_checkpoint("vicreg")


def test_the_hash_sees_names_shapes_and_values(reference_tensors: Tensors) -> None:
    original = weights_sha256(reference_tensors)
    bias = reference_tensors["classifier.1.bias"]
    moved = {**reference_tensors, "classifier.1.bias": bias + torch.eye(1, 1000)[0] * 1e-3}
    assert weights_sha256(moved) != original
    assert weights_sha256({**reference_tensors, "classifier.1.bias": bias.reshape(10, 100)}) != original
    assert weights_sha256(dict(reversed(list(reference_tensors.items())))) == original
    assert np.isfinite(bias.numpy()).all()
