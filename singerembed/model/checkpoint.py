"""Reads singer encoder checkpoints of all known layouts, without executing code from them.

Layouts: this project's own (`format: singerembed-checkpoint`), the official release (`model.pt` beside
`hyperparams.yaml`), and Lightning `.ckpt` files of the official training code (self-supervised trainer and BYOL) and of
this project's. Needs torch and torchvision.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from singerembed.errors import CheckpointError, MissingDependencyError
from singerembed.model.mel import mel_basis
from singerembed.model.spec import ModelSpec

if TYPE_CHECKING:
    import torch

FORMAT = "singerembed-checkpoint"
FORMAT_VERSION = 1
OFFICIAL_REPO = "BernardoTorres/singer-identity"
OFFICIAL_METHODS = ("byol", "contrastive", "contrastive-vc", "unif-align", "vicreg")

# Prefixes before torchvision's names of the encoder's tensors; the second is the online network of BYOL.
ENCODER_PREFIXES = ("encoder.net.2.", "module.encoder.encoder.net.2.", "")
MEL_BASIS_KEY = "feature_extractor.spec_layer.mel_basis"
# nnAudio computes its basis in float32; ours is rounded to float32 once.
MEL_BASIS_TOLERANCE = 1e-7
# Objects of these packages appear in the hyper-parameters that Lightning pickles. They are replaced by placeholders:
# nothing is imported from these packages, and none of their code runs.
INERT_PACKAGES = {
    "singer_identity", "torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities",
    "torchmetrics", "omegaconf", "jsonargparse", "argparse", "collections", "copyreg", "pathlib", "numpy", "typing",
    "functools",
}  # fmt: skip
# The only names that a pickle may import: those that tensors need.
REAL_NAMES = {
    "collections.OrderedDict", "torch.Size", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter",
    *(f"torch.{name}" for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "bool")),
}  # fmt: skip
INERT_BUILTINS = {
    f"builtins.{name}" for name in ("object", "set", "frozenset", "slice", "range", "complex", "bytearray")
}
MAX_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Checkpoint:
    """An encoder read from a file."""

    spec: ModelSpec
    state_dict: dict[str, torch.Tensor]  # float32, torchvision's names for efficientnet_b0(num_classes=1000)
    layout: str  # for display: the layout of the file
    facts: dict[str, Any]  # training metadata from the file, JSON types


def load_checkpoint(source: str) -> Checkpoint:
    """Read a checkpoint from a file, a release folder, an official method's name, or `hf:OWNER/REPO/FOLDER`.

    Raises CheckpointError if it is missing, damaged, would execute code, or holds another model (the message names the
    difference), and MissingDependencyError without torch.
    """
    path, method = _resolve(source)
    model_path = path / "model.pt" if path.is_dir() else path
    content = _load_safely(model_path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{model_path} is not a checkpoint: it holds a {type(content).__name__}, not a dictionary"
        )
    if content.get("format") == FORMAT:
        return _own_checkpoint(model_path, content)
    return _official_checkpoint(model_path, content, method)


def weights_sha256(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of an encoder's tensors: names, shapes and float32 values, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor.float().numpy()).tobytes())
    return digest.hexdigest()


def parameter_count(state_dict: Mapping[str, torch.Tensor]) -> int:
    """Count the parameters of an encoder, without the statistics of its batch norms."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return sum(tensor.numel() for name, tensor in state_dict.items() if not name.endswith(statistics))


def encoder_template() -> Mapping[str, torch.Tensor]:
    """Return the encoder's tensors by name, as torchvision defines them, on the meta device."""
    import torch
    from torchvision.models import efficientnet_b0

    with torch.device("meta"):
        return dict(efficientnet_b0(num_classes=1000).state_dict())


# --- location -------------------------------------------------------------------------------------------------------


def _resolve(source: str) -> tuple[Path, str]:
    """Return a local path for `source`, and the training method if its name says one, else an empty string."""
    path = Path(source)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        return path, folder.name if folder.name in OFFICIAL_METHODS else ""
    if source in OFFICIAL_METHODS:
        return _fetch_release(OFFICIAL_REPO, source), source
    if source.startswith("hf:"):
        parts = source.removeprefix("hf:").split("/", 2)
        if len(parts) != 3 or not all(parts):
            raise CheckpointError(f"{source}: write hf:OWNER/REPO/FOLDER")
        return _fetch_release("/".join(parts[:2]), parts[2]), Path(parts[2]).name
    raise CheckpointError(
        f"{source}: no such file. Give a checkpoint, a release folder, hf:OWNER/REPO/FOLDER, "
        f"or an official method: {', '.join(OFFICIAL_METHODS)}"
    )


def _fetch_release(repo: str, folder: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as exc:
        raise MissingDependencyError("fetching a checkpoint", "huggingface_hub", "build") from exc
    try:
        hf_hub_download(repo, f"{folder}/hyperparams.yaml")
        return Path(hf_hub_download(repo, f"{folder}/model.pt")).parent
    except LocalEntryNotFoundError as exc:
        raise CheckpointError(
            f"{repo}/{folder} is not in the local cache and the Hugging Face hub cannot be reached. Download model.pt "
            "and hyperparams.yaml on another machine and give their folder, or set HF_ENDPOINT to a mirror"
        ) from exc
    except (HfHubHTTPError, HFValidationError, OSError) as exc:
        raise CheckpointError(
            f"{repo}/{folder} could not be fetched from the Hugging Face hub: {_first_line(exc)}"
        ) from exc


# --- restricted unpickling ------------------------------------------------------------------------------------------


class _Inert:
    """Placeholder for an object of a package that is not imported; accepts and ignores all operations of a pickle."""

    def __new__(cls, *_args: object, **_kwargs: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass

    def append(self, _item: object) -> None:
        pass

    def __setitem__(self, _key: object, _value: object) -> None:
        pass


class _RestrictedUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers, and placeholders for names in INERT_PACKAGES; refuses all other names."""

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)  # as Python 2 named them
        full_name = f"{module}.{name}"
        if full_name in REAL_NAMES or (module == "torch" and name.endswith("Storage")):
            return super().find_class(module, name)
        if module.partition(".")[0] in INERT_PACKAGES or full_name in INERT_BUILTINS:
            return _Inert
        raise _ForbiddenNameError(full_name)


class _ForbiddenNameError(Exception):
    """A pickle imports a name that is neither data nor known to be harmless."""


class _RestrictedPickle:
    """The part of the pickle module that `torch.load` uses."""

    Unpickler = _RestrictedUnpickler

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:
        return _RestrictedUnpickler(file, **options).load()


def _load_safely(path: Path) -> Any:
    """Call `torch.load` with a restricted unpickler, which imports and calls nothing from the file."""
    try:
        import torch
    except ImportError as exc:
        raise MissingDependencyError("reading a checkpoint", "torch", "build") from exc

    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if zipfile.is_zipfile(path):
            _refuse_compression(path)
        return torch.load(path, map_location="cpu", pickle_module=_RestrictedPickle, weights_only=False)
    except _ForbiddenNameError as exc:
        raise CheckpointError(
            f"{path} would run {exc} when loaded: refused. A checkpoint holds tensors; this file asks for code. "
            "Do not load it with other tools either"
        ) from exc
    except CheckpointError:
        raise
    except Exception as exc:  # a damaged file may raise anything
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint: {type(exc).__name__}: {_first_line(exc)}"
        ) from exc


def _refuse_compression(path: Path) -> None:
    """Raise CheckpointError for a compressed archive: torch never writes one, and it may be a decompression bomb."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{path}: entry {entry.filename!r} is compressed; torch never writes that, so it is refused"
                )


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]


# --- layouts --------------------------------------------------------------------------------------------------------


def _own_checkpoint(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    version = content.get("version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {version}, but this singerembed reads {FORMAT_VERSION}. Upgrade singerembed"
        )
    try:
        spec = ModelSpec.from_dict(content["spec"])
        state_dict = dict(content["state_dict"])
        facts = dict(content.get("training", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise CheckpointError(f"{path}: the checkpoint is incomplete or of another version: {exc}") from exc
    return _checked(path, spec, state_dict, "singerembed checkpoint", facts)


def _official_checkpoint(path: Path, content: Mapping[str, Any], method: str) -> Checkpoint:
    is_lightning = "state_dict" in content
    tensors = content["state_dict"] if is_lightning else content
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{path}: state_dict is a {type(tensors).__name__}, not a dictionary")
    hyper_parameters = content.get("hyper_parameters", {}) if is_lightning else _read_hyperparams(path.parent)
    _check_hyper_parameters(path, hyper_parameters)
    _check_mel_basis(path, tensors)

    prefix = next((p for p in ENCODER_PREFIXES if f"{p}features.0.0.weight" in tensors), "encoder.net.2.")
    encoder = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not is_lightning:
        layout = "official release"
    elif prefix.startswith("module."):
        layout, method = "Lightning checkpoint, BYOL (online network)", method or "byol"
    else:
        layout = "Lightning checkpoint"
    facts = {
        key: content[key] for key in ("epoch", "global_step") if is_lightning and isinstance(content.get(key), int)
    }
    own_spec = hyper_parameters.get("spec")
    if isinstance(own_spec, Mapping):  # written by this project's training
        spec = _spec_from(path, own_spec)
    else:
        spec = ModelSpec(
            name=f"{path.parent.name}/{path.name}" if path.parent.name else path.name, method=method or "unknown"
        )
    return _checked(path, spec, encoder, layout, facts)


def _spec_from(path: Path, fields: Mapping[str, Any]) -> ModelSpec:
    try:
        return ModelSpec.from_dict(dict(fields))
    except (TypeError, ValueError) as exc:
        raise CheckpointError(f"{path}: {exc}") from exc


def _checked(
    path: Path, spec: ModelSpec, state_dict: dict[str, torch.Tensor], layout: str, facts: dict[str, Any]
) -> Checkpoint:
    import torch

    template = encoder_template()
    missing = [name for name in template if name not in state_dict]
    extra = [name for name in state_dict if name not in template]
    if missing or extra:
        parts = [
            f"{len(names)} of {len(template)} tensors are {what} (first: {', '.join(names[:MAX_NAMES_SHOWN])})"
            for what, names in (("missing", missing), ("unknown", extra))
            if names
        ]
        raise CheckpointError(
            f"{path} is not a singer encoder with average pooling (efficientnet_b0): {'; '.join(parts)}"
        )
    for name, expected in template.items():
        if not isinstance(state_dict[name], torch.Tensor):
            raise CheckpointError(f"{path}: {name} is not a tensor")
        if state_dict[name].shape != expected.shape:
            raise CheckpointError(
                f"{path} is not this encoder: {name} has shape {tuple(state_dict[name].shape)}, "
                f"expected {tuple(expected.shape)}"
            )
        if not torch.isfinite(state_dict[name]).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity; the training went wrong")
    floats = {
        name: tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
        for name, tensor in state_dict.items()
    }
    return Checkpoint(replace(spec, weights_sha256=weights_sha256(floats)), floats, layout, facts)


# --- settings of the official front end -----------------------------------------------------------------------------


def _read_hyperparams(folder: Path) -> Mapping[str, Any]:
    path = folder / "hyperparams.yaml"
    if not path.is_file():
        return {}
    try:
        import yaml
    except ImportError as exc:
        raise MissingDependencyError("reading hyperparams.yaml", "pyyaml", "build") from exc
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise CheckpointError(f"{path} is not readable YAML: {_first_line(exc)}") from exc
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds no settings")
    return content


def _check_hyper_parameters(path: Path, content: Mapping[str, Any]) -> None:
    """Raise CheckpointError for settings with which the official code builds another model than the spec's."""
    if not isinstance(content, Mapping):
        return
    spec = ModelSpec(name="", method="")
    encoder = content.get("encoder") or content.get("backbone") or {}
    front_end = content.get("feature_extractor") or {}
    expected = (
        (front_end, "spec_layer", "melspectogram"),  # so spelt in the official code
        (front_end, "n_fft", spec.n_fft),
        (front_end, "hop_length", spec.hop_samples),
        (front_end, "n_mels", spec.n_mels),
        (encoder, "backbone", spec.backbone),
        (encoder, "embedding_dim", spec.embedding_dim),
    )
    for settings, key, value in expected:
        if isinstance(settings, Mapping) and settings.get(key, value) != value:
            raise CheckpointError(f"{path} is not this model: {key} is {settings[key]}, supported is {value}")


def _check_mel_basis(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    stored = tensors.get(MEL_BASIS_KEY)
    if stored is None:
        return
    ours = mel_basis(ModelSpec(name="", method=""))
    theirs = stored.detach().float().numpy()
    if theirs.shape != ours.shape:
        raise CheckpointError(
            f"{path} was trained on another mel basis: shape {theirs.shape}, supported is {ours.shape}"
        )
    difference = float(np.abs(theirs - ours).max())
    if difference > MEL_BASIS_TOLERANCE:
        raise CheckpointError(
            f"{path} was trained on another mel basis (weights differ by up to {difference:.2g}); "
            "supported is nnAudio's default: 22 050 Hz, 0 to 11 025 Hz, Slaney"
        )
