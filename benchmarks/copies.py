"""How near copies of a recording in lossy formats are to it, and how near the nearest other recordings are.

python -m benchmarks.copies CATALOG

Every recording of CATALOG, which has columns path and singer, is encoded by PyAV in each format, and embedded with its
copies by the bundled engine. Scores are those of an index of the originals: of tracks, and of the crops at the same
positions of both, of which the least similar ones count. Other recordings are compared where they have as many crops.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from itertools import combinations
from pathlib import Path

import av
import numpy as np

from singerembed.evaluation.scoring import Moments, fit_scoring
from singerembed.jobs.run import run
from singerembed.search.library import Library, LibraryTrack
from singerembed.search.store import Vectors, track_vector

FORMATS = [
    ("libmp3lame", 320, "mp3"), ("libmp3lame", 128, "mp3"), ("libmp3lame", 64, "mp3"), ("libopus", 96, "ogg"),
    ("aac", 256, "mp4"), ("aac", 128, "mp4"),
]  # fmt: skip


def encode(source: str, target: Path, codec: str, kbit: int, container: str) -> None:
    """Write the recording `source` as mono in a lossy format."""
    rate = 48_000 if codec == "libopus" else 44_100
    with av.open(source) as reader, av.open(str(target), "w", format=container) as writer:
        stream = writer.add_stream(codec, rate=rate, bit_rate=1000 * kbit, layout="mono")
        size = stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(stream.format.name, "mono", rate, frame_size=size)
        for frame in [*reader.decode(audio=0), None]:
            if frame is not None:
                frame.pts = None
            for part in resampler.resample(frame):
                writer.mux(stream.encode(part))
        writer.mux(stream.encode(None))


def write_copies(catalog: str, folder: Path) -> str:
    """Write the copies, and a catalogue of them and of the originals; return its path."""
    path = folder / "copies.csv"
    with Path(catalog).open(encoding="utf-8", newline="") as source:
        rows = list(csv.DictReader(source))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["track_id", "path", "singer", "kind"])
        for number, row in enumerate(rows):
            original = str((Path(catalog).parent / row["path"]).resolve())
            writer.writerow([number, original, row["singer"], "original"])
            for codec, kbit, container in FORMATS:
                target = folder / f"{number}.{codec}.{kbit}.{container}"
                encode(original, target, codec, kbit, container)
                writer.writerow([number, target.name, row["singer"], f"{codec} {kbit}"])
    return str(path)


def text(scores: list[tuple[float, float]], highest: bool) -> str:
    """The extreme and the usual scores of tracks, and of their least similar crops."""
    of_tracks, of_crops = np.array(scores).T
    extreme = np.max if highest else np.min
    return "; ".join(
        f"{what} {'highest' if highest else 'lowest'} {extreme(values):.3f}, median {np.median(values):.3f}"
        for what, values in (("tracks", of_tracks), ("least similar crops", of_crops))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalog")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        output = str(Path(name) / "out.parquet")
        run(write_copies(arguments.catalog, Path(name)), output)
        library = Library([output])
        tracks = list(library.tracks())
    print(f"engine {library.engine['name']} ({library.engine['sha256'][:12]}...)")
    moments = Moments()
    for track in tracks:
        if track.columns["kind"] == "original":
            moments.add(track.embedding)
    scoring = fit_scoring("centred", moments)
    crops = dict[tuple[str, str], tuple[LibraryTrack, Vectors]]()
    for track in tracks:
        crops[track.columns["kind"], track.columns["track_id"]] = track, scoring.vectors(track.embedding)

    def compared(first: tuple[str, str], second: tuple[str, str]) -> tuple[float, float] | None:
        (a, vectors_a), (b, vectors_b) = crops[first], crops[second]
        if not np.array_equal(a.crop, b.crop):
            return None
        of_crops = np.einsum("ij,ij->i", vectors_a, vectors_b)
        return float(track_vector(vectors_a) @ track_vector(vectors_b)), float(of_crops.min())

    originals = [key for key in crops if key[0] == "original"]
    for codec, kbit, _ in FORMATS:
        found = [compared(key, (f"{codec} {kbit}", key[1])) for key in originals]
        same = [scores for scores in found if scores is not None]
        print(f"{codec}, {kbit} kbit/s, {len(same)} of {len(found)} with the same crops: {text(same, False)}")
    pairs = [(a, b, compared(a, b)) for a, b in combinations(originals, 2)]
    others = [(a, b, scores) for a, b, scores in pairs if scores is not None]
    one_singer = [s for a, b, s in others if crops[a][0].columns["singer"] == crops[b][0].columns["singer"]]
    print(f"{len(others)} pairs of other recordings with the same crops: {text([s for _, _, s in others], True)}")
    print(f"{len(one_singer)} of them of one singer: {text(one_singer, True)}")


if __name__ == "__main__":
    main()
