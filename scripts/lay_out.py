"""Prepares VCTK, NUS-48E, VocalSet or M4Singer as in the paper: 4 s crops, one folder per singer.

Like the official `preprocess_dataset.py` and `create_speaker_pairs.py` (github SonyCSLParis/ssl-singer-identity), with
the same names of crops: `<singer>/<name>_<start>_<end>_4s.wav`. docs/evaluation.md lists the differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import soundfile
import soxr

from singerembed.evaluation.pairs import draw_pairs, write_pair_file

SEGMENT_SECONDS = 4
SAMPLE_RATE = 44_100

Named = Iterator[tuple[str, str, Path]]  # singer, name without suffix, file


def _clean(name: str) -> str:
    """Remove commas, the separator of pair files, and spaces, as in the official names."""
    return name.replace(",", "").replace(" ", "")


def vocalset(root: Path) -> Named:
    """`FULL/<singer>/<exercise>/<technique>/*.wav`: the file's own name, which holds singer, exercise and technique."""
    for path in sorted(root.glob("*/*/*/*.wav")):
        yield path.relative_to(root).parts[0], path.stem, path


def m4singer(root: Path) -> Named:
    """`<singer>#<song>/*.wav`: the singer is the part before the #."""
    for path in sorted(root.glob("*#*/*.wav")):
        yield path.parent.name.split("#")[0], _clean(f"{path.parent.name}-{path.stem}"), path


def nus48e(root: Path) -> Named:
    """`<singer>/sing/*.wav`; speech (`read/`) is skipped."""
    for path in sorted(root.glob("*/sing/*.wav")):
        singer = path.parts[-3]
        yield singer, _clean(f"{singer}-sing-{path.stem}"), path


def vctk(root: Path) -> Named:
    """`<speaker>/*.wav` or `.flac`, only one microphone (`mic1`) if there are two."""
    for path in sorted([*root.glob("*/*.wav"), *root.glob("*/*.flac")]):
        if not path.stem.endswith("_mic2"):
            yield path.parent.name, _clean(f"{path.parent.name}-{path.stem}"), path


LAYOUTS: dict[str, Callable[[Path], Named]] = {
    "vocalset": vocalset,
    "m4singer": m4singer,
    "nus48e": nus48e,
    "vctk": vctk,
}


def write_crops(singer: str, name: str, path: Path, target: Path) -> list[str]:
    """Cut one recording into crops, dropping the remainder. Return the crops' names relative to `target`."""
    pcm, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = soxr.resample(pcm.mean(axis=1), rate, SAMPLE_RATE)
    size = SEGMENT_SECONDS * SAMPLE_RATE
    names = []
    for i in range(len(mono) // size):
        start = i * SEGMENT_SECONDS
        crop = f"{singer}/{name}_{start}_{start + SEGMENT_SECONDS}_{SEGMENT_SECONDS}s.wav"
        (target / singer).mkdir(parents=True, exist_ok=True)
        soundfile.write(target / crop, mono[i * size : (i + 1) * size], SAMPLE_RATE, subtype="PCM_16")
        names.append(crop)
    return names


@click.command()
@click.argument("dataset", type=click.Choice(sorted(LAYOUTS)))
@click.argument("root", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--pairs", default=20_000, show_default=True, help="How many to draw for TARGET/speaker_pairs.txt.")
@click.option("--seed", default=123, show_default=True)
def main(dataset: str, root: Path, target: Path, pairs: int, seed: int) -> None:
    """Write crops of DATASET, unpacked in ROOT, to TARGET, in one folder per singer, with a pair file."""
    names: list[str] = []
    for singer, name, path in LAYOUTS[dataset](root):
        names += write_crops(singer, name, path, target)
    if not names:
        raise click.ClickException(f"{root} holds no recordings as {dataset} has them: {LAYOUTS[dataset].__doc__}")
    singers = np.unique([name.split("/")[0] for name in names], return_inverse=True)[1]
    write_pair_file(str(target / "speaker_pairs.txt"), draw_pairs(singers, pairs, seed), names)
    click.echo(f"{target}: {len(names)} crops of {singers.max() + 1} singers, {pairs} pairs in speaker_pairs.txt")


if __name__ == "__main__":
    main()
