"""What copies of recordings in lossy formats have in common with them, and what other recordings have.

python -m benchmarks.copies CATALOG [OUT.parquet]

The recordings of each singer of CATALOG, which has columns path and singer, are joined to one, which is encoded in
each format, mastered anew, and embedded with its copies by the bundled engine. Of OUT.parquet, an output of
`singerembed run` on the corpus of training/recipes/free_voices.py, recordings are drawn that have no crop in common:
of one speaker, whose folders end in numbers, and of two. Measures are those of singerembed/search/copies.py.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import soundfile
from numpy.typing import NDArray

from benchmarks.command import errors_on_one_line
from benchmarks.voices import RATE, Voice, read_voices
from singerembed.evaluation.scoring import Moments, fit_scoring
from singerembed.jobs.run import run
from singerembed.search.copies import LEVEL_DB, MIN_CROPS, NEAR_COPY
from singerembed.search.library import Library

FORMATS = [
    ("libmp3lame", 320, "mp3"), ("libmp3lame", 128, "mp3"), ("libmp3lame", 64, "mp3"), ("libopus", 96, "ogg"),
    ("libopus", 48, "ogg"), ("aac", 256, "mp4"), ("aac", 128, "mp4"),
]  # fmt: skip
DRAWN = 200_000
Floats = NDArray[np.floating]


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


def mastered(samples: Floats, rate: int) -> Floats:
    """Return `samples` [n] with more above 4 kHz, and louder into a soft limiter."""
    spectrum = np.fft.rfft(samples)
    spectrum[np.fft.rfftfreq(len(samples), 1 / rate) > 4000] *= 1.4
    louder = np.tanh(1.5 * np.fft.irfft(spectrum, len(samples)))
    return np.asarray(0.95 * louder / np.abs(louder).max())


def write_copies(catalog: str, folder: Path) -> str:
    """Write joined recordings, their copies, and a catalogue of both; return its path."""
    recordings = dict[str, list[Voice]]()
    for recording in read_voices(catalog):
        recordings.setdefault(recording.singer, []).append(recording)
    path = folder / "copies.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["track_id", "path", "kind"])
        for number, (singer, voices) in enumerate(recordings.items()):
            samples = np.concatenate([voice.samples() for voice in voices])
            original, master = folder / f"{number}.flac", folder / f"{number}.master.flac"
            soundfile.write(original, samples, RATE)
            soundfile.write(master, mastered(samples, RATE), RATE)
            vorbis = folder / f"{number}.vorbis.ogg"
            with soundfile.SoundFile(vorbis, "w", RATE, 1, format="OGG", subtype="VORBIS") as ogg:
                for first in range(0, len(samples), 8192):  # all at once overflows libsndfile's stack
                    ogg.write(samples[first : first + 8192])
            kinds = [("original", original), ("vorbis", vorbis), ("mastered anew", master)]
            for codec, kbit, container in FORMATS:
                target = folder / f"{number}.{codec}.{kbit}.{container}"
                encode(str(original), target, codec, kbit, container)
                kinds.append((f"{codec} {kbit}", target))
            writer.writerows([singer, target.name, kind] for kind, target in kinds)
    return str(path)


def measures(one: Floats, two: Floats, level_one: Floats, level_two: Floats) -> tuple[Floats, Floats]:
    """Return mean cosine and level difference of pairs: vectors [pairs, crops, dim], levels [pairs, crops]."""
    return np.einsum("pcd,pcd->p", one, two) / one.shape[1], (level_one - level_two).std(axis=1)


def report(what: str, cosine: Floats, level: Floats) -> None:
    copies = int(((cosine >= NEAR_COPY) & (level <= LEVEL_DB)).sum())
    print(
        f"{what}: mean cosine {np.min(cosine):.3f} to {np.max(cosine):.3f}, median {np.median(cosine):.3f}; levels "
        f"{np.min(level):.3f} to {np.max(level):.3f} dB, median {np.median(level):.3f}; {copies:,} of {len(level):,} "
        "alike",
        flush=True,
    )


def report_copies(catalog: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        output = str(Path(name) / "out.parquet")
        run(write_copies(catalog, Path(name)), output)
        library = Library([output])
        tracks = list(library.tracks())
    print(f"engine {library.engine['name']} ({library.engine['sha256'][:12]}...)")
    moments = Moments()
    for track in tracks:
        if track.columns["kind"] == "original":
            moments.add(track.embedding)
    scoring = fit_scoring("centred", moments)
    originals = {track.columns["track_id"]: track for track in tracks if track.columns["kind"] == "original"}
    print(f"{len(originals)} recordings of {sorted(len(track.crop) for track in originals.values())} crops")
    for kind in dict.fromkeys(track.columns["kind"] for track in tracks):
        found = []
        for track in tracks:
            first = originals[track.columns["track_id"]]
            if track.columns["kind"] == kind != "original" and np.array_equal(track.crop, first.crop):
                vectors = (scoring.vectors(each.embedding)[np.newaxis] for each in (track, first))
                found.append(measures(*vectors, track.rms_dbfs[np.newaxis], first.rms_dbfs[np.newaxis]))
        if found:
            report(f"{kind}, as many crops", *np.concatenate(found, axis=1))


def report_others(output: str) -> None:
    table = pq.read_table(output, columns=["path", "rms_dbfs", "embedding"])
    embedding = np.stack(table["embedding"].to_numpy())
    moments = Moments()
    moments.add(embedding)
    vectors, level = fit_scoring("centred", moments).vectors(embedding), table["rms_dbfs"].to_numpy().astype(float)
    folders = [Path(path).parent.name.rpartition("-")[0] for path in table["path"].to_pylist()]
    speaker = np.unique(folders, return_inverse=True)[1]
    several = [rows for rows in (np.flatnonzero(speaker == s) for s in set(speaker.tolist())) if len(rows) >= 20]
    spread = np.median([level[rows].std() for rows in several])
    print(
        f"{len(level):,} crops, {len(several)} speakers with 20 or more, whose levels have a deviation of {spread:.1f}"
    )
    rng = np.random.default_rng(0)
    for n in (1, 2, 4, MIN_CROPS, 8):
        for what in ("one speaker", "two speakers"):
            found = []
            for _ in range(0, DRAWN, 2000):
                pairs = [rng.choice(len(several), 2, replace=False) for _ in range(2000)]
                if what == "one speaker":
                    one, two = np.split(
                        np.stack([rng.choice(several[a], 2 * n, replace=False) for a, _ in pairs]), 2, 1
                    )
                else:
                    one, two = (
                        np.stack([rng.choice(several[pair[side]], n, replace=False) for pair in pairs])
                        for side in (0, 1)
                    )
                found.append(measures(vectors[one], vectors[two], level[one], level[two]))
            cosine, levels = np.concatenate(found, axis=1)
            report(f"others of {what}, {n} crops", cosine, levels)
            counts = ", ".join(f"{int((levels <= d).sum()):,} within {d:g} dB" for d in (LEVEL_DB, 0.2, 0.4, 0.8))
            print(f"    {int((cosine >= NEAR_COPY).sum()):,} are near by cosine; {counts}", flush=True)


@errors_on_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalog")
    parser.add_argument("output", nargs="?")
    arguments = parser.parse_args()
    report_copies(arguments.catalog)
    if arguments.output:
        report_others(arguments.output)


if __name__ == "__main__":
    main()
