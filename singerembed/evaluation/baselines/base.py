"""The seam of the comparison: a model takes crops at its own rate, and gives one embedding a crop and layer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from singerembed.errors import MissingDependencyError

ONLY_LAYER = ""  # the name of the layer of a model that has one embedding

Crops = NDArray[np.float32]


@dataclass(frozen=True)
class ModelFacts:
    """What was measured of a model, and what the poster says of the one that it reports."""

    name: str  # as the table calls it
    sample_rate: int  # Hz
    n_parameters: int | None  # None where the file does not say
    description: str  # weights and front end, for people
    poster: str = ""  # parameters / rate / dimensions on the poster
    standardise: bool = False  # whether dimensions are brought to one scale over the data before they are compared


class Model(Protocol):
    """A model that embeds crops of 4 s."""

    facts: ModelFacts
    batch: int  # crops in one call that keep it busy
    workers: int  # callers at a time that it can use

    def embed(self, crops: Crops) -> dict[str, NDArray[np.float32]]:
        """Embed `crops`, float32 [n, 4 s at facts.sample_rate], full scale 1, none of them silent.

        Returns the name of each layer and its embeddings, float32 [n, dim].
        """
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def require(module: str, purpose: str, package: str = "") -> Any:
    """Import an optional module. Raises MissingDependencyError naming the extra."""
    try:
        return import_module(module)
    except ImportError as exc:
        missing = package or module.partition(".")[0]
        raise MissingDependencyError(purpose, missing, "eval") from exc


def one_thread() -> AbstractContextManager[Any]:
    """Within this block BLAS and OpenMP use one thread.

    On the small matrices of a probe or a map several gain little, and where cores are shared they wait for each other:
    a probe of 0.8 s took minutes.
    """
    threadpoolctl = require("threadpoolctl", "the evaluation", "scikit-learn")
    return threadpoolctl.threadpool_limits(1)  # type: ignore[no-any-return]


def count_parameters(module: Any) -> int:
    """Count the trainable numbers of a torch module; parameters that two layers share count once."""
    return sum(parameter.numel() for parameter in module.parameters())
