"""Singer identity embeddings for whole music libraries."""

from __future__ import annotations

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

# In the project's own folder Python finds these sources before the installed package, which alone has the compiled
# part: `python -m training.train` and `python -m benchmarks` are started there.
__path__ = extend_path(__path__, __name__)

if TYPE_CHECKING:
    from singerembed.engine.build import BuildOptions, build_engine
    from singerembed.engine.embedder import Embedder, load_engine
    from singerembed.jobs.options import RunOptions
    from singerembed.jobs.run import RunSummary, run
    from singerembed.model.spec import ModelSpec
    from singerembed.search.query import Index, open_index

    __version__: str

__all__ = [
    "BuildOptions",
    "Embedder",
    "Index",
    "ModelSpec",
    "RunOptions",
    "RunSummary",
    "build_engine",
    "load_engine",
    "open_index",
    "run",
]

_HOMES = {
    "BuildOptions": "singerembed.engine.build",
    "Embedder": "singerembed.engine.embedder",
    "Index": "singerembed.search.query",
    "ModelSpec": "singerembed.model.spec",
    "RunOptions": "singerembed.jobs.options",
    "RunSummary": "singerembed.jobs.run",
    "build_engine": "singerembed.engine.build",
    "load_engine": "singerembed.engine.embedder",
    "open_index": "singerembed.search.query",
    "run": "singerembed.jobs.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name's module when it is first used: `import singerembed` alone costs nothing."""
    if name == "__version__":  # pyproject.toml has the number; importlib.metadata takes longer than all of this file
        from importlib.metadata import version

        return version("singerembed")
    if name not in _HOMES:
        raise AttributeError(f"module 'singerembed' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
