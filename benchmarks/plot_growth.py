"""Plots the growth curve: python -m benchmarks.plot_growth benchmarks/results/FILE.json docs/growth.svg"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    """Plot throughput and peak memory over the number of tracks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="Written by `python -m benchmarks --json`.")
    parser.add_argument("picture")
    arguments = parser.parse_args()
    points = json.loads(arguments.results.read_text(encoding="utf-8"))["growth"]["growth"]
    tracks = [point["tracks"] for point in points]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot(tracks, [point["tracks_per_second"] for point in points], marker="o")
    left.set(xscale="log", ylim=0, xlabel="tracks", ylabel="tracks/s, start-up included")
    right.plot(tracks, [point["peak_mb"] for point in points], marker="o", color="tab:red")
    right.set(xscale="log", ylim=0, xlabel="tracks", ylabel="peak resident MB")
    figure.savefig(arguments.picture)


if __name__ == "__main__":
    main()
