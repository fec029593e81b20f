"""The Python door for arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from conftest import Golden
from numpy.typing import NDArray

import singerembed
from singerembed.engine.build import compare
from singerembed.engine.embedder import Embedder


@pytest.fixture(scope="module")
def embedder(reference_engine: str) -> Embedder:
    return singerembed.load_engine(reference_engine)


def test_crops_of_an_array(embedder: Embedder, golden: Golden) -> None:
    joined = np.concatenate([*golden.pcm, golden.pcm[0][:1000]])  # the remainder is dropped
    for audio in (joined, (joined / 32768).astype(np.float32), joined / 32768, np.stack([joined, joined], axis=1)):
        embedding = embedder.embed(audio, 44_100)
        assert embedding.shape == (8, 1000)
        assert compare(embedding, golden.embedding).cosine > 0.999999


def test_short_and_silent_audio(embedder: Embedder, golden: Golden) -> None:
    short = embedder.embed(golden.pcm[0][:10_000], 44_100)
    assert short.shape == (1, 1000)
    assert np.isfinite(short).all()
    mixed = embedder.embed(np.concatenate([np.zeros(176_400, np.int16), golden.pcm[0]]), 44_100)
    assert np.isnan(mixed[0]).all()
    assert np.isfinite(mixed[1]).all()


def test_other_rates_are_resampled(embedder: Embedder, voice: Callable[..., NDArray[np.float32]]) -> None:
    at_48k, at_44k = embedder.embed(voice(8, 48_000), 48_000), embedder.embed(voice(8), 44_100)
    assert at_48k.shape == at_44k.shape == (2, 1000)
    assert compare(at_48k, at_44k).cosine > 0.99


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (np.zeros((2, 2, 2)), 44_100, "shape"),
        (np.zeros(0), 44_100, "not empty"),
        (np.zeros(10, np.int32), 44_100, "int32"),
        (np.zeros(10), 10, "sample_rate"),
        (np.full(200_000, np.nan), 44_100, "NaN"),
    ],
)
def test_arrays_that_cannot_be_embedded(
    embedder: Embedder, audio: NDArray[np.generic], rate: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        embedder.embed(audio, rate)
