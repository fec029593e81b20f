"""Make the bundled engine from the untrained reference weights: python scripts/make_default_engine.py

It stands in until a trained checkpoint is shipped, and says so wherever it shows.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from singerembed.checkpoint import FORMAT, FORMAT_VERSION
from singerembed.engine.build import build_engine
from singerembed.engine.load import bundled_engine_path
from singerembed.spec import ModelSpec

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "golden"))
import weights

with tempfile.TemporaryDirectory() as folder:
    checkpoint = Path(folder) / "untrained-reference"
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in weights.state_dict().items()}
    spec = ModelSpec(name="untrained-reference", method="untrained").to_dict()
    torch.save(
        {"format": FORMAT, "version": FORMAT_VERSION, "spec": spec, "state_dict": tensors, "training": {}}, checkpoint
    )
    build_engine(str(checkpoint), bundled_engine_path(), force=True, say=lambda what, text: print(f"{what:<12}{text}"))
