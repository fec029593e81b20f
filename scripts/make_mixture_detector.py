"""Fits the detector of accompaniment that warns at the end of a run, and says what it finds on other voices.

    python -m benchmarks.mixes VOICES.csv spleeter.engine --folder made      # for each: voices mixed with made bands
    python scripts/make_mixture_detector.py made other                       # fitted on the first, tried on the second

Writes singerembed/data/mixture.npz. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import soundfile
from linear_detector import fit
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from singerembed.model.mel import LOUD, MelExtractor, mix_down
from singerembed.model.mixture import mixture_features
from singerembed.model.spec import ModelSpec

CLEAN, MIXED, OTHERS = "clean", ("+6dB", "0dB", "-6dB"), ("bandalone",)
CROPS = 3  # of a recording
STRENGTH = 0.05  # of the fit: the inverse of its regularisation
SPEC = ModelSpec(name="mixture", method="mixture", normalise=1.0)
TARGET = Path(__file__).parents[1] / "singerembed" / "data" / "mixture.npz"


def features_of(folder: Path) -> NDArray[np.float32]:
    """Return the features of the first loud crops of all recordings in `folder`."""
    extractor, found = MelExtractor(SPEC), []
    for path in sorted(folder.glob("*.flac")):
        pcm, _ = soundfile.read(path, dtype="float32", always_2d=True)
        mono, _ = mix_down(pcm, SPEC.sample_rate)
        size = SPEC.crop_samples
        whole = np.pad(mono, (0, max(0, size - len(mono))))
        crops = whole[: len(whole) // size * size].reshape(-1, size)[:CROPS]
        mel = extractor.log_mel(np.ascontiguousarray(crops))
        if (mel.state == LOUD).any():
            found.append(mixture_features(mel.mel))
    if not found:
        raise SystemExit(f"Error: {folder} holds no FLAC files with sound. benchmarks/mixes.py makes such folders")
    return np.concatenate(found)


def main() -> None:
    """Fit, print the detection rates, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("made", type=Path)
    parser.add_argument("other", type=Path)
    arguments = parser.parse_args()
    made, other = arguments.made, arguments.other
    clean, mixed = features_of(made / CLEAN), np.concatenate([features_of(made / level) for level in MIXED])
    detector = fit(np.concatenate([clean, mixed]), np.repeat([0, 1], [len(clean), len(mixed)]), STRENGTH)
    weights, bias = detector
    of_clean = features_of(other / CLEAN) @ weights + bias
    print(f"clean voices: {len(of_clean)} crops, {(of_clean > 0).mean():.1%} called mixed")
    for level in (*MIXED, *OTHERS):
        of_mixed = features_of(other / level) @ weights + bias
        labels = np.repeat([0, 1], [len(of_clean), len(of_mixed)])
        area = roc_auc_score(labels, np.concatenate([of_clean, of_mixed]))
        print(f"{level}: {len(of_mixed)} crops, {(of_mixed > 0).mean():.1%} found, area under the ROC curve {area:.3f}")
    detector.write(TARGET)


if __name__ == "__main__":
    main()
