"""Fits the detector of voices that chooses the crops to separate, and says how well it does on other voices and bands.

    python -m scripts.make_vocal_detector VOICES.csv OTHER.csv [--font OTHER.sf2]

Both are catalogues of isolated voices with a column path. The first 4 s of each are mixed with a made band of its own
(training/recipes/bands.py; for OTHER with the sound font given), 6 dB below the voice, as loud, and 6 dB above. Writes
singerembed/data/vocal_activity.npz. Needs scikit-learn and fluidsynth.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from singerembed.model.mel import MelExtractor
from singerembed.model.spec import ModelSpec
from singerembed.model.vocal_activity import activity_features
from training.recipes import bands

LEVELS = {"alone": None, "+6 dB": 6.0, "0 dB": 0.0, "-6 dB": -6.0}
STRENGTH = 0.03  # of the fit: the inverse of its regularisation
LONGEST = 4.5  # s that are mixed; the first crop of them is taken
FIRST_SEED, OTHER_SEED = 1000, 5000
SPEC = ModelSpec(name="voice", method="voice", normalise=1.0)
TARGET = Path(__file__).parents[1] / "singerembed" / "data" / "vocal_activity.npz"


def features_of(catalog: Path, first_seed: int) -> NDArray[np.float32]:
    """Return the features of each recording's voice, its mixes, and the band alone: [recordings, 5, n_features]."""
    extractor, found = MelExtractor(SPEC), []
    with catalog.open(encoding="utf-8") as file:
        paths = [catalog.parent / row["path"] for row in csv.DictReader(file)]
    for i, path in enumerate(paths):
        pcm, rate = soundfile.read(path, dtype="float32", always_2d=True)
        voice = soxr.resample(pcm.mean(axis=1), rate, SPEC.sample_rate)[: round(LONGEST * SPEC.sample_rate)]
        band = bands.band(len(voice) / SPEC.sample_rate, seed=first_seed + i)
        mixes = [voice if db is None else bands.mixed(voice, band, db).mean(axis=1) for db in LEVELS.values()]
        whole = np.stack([*mixes, 0.9 * band.mean(axis=1) / np.abs(band).max()]).astype(np.float32)
        crops = np.pad(whole, ((0, 0), (0, SPEC.crop_samples)))[:, : SPEC.crop_samples]
        mel = extractor.log_mel(np.ascontiguousarray(crops)).mel
        if len(mel) == len(crops):  # else one of them is silent
            found.append(activity_features(mel))
    return np.stack(found)


def main() -> None:
    """Fit, write, and print the detection rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("voices", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--font", default=bands.SOUND_FONT)
    arguments = parser.parse_args()
    made = features_of(arguments.voices, FIRST_SEED)
    values = made.reshape(-1, made.shape[2])
    is_sung = np.tile([1, 1, 1, 1, 0], len(made))
    scale = StandardScaler().fit(values)
    fitted = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=5000)
    fitted.fit(scale.transform(values), is_sung)
    weights = fitted.coef_[0] / scale.scale_
    bias = float(fitted.intercept_[0] - scale.mean_ @ weights)
    np.savez(TARGET, weights=weights.astype(np.float32), bias=np.float32(bias))
    bands.SOUND_FONT = arguments.font
    score = features_of(arguments.other, OTHER_SEED) @ weights + bias
    alone = score[:, -1]
    print(f"{len(score)} recordings; bands alone: {(alone > 0).mean():.1%} taken for sung")
    for level, of_level in zip(LEVELS, score.T, strict=False):
        area = roc_auc_score(np.repeat([1, 0], len(score)), np.concatenate([of_level, alone]))
        print(f"{level:<6} {(of_level > 0).mean():.1%} found, area under the ROC curve {area:.3f}")


if __name__ == "__main__":
    main()
