"""Fits the detector of voices that chooses the crops to separate, and says how well it does on other voices and bands.

    python scripts/make_vocal_detector.py VOICES.csv OTHER.csv [--font OTHER.sf2]

Both are catalogues of isolated voices with a column path. The first 4 s of each are mixed with a made band of its own
(training/recipes/bands.py; for OTHER with the sound font given), 6 dB below the voice, as loud, and 6 dB above. Writes
singerembed/data/vocal_activity.npz. Needs scikit-learn and fluidsynth.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from linear_detector import fit
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from singerembed.model.mel import MelExtractor
from singerembed.model.spec import ModelSpec
from singerembed.model.vocal_activity import activity_features

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.command import errors_on_one_line
from benchmarks.voices import read_voices
from training.recipes import bands

LEVELS = {"alone": None, "+6 dB": 6.0, "0 dB": 0.0, "-6 dB": -6.0}
STRENGTH = 0.03  # of the fit: the inverse of its regularisation
LONGEST = 4.5  # s that are mixed; the first crop of them is taken
FIRST_SEED, OTHER_SEED = 1000, 5000
SPEC = ModelSpec(name="voice", method="voice", normalise=1.0)
TARGET = Path(__file__).parents[1] / "singerembed" / "data" / "vocal_activity.npz"


def features_of(catalog: str, first_seed: int) -> NDArray[np.float32]:
    """Return the features of each recording's voice, its mixes, and the band alone: [recordings, 5, n_features]."""
    extractor, found = MelExtractor(SPEC), []
    for i, recording in enumerate(read_voices(catalog)):
        voice = recording.samples()[: round(LONGEST * SPEC.sample_rate)]
        band = bands.band(len(voice) / SPEC.sample_rate, seed=first_seed + i)
        mixes = [voice if db is None else bands.mixed(voice, band, db).mean(axis=1) for db in LEVELS.values()]
        whole = np.stack([*mixes, 0.9 * band.mean(axis=1) / np.abs(band).max()]).astype(np.float32)
        crops = np.pad(whole, ((0, 0), (0, SPEC.crop_samples)))[:, : SPEC.crop_samples]
        mel = extractor.log_mel(np.ascontiguousarray(crops)).mel
        if len(mel) == len(crops):  # else one of them is silent
            found.append(activity_features(mel))
    return np.stack(found)


@errors_on_one_line()
def main() -> None:
    """Fit, print the detection rates, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("voices")
    parser.add_argument("other")
    parser.add_argument("--font", default=bands.SOUND_FONT)
    arguments = parser.parse_args()
    made = features_of(arguments.voices, FIRST_SEED)
    detector = fit(made.reshape(-1, made.shape[2]), np.tile([1, 1, 1, 1, 0], len(made)), STRENGTH)
    weights, bias = detector
    bands.SOUND_FONT = arguments.font
    score = features_of(arguments.other, OTHER_SEED) @ weights + bias
    alone = score[:, -1]
    print(f"{len(score)} recordings; bands alone: {(alone > 0).mean():.1%} taken for sung")
    for level, of_level in zip(LEVELS, score.T, strict=False):
        area = roc_auc_score(np.repeat([1, 0], len(score)), np.concatenate([of_level, alone]))
        print(f"{level:<6} {(of_level > 0).mean():.1%} found, area under the ROC curve {area:.3f}")
    detector.write(TARGET)


if __name__ == "__main__":
    main()
