"""What int8 costs in accuracy: an engine's native encoder in FP32 and in int8 on labelled recordings.

python -m benchmarks.int8 ENGINE SOURCE [--song-column song]

ENGINE: an FP32 engine for the native back end or ONNX Runtime. SOURCE: a catalogue, or a folder with a folder for each
singer. Pairs are of crops of two recordings, or of two songs if the catalogue has such a column. Prints cosines and the
difference of equal error rates with its 95 % interval over singers, the same singers drawn for both.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.trials import Trials
from singerembed.audio.crops import CropPlan, read_crops
from singerembed.audio.limits import TimeLimit
from singerembed.audio.recording import open_recording
from singerembed.engine.file import EngineFile, read_engine_file
from singerembed.engine.native import NativeEngine
from singerembed.evaluation.data import read_labelled
from singerembed.evaluation.metrics import bootstrap_over_singers

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_REPLICATES = 1000


def report(trials: Trials, name: str, exact: Floats, rounded: Floats) -> None:
    """Print the rates of scores in FP32 and in int8."""
    interval = bootstrap_over_singers(
        lambda drawn: trials.rate(rounded, drawn) - trials.rate(exact, drawn),
        int(trials.singer.max()) + 1,
        replicates=_REPLICATES,
    )
    before, after = trials.rate(exact), trials.rate(rounded)
    print(
        f"{name:<8} EER {before:.2f} % in FP32, {after:.2f} % in int8: "
        f"{after - before:+.2f} ({interval.low:+.2f} to {interval.high:+.2f}); "
        f"nearest right {trials.nearest(exact):.1f} and {trials.nearest(rounded):.1f} %"
    )


def embed(file: EngineFile, locations: list[str]) -> tuple[Floats, Floats, Ints]:
    """Return the embeddings in FP32 and in int8 of the loud crops, and the recording of each."""
    engines = [NativeEngine(replace(file, spec=replace(file.spec, precision=name))) for name in ("fp32", "int8")]
    rows: tuple[list[Floats], list[Floats]] = [], []
    recording: list[int] = []
    plan = CropPlan(file.spec.crop_samples, file.spec.crop_samples, None)
    for i, location in enumerate(locations):
        with open_recording(location, file.spec.sample_rate, TimeLimit(600)) as reader:
            for block in read_crops(reader, plan, NativeEngine.batch):
                for engine, into in zip(engines, rows, strict=True):
                    into.append(engine.embed(block.pcm).embedding.astype(np.float64))
                recording += [i] * len(rows[0][-1])
    return np.concatenate(rows[0]), np.concatenate(rows[1]), np.array(recording)


def cosines(rows: Floats) -> Floats:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(unit @ unit.T)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine")
    parser.add_argument("source")
    parser.add_argument("--song-column", default="song")
    arguments = parser.parse_args()
    recordings = read_labelled(arguments.source).recordings
    exact, rounded, recording = embed(read_engine_file(arguments.engine), [r.location for r in recordings])
    songs = [r.conditions.get(arguments.song_column, str(i)) for i, r in enumerate(recordings)]
    trials = Trials([recordings[i].singer for i in recording], [songs[i] for i in recording])
    cosine = (exact * rounded).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    print(f"{len(exact)} crops, {len({r.singer for r in recordings})} singers")
    print(f"cosine of int8 to FP32: median {np.median(cosine):.5f}, least {cosine.min():.5f}")
    report(trials, "cosine", cosines(exact), cosines(rounded))
    report(trials, "centred", cosines(exact - exact.mean(axis=0)), cosines(rounded - rounded.mean(axis=0)))


if __name__ == "__main__":
    main()
