"""Writes a run's tensors so that a reader finds the whole file, or the one before it."""

from __future__ import annotations

from pathlib import Path

import torch

from singerembed.errors import OutputError
from singerembed.storage import publishing


def save(content: object, path: Path) -> None:
    """`torch.save` beside `path`, then rename. Raises OutputError; an older `path` is then as it was."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with publishing(str(path)) as temporary, Path(temporary).open("wb") as file:
            torch.save(content, file)  # given a name it would write that into the archive
    except (OSError, RuntimeError) as exc:  # a full disk is a RuntimeError to torch
        raise OutputError(f"{path} cannot be written: {str(exc).splitlines()[0]}. Is there room on the disk?") from exc
