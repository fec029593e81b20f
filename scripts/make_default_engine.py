"""Builds the bundled engine from the trained checkpoint: python scripts/make_default_engine.py

The weights of checkpoint and engine are stored in FP16, which halves the download; arithmetic is in FP32.
"""

from dataclasses import replace
from pathlib import Path

from singerembed.engine.build import TOLERANCES, BuildOptions, build_engine, compare, verification_crops
from singerembed.engine.load import bundled_engine_path, open_engine
from singerembed.engine.precision import store_halved
from singerembed.engine.torch import TorchEngine
from singerembed.errors import EngineError
from singerembed.model.checkpoint import load_checkpoint
from singerembed.storage import publishing

CHECKPOINT = Path(__file__).parent.parent / "training" / "recipes" / "free_voices.pt"

target = bundled_engine_path()
options = BuildOptions("native")  # ONNX Runtime where there are no kernels for the processor
with publishing(target) as temporary:
    engine = build_engine(str(CHECKPOINT), temporary, options, say=lambda what, text: print(f"{what:<12}{text}"))
    engine = replace(engine, payload=store_halved(engine.payload), build=engine.build | {"stored": "weights in FP16"})
    crops = verification_crops(engine.spec)
    reached = compare(
        open_engine(engine).embed(crops).embedding,
        TorchEngine(load_checkpoint(str(CHECKPOINT))).embed(crops).embedding,
    )
    allowed = TOLERANCES["fp16"]
    if reached.cosine < allowed.cosine or reached.difference > allowed.difference:
        raise EngineError(f"weights in FP16 take the engine too far from the checkpoint: {reached}")
    figures = {"cosine": reached.cosine, "difference": reached.difference}
    replace(engine, verification=engine.verification | figures).write(temporary)
print(f"{'stored':<12}{target} ({Path(target).stat().st_size / 1e6:.1f} MB), {reached}")
