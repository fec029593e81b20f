"""The encoder by torch in FP16: a `Network` for checks of all the rest, where a GPU has no TensorRT."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from singerembed.engine.build import fold_batch_norm
from singerembed.engine.device import OutOfDeviceMemory
from singerembed.engine.torch import load_encoder
from singerembed.model.checkpoint import Checkpoint

_LARGEST_HALF = torch.finfo(torch.float16).max


class TorchNetwork:
    """See `Network`. Its stream is the caller's, so that nothing has to be ordered.

    Its memory comes from a pool of its own, of which nothing is given back: what the first run of a batch allocates,
    outside any capture, is what its graph records.
    """

    half_input = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        index: int = 0,
        device: str = "cuda",
        dtype: Any = torch.float16,
        max_batch: int = 64,
    ) -> None:
        """Load the encoder on `device`, number `index`, to compute in `dtype` after the normalisation."""
        self._spec, self._dtype, self.max_batch = checkpoint.spec, dtype, max_batch
        on_gpu = device == "cuda"
        self._place = torch.device(device, index) if on_gpu else torch.device(device)
        self.capturable = on_gpu
        self.description = f"torch {torch.__version__} ({self._place}, {str(dtype).removeprefix('torch.')})"
        encoder = fold_batch_norm(load_encoder(checkpoint)).eval().to(self._place)
        self._mean, self._std = encoder.mean, encoder.std
        self._backbone = encoder.net.to(dtype).to(memory_format=torch.channels_last)
        self._pool: Any = torch.cuda.MemPool() if on_gpu else None

    def prepare(self, lanes: int, batches: Sequence[int]) -> None:
        """See `Network.prepare`. Does nothing: torch allocates when it first runs a batch."""

    def enqueue(self, lane: int, batch: int, log_mel: int, embedding: int, stream: int) -> None:
        """See `Network.enqueue`."""
        source = self._at(log_mel, (batch, self._spec.n_mels, self._spec.n_frames))
        target = self._at(embedding, (batch, self._spec.embedding_dim))
        try:
            with torch.inference_mode(), self._on(stream):
                image = (source.unsqueeze(1) - self._mean) / self._std
                if self._dtype == torch.float16:
                    image = image.clamp(-_LARGEST_HALF, _LARGEST_HALF)
                target.copy_(self._backbone(image.to(self._dtype, memory_format=torch.channels_last)))
        except torch.OutOfMemoryError as exc:
            raise OutOfDeviceMemory(str(exc)) from exc

    def close(self) -> None:
        """See `Network.close`."""
        del self._backbone, self._pool

    @contextlib.contextmanager
    def _on(self, stream: int) -> Iterator[None]:
        if self._place.type == "cpu":
            yield
            return
        external: Any = torch.cuda.ExternalStream
        with torch.cuda.stream(external(stream, device=self._place)), torch.cuda.use_mem_pool(self._pool):
            yield

    def _at(self, address: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The float32 tensor at an address."""
        if self._place.type == "cpu":
            size = torch.float32.itemsize * torch.Size(shape).numel()
            memory: Any = (ctypes.c_char * size).from_address(address)
            return torch.frombuffer(memory, dtype=torch.float32).reshape(shape)

        interface = {"shape": shape, "typestr": "<f4", "data": (address, False), "version": 3}
        return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device=self._place)
