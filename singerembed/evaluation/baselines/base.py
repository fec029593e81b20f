"""The interface of a compared model: crops at its own sample rate in, one embedding per crop and layer out."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from singerembed.errors import MissingDependencyError

ONLY_LAYER = ""  # layer name of a model with a single embedding

Crops = NDArray[np.float32]


@dataclass(frozen=True)
class ModelFacts:
    """Properties of a model, and those on the official poster for comparison."""

    name: str  # in the table
    sample_rate: int  # Hz
    n_parameters: int | None  # None if unknown
    description: str  # for display: weights and front end
    poster: str = ""  # parameters / rate / dimensions on the poster
    standardise: bool = False  # scale each dimension to mean 0 and deviation 1 over the data before comparison


class Model(Protocol):
    """A model that embeds crops of 4 s."""

    facts: ModelFacts
    batch: int  # crops per call at which throughput is best
    workers: int  # number of concurrent calls that it can use

    def embed(self, crops: Crops) -> dict[str, NDArray[np.float32]]:
        """Embed `crops`, float32 [n, 4 s at facts.sample_rate], full scale 1, none of them silent.

        Return embeddings by layer name, float32 [n, dim] each.
        """
        ...

    def close(self) -> None:
        """Free its resources."""
        ...


def require(module: str, purpose: str, package: str = "") -> Any:
    """Import and return an optional module. Raises MissingDependencyError naming the extra."""
    try:
        return import_module(module)
    except ImportError as exc:
        missing = package or module.partition(".")[0]
        raise MissingDependencyError(purpose, missing, "eval") from exc


def one_thread() -> AbstractContextManager[Any]:
    """Limit BLAS and OpenMP to one thread within a `with` block.

    More threads gain little on the small matrices of a probe or a map, and wait for each other on shared cores: a probe
    of 0.8 s took minutes.
    """
    threadpoolctl = require("threadpoolctl", "the evaluation", "scikit-learn")
    return threadpoolctl.threadpool_limits(1)  # type: ignore[no-any-return]


def count_parameters(module: Any) -> int:
    """Count the parameters of a torch module; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())
