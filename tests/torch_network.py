"""The encoder by torch in FP16: a `Network` for checks of all the rest, where a GPU has no TensorRT."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from singerembed.engine.build import fold_batch_norm
from singerembed.engine.device import OutOfDeviceMemory
from singerembed.engine.torch import load_encoder
from singerembed.model.checkpoint import Checkpoint


class TorchNetwork:
    """See `Network`. Its stream is the caller's, so that nothing has to be ordered."""

    max_batch = 64
    half_input = False
    capturable = False  # torch allocates while it runs, which a graph would record

    def __init__(
        self, checkpoint: Checkpoint, index: int = 0, device: str = "cuda", dtype: Any = torch.float16
    ) -> None:
        """Load the encoder on `device`, number `index`, to compute in `dtype`."""
        self._spec, self._dtype = checkpoint.spec, dtype
        self._place = torch.device(device, index) if device == "cuda" else torch.device(device)
        self.description = f"torch {torch.__version__} ({self._place}, {str(dtype).removeprefix('torch.')})"
        self._encoder = fold_batch_norm(load_encoder(checkpoint)).eval().to(self._place)

    def prepare(self, lanes: int, batches: Sequence[int]) -> None:
        """See `Network.prepare`. Does nothing: torch allocates when it first runs a batch."""

    def enqueue(self, lane: int, batch: int, log_mel: int, embedding: int, stream: int) -> None:
        """See `Network.enqueue`."""
        source = self._at(log_mel, (batch, self._spec.n_mels, self._spec.n_frames))
        target = self._at(embedding, (batch, self._spec.embedding_dim))
        try:
            with (
                torch.inference_mode(),
                self._on(stream),
                torch.autocast(self._place.type, self._dtype, enabled=self._dtype != torch.float32),
            ):
                target.copy_(self._encoder(source))
        except torch.OutOfMemoryError as exc:
            raise OutOfDeviceMemory(str(exc)) from exc

    def close(self) -> None:
        """See `Network.close`."""
        del self._encoder

    def _on(self, stream: int) -> Any:
        if self._place.type == "cpu":
            return torch.no_grad()
        external: Any = torch.cuda.ExternalStream
        return torch.cuda.stream(external(stream, device=self._place))

    def _at(self, address: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The float32 tensor at an address."""
        if self._place.type == "cpu":
            size = torch.float32.itemsize * torch.Size(shape).numel()
            memory: Any = (ctypes.c_char * size).from_address(address)
            return torch.frombuffer(memory, dtype=torch.float32).reshape(shape)

        interface = {"shape": shape, "typestr": "<f4", "data": (address, False), "version": 3}
        return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device=self._place)
