"""How a benchmark ends that cannot go on: one line that says why."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from singerembed.errors import SingerEmbedError


@contextmanager
def errors_on_one_line() -> Iterator[None]:
    """Print `Error: ...` and exit with the error's code, where one of singerembed's ends the block or function."""
    try:
        yield
    except SingerEmbedError as exc:
        print(f"Error: {exc}", file=sys.stderr)
        raise SystemExit(exc.exit_code) from exc
