"""wav2vec 2.0, XLSR-53 and other audio models of `transformers`: all layers, each averaged over time."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.errors import CheckpointError, UsageError
from singerembed.evaluation.baselines.base import Crops, ModelFacts, count_parameters, require

POSTER = {"wav2vec2-base": "95 M / 16 kHz / 12 x 768", "xlsr-53": "300 M / 16 kHz / 24 x 1024"}
SPEAKER_LAYER = "speaker"  # output of a speaker verification head (x-vector)


class HubModel:
    """An audio model of `transformers`, by hub name or from a folder, with its own feature extractor.

    The environment variables of the hub (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT) apply.
    """

    batch = 4
    workers = 1

    def __init__(self, name: str, source: str, *, layer: str = "", trust_remote_code: bool = False) -> None:
        """Load `source`. `layer`: the only one to return, a number from 1 or `speaker`; empty: all.

        `trust_remote_code`: run code that comes with the model, which some (MERT) need. Raises CheckpointError if it
        cannot be loaded or is not an audio model, and UsageError for a layer that it does not have.
        """
        transformers = require("transformers", f"the model {name}")
        self._torch = require("torch", f"the model {name}")
        source, layer = _split_layer(source, layer)
        trust = {"trust_remote_code": trust_remote_code}
        load = _Loader(source)
        config = load("config.json", lambda: transformers.AutoConfig.from_pretrained(source, **trust))
        self._extract = load(
            "preprocessor_config.json", lambda: transformers.AutoFeatureExtractor.from_pretrained(source, **trust)
        )
        self._rate = int(getattr(self._extract, "sampling_rate", 0))
        if not self._rate:
            raise CheckpointError(f"{source} is no audio model: its feature extractor has no sampling rate")
        self._has_speaker_head = any(str(a).endswith("ForXVector") for a in config.architectures or [])
        kind = transformers.AutoModelForAudioXVector if self._has_speaker_head else transformers.AutoModel
        model = load("model.safetensors", lambda: kind.from_pretrained(source, config=config, **trust))
        # Of an encoder-decoder model (Whisper), only the encoder takes audio.
        self._model = (model.get_encoder() if config.is_encoder_decoder else model).eval()
        self._input = str(self._extract.model_input_names[0])
        self._layer = layer
        self._check_layer(int(getattr(config, "num_hidden_layers", 0)), source)
        self.facts = ModelFacts(
            name=name if not layer else f"{name}@{layer}",
            sample_rate=self._rate,
            n_parameters=count_parameters(self._model),
            description=f"{type(model).__name__} of {source}, layers averaged over time",
            poster=POSTER.get(name, ""),
        )

    def _check_layer(self, n_layers: int, source: str) -> None:
        speaker = [SPEAKER_LAYER] if self._has_speaker_head else []
        if self._layer and self._layer not in {*map(str, range(1, n_layers + 1)), *speaker}:
            raise UsageError(
                f"{source} has no layer {self._layer}: it has 1 to {n_layers}{' and speaker' * len(speaker)}"
            )

    def embed(self, crops: Crops) -> dict[str, NDArray[np.float32]]:
        """See `Model.embed`. Layers are named 1 to n; the input of the first is not returned."""
        inputs = self._extract(list(crops), sampling_rate=self._rate, return_tensors="pt", return_attention_mask=True)
        with self._torch.inference_mode():
            output = self._model(**{self._input: inputs[self._input]}, output_hidden_states=True)
        share = _audio_share(inputs.get("attention_mask"))
        layers = {
            str(number): _mean_over_time(hidden, share) for number, hidden in enumerate(output.hidden_states) if number
        }
        if self._has_speaker_head:
            layers[SPEAKER_LAYER] = output.embeddings.float().numpy()
        return {self._layer: layers[self._layer]} if self._layer else layers

    def close(self) -> None:
        """Do nothing: there is nothing to free."""


def _audio_share(mask: Any) -> float:
    """Return the share of the input that is not padding: some extractors (Whisper's) pad to 30 s."""
    return 1.0 if mask is None else float(mask[0].float().mean())


def _mean_over_time(hidden: Any, share: float) -> NDArray[np.float32]:
    n_frames = max(1, round(share * hidden.shape[1]))
    return np.asarray(hidden[:, :n_frames].float().mean(dim=1).numpy())


def _split_layer(source: str, layer: str) -> tuple[str, str]:
    found = re.fullmatch(r"(.+)@(\d+|speaker)", source)
    return (found[1], found[2]) if found and not layer else (source, layer)


class _Loader:
    """Calls loaders of `transformers`, and turns any exception into a CheckpointError of one line, naming the file."""

    def __init__(self, source: str) -> None:
        self._source = source

    def __call__(self, file: str, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except Exception as exc:
            reason = " ".join(str(exc).split())[:300] or type(exc).__name__
            if "trust_remote_code" in reason:
                raise CheckpointError(
                    f"{self._source} comes with its own code, which is run only with --trust-remote-code"
                ) from exc
            raise CheckpointError(
                f"{self._source}: cannot load {file}: {reason}. Without a network, download config.json, "
                "preprocessor_config.json and model.safetensors on another machine and give their folder"
            ) from exc
