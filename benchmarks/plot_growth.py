"""Plots the growth curve: python benchmarks/plot_growth.py benchmarks/results/FILE.json docs/growth.svg"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main(results: str, picture: str) -> None:
    """Plot throughput and peak memory over the number of tracks."""
    points = json.loads(Path(results).read_text(encoding="utf-8"))["growth"]["growth"]
    tracks = [point["tracks"] for point in points]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot(tracks, [point["tracks_per_second"] for point in points], marker="o")
    left.set(xscale="log", ylim=0, xlabel="tracks", ylabel="tracks/s, start-up included")
    right.plot(tracks, [point["peak_mb"] for point in points], marker="o", color="tab:red")
    right.set(xscale="log", ylim=0, xlabel="tracks", ylabel="peak resident MB")
    figure.savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
