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

from singerembed.audio.crops import CropPlan, read_crops
from singerembed.audio.limits import TimeLimit
from singerembed.audio.recording import open_recording
from singerembed.engine.file import EngineFile, read_engine_file
from singerembed.engine.native import NativeEngine
from singerembed.evaluation.data import read_labelled
from singerembed.evaluation.metrics import bootstrap_over_singers, equal_error_rate

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_REPLICATES = 1000


class Trials:
    """All pairs of crops of two songs."""

    def __init__(self, singer: Ints, song: Ints) -> None:
        first, second = np.triu_indices(len(singer), 1)
        apart = song[first] != song[second]
        self.first, self.second = first[apart], second[apart]
        self.singer, self.song = singer, song
        self.same = singer[self.first] == singer[self.second]

    def rate(self, scores: Floats, drawn: Ints | None = None) -> float:
        """Equal error rate in %. `drawn`: how often a bootstrap drew each singer."""
        weights = None
        if drawn is not None:
            a, b = drawn[self.singer[self.first]], drawn[self.singer[self.second]]
            weights = (a * np.where(self.same, 1, b)).astype(float)
        return 100 * equal_error_rate(self.same, scores[self.first, self.second], weights).rate

    def nearest(self, scores: Floats) -> float:
        """How often the nearest crop of another song is the singer's, in %."""
        hidden = np.where(self.song[:, np.newaxis] == self.song, -np.inf, scores)
        return float(100 * (self.singer[hidden.argmax(axis=1)] == self.singer).mean())

    def report(self, name: str, exact: Floats, rounded: Floats) -> None:
        """Print the rates of scores in FP32 and in int8."""
        interval = bootstrap_over_singers(
            lambda drawn: self.rate(rounded, drawn) - self.rate(exact, drawn),
            int(self.singer.max()) + 1,
            replicates=_REPLICATES,
        )
        before, after = self.rate(exact), self.rate(rounded)
        print(
            f"{name:<8} EER {before:.2f} % in FP32, {after:.2f} % in int8: "
            f"{after - before:+.2f} ({interval.low:+.2f} to {interval.high:+.2f}); "
            f"nearest right {self.nearest(exact):.1f} and {self.nearest(rounded):.1f} %"
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
    singers = np.unique([r.singer for r in recordings], return_inverse=True)[1]
    songs = [(r.singer, r.conditions.get(arguments.song_column, str(i))) for i, r in enumerate(recordings)]
    song = np.unique(["\0".join(one) for one in songs], return_inverse=True)[1]
    cosine = (exact * rounded).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    print(f"{len(exact)} crops, {singers.max() + 1} singers")
    print(f"cosine of int8 to FP32: median {np.median(cosine):.5f}, least {cosine.min():.5f}")
    trials = Trials(singers[recording], song[recording])
    trials.report("cosine", cosines(exact), cosines(rounded))
    trials.report("centred", cosines(exact - exact.mean(axis=0)), cosines(rounded - rounded.mean(axis=0)))


if __name__ == "__main__":
    main()
