"""Writes files of tensors atomically."""

from __future__ import annotations

from pathlib import Path

import torch

from singerembed.errors import OutputError
from singerembed.storage import publishing


def save(content: object, path: Path) -> None:
    """Save `content` with `torch.save` to a temporary file, then rename. On failure keep `path`, raise OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with publishing(str(path)) as temporary, Path(temporary).open("wb") as file:
            torch.save(content, file)  # given a file name it would store the name in the archive
    except (OSError, RuntimeError) as exc:  # torch raises RuntimeError on a full disk
        raise OutputError(f"{path} cannot be written: {str(exc).splitlines()[0]}. Is there room on the disk?") from exc
