"""The implementations that singerembed is compared with: the official pipeline, and other libraries for its parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from singerembed.engine.torch import load_encoder
from singerembed.model.checkpoint import Checkpoint
from singerembed.model.spec import ModelSpec

Floats = NDArray[np.float32]


class OfficialPipeline:
    """The steps of the official code, with its libraries: soundfile, NumPy, nnAudio, torch, torchvision."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from nnAudio.features import MelSpectrogram

        spec = checkpoint.spec
        self._spec = spec
        self._mel = MelSpectrogram(n_fft=spec.n_fft, hop_length=spec.hop_samples, n_mels=spec.n_mels, verbose=False)
        self._encoder = load_encoder(checkpoint)

    def embed(self, crops: Floats) -> Floats:
        """Embed crops [n, crop_samples], full scale 1."""
        with torch.inference_mode():
            normalised = crops / np.abs(crops).max(axis=1, keepdims=True)
            log_mel = torch.log(self._mel(torch.from_numpy(normalised)) + self._spec.log_offset)
            result: Floats = self._encoder(log_mel / log_mel.max()).numpy()
            return result

    def run(self, paths: list[Path], batch: int) -> Floats:
        """Embed all consecutive crops of recordings, `batch` at a time."""
        embeddings = []
        for path in paths:
            pcm, _ = soundfile.read(path)
            mono = pcm.mean(axis=1).astype(np.float32)
            n = len(mono) // self._spec.crop_samples
            crops = mono[: n * self._spec.crop_samples].reshape(n, -1)
            embeddings += [self.embed(crops[i : i + batch]) for i in range(0, n, batch)]
        return np.concatenate(embeddings)


def mel_rivals(spec: ModelSpec, crop: Floats) -> dict[str, Callable[[], int]]:
    """Return functions that compute power mel spectrograms of one crop with other libraries, if installed."""
    return {
        name: rival
        for name, make in (
            ("nnAudio", _nnaudio),
            ("torchaudio", _torchaudio),
            ("torch.stft and a dense basis", _torch_stft),
            ("librosa", _librosa),
            ("scipy and a sparse basis", _scipy),
        )
        if (rival := _or_none(make, spec, crop)) is not None
    }


def _or_none(make: Callable[..., Callable[[], int]], spec: ModelSpec, crop: Floats) -> Callable[[], int] | None:
    try:
        return make(spec, crop)
    except (ImportError, OSError):
        return None


def _counting(call: Callable[[], object]) -> Callable[[], int]:
    def work() -> int:
        with torch.inference_mode():
            call()
        return 1

    return work


def _nnaudio(spec: ModelSpec, crop: Floats) -> Callable[[], int]:
    from nnAudio.features import MelSpectrogram

    mel = MelSpectrogram(n_fft=spec.n_fft, hop_length=spec.hop_samples, n_mels=spec.n_mels, verbose=False)
    tensor = torch.from_numpy(crop)
    return _counting(lambda: mel(tensor))


def _torchaudio(spec: ModelSpec, crop: Floats) -> Callable[[], int]:
    from torchaudio.transforms import MelSpectrogram

    mel = MelSpectrogram(
        spec.mel_sample_rate,
        spec.n_fft,
        hop_length=spec.hop_samples,
        n_mels=spec.n_mels,
        norm="slaney",
        mel_scale="slaney",
    )
    tensor = torch.from_numpy(crop)
    return _counting(lambda: mel(tensor))


def _torch_stft(spec: ModelSpec, crop: Floats) -> Callable[[], int]:
    from singerembed.model.mel import mel_basis

    tensor, window = torch.from_numpy(crop), torch.hann_window(spec.n_fft)
    basis = torch.from_numpy(mel_basis(spec))

    def mel() -> torch.Tensor:
        spectrum = torch.stft(
            tensor, spec.n_fft, spec.hop_samples, window=window, pad_mode="reflect", return_complex=True
        )
        return basis @ (spectrum.real**2 + spectrum.imag**2)

    return _counting(mel)


def _librosa(spec: ModelSpec, crop: Floats) -> Callable[[], int]:
    import librosa

    def mel() -> object:
        return librosa.feature.melspectrogram(
            y=crop,
            sr=spec.mel_sample_rate,
            n_fft=spec.n_fft,
            hop_length=spec.hop_samples,
            n_mels=spec.n_mels,
            pad_mode="reflect",
        )

    return _counting(mel)


def _scipy(spec: ModelSpec, crop: Floats) -> Callable[[], int]:
    import scipy.fft
    import scipy.sparse

    from singerembed.model.mel import mel_basis

    basis = scipy.sparse.csr_matrix(mel_basis(spec))
    window = np.hanning(spec.n_fft + 1)[:-1].astype(np.float32)

    def mel() -> object:
        padded = np.pad(crop, spec.n_fft // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, spec.n_fft)[:: spec.hop_samples]
        spectrum = scipy.fft.rfft(frames * window, axis=1)
        return basis @ (spectrum.real**2 + spectrum.imag**2).T

    return _counting(mel)


def encoder_rivals(
    onnx_model: bytes, checkpoint: Checkpoint, log_mel: Floats, cores: int
) -> dict[str, Callable[[], int]]:
    """Return functions that run one batch of the encoder with other runtimes and settings, on all cores."""
    rivals: dict[str, Callable[[], int]] = {}
    encoder = load_encoder(checkpoint)
    one = torch.from_numpy(log_mel[:1])
    rivals["torch, batch 1"] = _counting(lambda: encoder(one))
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_model, providers=["CPUExecutionProvider"])
    for batch in (1, 16):
        rivals[f"ONNX Runtime as it comes, batch {batch}"] = _session_work(session, log_mel, batch)
    try:
        import openvino
    except ImportError:
        return rivals
    core = openvino.Core()
    model = core.read_model(onnx_model)
    model.reshape([1, *log_mel.shape[1:]])
    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": cores}
    queue = openvino.AsyncInferQueue(core.compile_model(model, "CPU", hints))
    feed = np.ascontiguousarray(log_mel[:1])

    def stream() -> int:
        for _ in range(32):
            queue.start_async(feed)
        queue.wait_all()
        return 32

    rivals["OpenVINO, throughput hint"] = stream
    return rivals


def _session_work(session: object, log_mel: Floats, batch: int) -> Callable[[], int]:
    feed = {"log_mel": np.ascontiguousarray(np.resize(log_mel, (batch, *log_mel.shape[1:])))}

    def work() -> int:
        session.run(None, feed)  # type: ignore[attr-defined]
        return batch

    return work
