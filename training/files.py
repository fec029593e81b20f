"""Writes files of tensors, and checkpoints of the project's own layout, atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from singerembed.errors import OutputError
from singerembed.model.checkpoint import FORMAT, FORMAT_VERSION, Checkpoint
from singerembed.storage import publishing


def save(content: object, path: Path) -> None:
    """Save `content` with `torch.save` to a temporary file, then rename. On failure keep `path`, raise OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with publishing(str(path)) as temporary, Path(temporary).open("wb") as file:
            torch.save(content, file)  # given a file name it would store the name in the archive
    except (OSError, RuntimeError) as exc:  # torch raises RuntimeError on a full disk
        raise OutputError(f"{path} cannot be written: {str(exc).splitlines()[0]}. Is there room on the disk?") from exc


def save_checkpoint(checkpoint: Checkpoint, facts: dict[str, Any], target: Path, *, half: bool = False) -> None:
    """Write the project's layout, which `singerembed.model.checkpoint` reads. Raises OutputError.

    `half` rounds tensors of two or more dimensions to FP16; the statistics of batch norms may exceed its range.
    """
    tensors = dense(checkpoint.state_dict)
    if half:
        tensors = {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "spec": checkpoint.spec.to_dict(),
        "state_dict": tensors,
        "training": facts,
    }
    save(content, target)


def dense(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in contiguous memory format; those of training are channels last."""
    return {name: tensor.contiguous() for name, tensor in state_dict.items()}
