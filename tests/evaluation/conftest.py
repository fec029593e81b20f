"""A small labelled corpus: five singers whose spectra differ, three recordings of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

RATE = 16_000


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `<singer>/<n>.wav` of 8 s, and `catalog.csv` with the columns `singer` and `technique`."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows = ["path,singer,technique"]
    seconds = np.arange(8 * RATE) / RATE
    for singer in range(5):
        (folder / f"s{singer}").mkdir()
        tilt = np.linspace(0.5, 2.5, 5)[singer]
        for take in range(3):
            phase = 2 * np.pi * rng.uniform(120, 300) * seconds + 2 * np.sin(2 * np.pi * 5 * seconds)
            tone = sum(np.sin(k * phase) / k**tilt for k in range(1, 15)) + 0.01 * rng.standard_normal(len(seconds))
            soundfile.write(folder / f"s{singer}" / f"{take}.wav", 0.5 * tone / np.abs(tone).max(), RATE)
            rows.append(f"s{singer}/{take}.wav,s{singer},{'straight' if take % 2 else 'vibrato'}")
    (folder / "catalog.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
