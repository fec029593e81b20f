"""The synthetic corpus that tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.synthetic import make_corpus

SINGERS, RECORDINGS = 6, 2


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests compare figures bit for bit, and share the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six synthetic singers with two recordings of 5 s each."""
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, singers=SINGERS, recordings=RECORDINGS, seconds=5.0, seed=3)
    return folder
