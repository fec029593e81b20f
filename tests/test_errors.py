"""The exception tree."""

from __future__ import annotations

import pickle

import pytest

from singerembed import errors
from singerembed.errors import InterruptedRun, MissingDependencyError, OutputError, SingerEmbedError, TrackError

EXAMPLES = (
    TrackError("not_found", "file not found"),
    MissingDependencyError("a thing", "pkg", "extra"),
    InterruptedRun("stopped", 15),
    OutputError("no space"),
)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_errors_go_from_process_to_process(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__


def test_the_tree_is_drawn_as_it_is() -> None:
    drawn = errors.__doc__ or ""
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, SingerEmbedError | TrackError):
            assert name in drawn
