"""The encoder and Spleeter by torch in FP16: networks for checks of all the rest, where a GPU has no TensorRT."""

from __future__ import annotations

import contextlib
import copy
import ctypes
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from singerembed.engine.build import fold_batch_norm
from singerembed.engine.device import OutOfDeviceMemory
from singerembed.engine.spleeter import SpleeterNet, SpleeterOfSamples
from singerembed.engine.tensorrt import Tensors
from singerembed.engine.torch import load_encoder
from singerembed.model.checkpoint import Checkpoint
from singerembed.model.separator_spec import SpectrogramSpec

_LARGEST_HALF = torch.finfo(torch.float16).max


class _OnTheDevice:
    """What runs on the caller's stream, so that nothing has to be ordered, from and to addresses of device memory.

    Its memory comes from a pool of its own, of which nothing is given back: what the first run of a batch allocates,
    outside any capture, is what its graph records.
    """

    def __init__(self, index: int, device: str) -> None:
        """`device`: "cuda", number `index`, or "cpu"."""
        on_gpu = device == "cuda"
        self._place = torch.device(device, index) if on_gpu else torch.device(device)
        self._pool: Any = torch.cuda.MemPool() if on_gpu else None

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


class TorchNetwork(_OnTheDevice):
    """See `Network`."""

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
        super().__init__(index, device)
        self._spec, self._dtype, self.max_batch = checkpoint.spec, dtype, max_batch
        self.capturable = device == "cuda"
        self.description = f"torch {torch.__version__} ({self._place}, {str(dtype).removeprefix('torch.')})"
        encoder = fold_batch_norm(load_encoder(checkpoint)).eval().to(self._place)
        self._mean, self._std = encoder.mean, encoder.std
        self._backbone = encoder.net.to(dtype).to(memory_format=torch.channels_last)

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


class TorchSegments(_OnTheDevice):
    """See `SegmentNetwork`: Spleeter from samples to samples, with masks in FP16 if it is a copy `in_fp16`."""

    def __init__(
        self, network: SpleeterNet, spec: SpectrogramSpec, tensors: Tensors, index: int = 0, device: str = "cuda"
    ) -> None:
        """Load `network` on `device`, number `index`."""
        super().__init__(index, device)
        self._network = SpleeterOfSamples(copy.deepcopy(network), spec).to(self._place)
        self._tensors = tensors
        self.description = f"torch {torch.__version__} ({self._place})"

    def output_of(self, size: int) -> tuple[int, ...]:
        """See `Plan.output_of`."""
        return self._tensors.input_of(size)

    def prepare(self, lanes: int, batches: Sequence[int]) -> None:
        """Do nothing: torch allocates when it first runs a size."""

    def execute(self, lane: int, size: int, source: int, result: int, stream: int) -> None:
        """See `Plan.execute`."""
        mixture, voice = (self._at(address, self._tensors.input_of(size)) for address in (source, result))
        with torch.inference_mode(), self._on(stream):
            voice.copy_(self._network(mixture))

    def close(self) -> None:
        """See `SegmentNetwork`."""
        del self._network, self._pool
