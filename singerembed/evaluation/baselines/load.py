"""Loads the model that a value of --model names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from singerembed.engine.file import MAGIC, is_engine
from singerembed.errors import UsageError
from singerembed.evaluation.baselines.base import Model
from singerembed.model.checkpoint import OFFICIAL_METHODS

SHIPPED = "shipped"
_REPOSITORY = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class ModelOptions:
    """Options of `load_model`."""

    workers: int = 1  # concurrent calls of an engine
    trust_remote_code: bool = False  # run code that comes with a model of the hub


def _ge2e(name: str, _weights: str, _options: ModelOptions) -> Model:
    from singerembed.evaluation.baselines.ge2e import Ge2eModel

    return Ge2eModel(name)


def _campplus(name: str, weights: str, _options: ModelOptions) -> Model:
    from singerembed.evaluation.baselines.campplus import CamPlusPlusModel

    return CamPlusPlusModel(name, weights)


def _mfcc(name: str, _weights: str, _options: ModelOptions) -> Model:
    from singerembed.evaluation.baselines.mfcc import MfccModel

    return MfccModel(name)


def _untrained(name: str, _weights: str, _options: ModelOptions) -> Model:
    from singerembed.evaluation.baselines.encoders import untrained_model

    return untrained_model(name)


def _shipped(name: str, _weights: str, options: ModelOptions) -> Model:
    from singerembed.evaluation.baselines.encoders import engine_model

    return engine_model(None, name, options.workers)


def _voxceleb(name: str, weights: str, _options: ModelOptions) -> Model:
    from singerembed.evaluation.baselines.voxceleb import load_voxceleb

    return load_voxceleb(name, weights)


def _wav2vec2(name: str, weights: str, options: ModelOptions) -> Model:
    from singerembed.evaluation.baselines.hub import HubModel

    published = {"wav2vec2-base": "facebook/wav2vec2-base", "xlsr-53": "facebook/wav2vec2-large-xlsr-53"}[name]
    return HubModel(name, weights or published, trust_remote_code=options.trust_remote_code)


# Name on the command line -> loader, and whether it accepts `NAME=WEIGHTS`.
BASELINES: dict[str, tuple[Callable[[str, str, ModelOptions], Model], bool]] = {
    SHIPPED: (_shipped, False),
    "untrained": (_untrained, False),
    "mfcc": (_mfcc, False),
    "ge2e": (_ge2e, False),
    "campplus": (_campplus, True),
    "fast-resnet34": (_voxceleb, True),
    "h-asp": (_voxceleb, True),
    "wav2vec2-base": (_wav2vec2, True),
    "xlsr-53": (_wav2vec2, True),
}


def load_model(text: str, options: ModelOptions | None = None) -> Model:
    """Load the model that `text` names.

    `text` is an engine file, a checkpoint, an official method, a baseline (`NAME`, or `NAME=WEIGHTS` with a path or URL
    of its weights), or a folder or hub name of a transformers model (`OWNER/NAME`, or `transformers:` before either).
    Raises UsageError for anything else, and the errors of the loader.
    """
    options = options or ModelOptions()
    name, _, weights = text.partition("=")
    if name in BASELINES and not Path(text).exists():
        load, takes_weights = BASELINES[name]
        if weights and not takes_weights:
            raise UsageError(f"--model {text}: {name} takes no weights")
        return load(name, weights, options)
    if text.startswith("transformers:"):
        return _hub(text.removeprefix("transformers:"), options)
    path = Path(text)
    if path.is_file() and _is_engine_file(path):
        from singerembed.evaluation.baselines.encoders import engine_model

        return engine_model(text, path.stem, options.workers)
    if path.is_dir() and (path / "config.json").exists():
        return _hub(text, options)
    if path.exists() or text in OFFICIAL_METHODS or text.startswith("hf:"):
        from singerembed.evaluation.baselines.encoders import checkpoint_model

        return checkpoint_model(text, path.stem)
    if _REPOSITORY.match(text):
        return _hub(text, options)
    raise UsageError(
        f"--model {text}: no such file, and no baseline of that name. Give an engine, a checkpoint, one of "
        f"{', '.join(BASELINES)}, or a transformers model as OWNER/NAME or a folder"
    )


def _hub(source: str, options: ModelOptions) -> Model:
    from singerembed.evaluation.baselines.hub import HubModel

    return HubModel(Path(source).name, source, trust_remote_code=options.trust_remote_code)


def _is_engine_file(path: Path) -> bool:
    with path.open("rb") as file:
        return is_engine(file.read(len(MAGIC)))
