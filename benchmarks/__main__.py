"""Benchmarks of mel, encoder, decoding and the whole job against other implementations: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.job import job
from benchmarks.material import crops, machine, make_library, sgemm
from benchmarks.measure import compare, print_table
from benchmarks.rivals import encoder_rivals, mel_rivals
from singerembed.audio.limits import TimeLimit
from singerembed.audio.recording import open_recording
from singerembed.engine.build import export_onnx
from singerembed.engine.file import EngineFile, read_engine_file
from singerembed.engine.load import bundled_engine_path
from singerembed.engine.machine import available_cores
from singerembed.engine.native import NativeEngine
from singerembed.engine.onnxruntime import OnnxRuntimeEngine
from singerembed.model.checkpoint import load_checkpoint
from singerembed.model.mel import MelExtractor, available_isas

ENCODER_FLOP = 2 * 0.3456e9  # per crop: 0.3456 G multiply-adds, counted by layer
GROWTH_TRACKS = (10, 100, 1_000, 10_000, 100_000)


def main() -> None:
    """Run the benchmarks, print tables, and write the results as JSON with --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--checkpoint", help="Checkpoint to run; untrained weights give the same speed.  [default: made]"
    )
    parser.add_argument(
        "--only", choices=["mel", "encoder", "decode", "job", "growth"], action="append", help="May be repeated."
    )
    parser.add_argument("--quick", action="store_true", help="Short rounds: results within about 10 %%.")
    parser.add_argument("--json", metavar="FILE", help="Write the figures to FILE.")
    arguments = parser.parse_args()
    seconds, rounds = (0.5, 3) if arguments.quick else (2.0, 7)
    wanted = arguments.only or ["mel", "encoder", "decode", "job", "growth"]
    results: dict[str, Any] = {"command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])}
    results |= {"machine": machine(), "instruction_sets": available_isas()}
    print(json.dumps(results["machine"], indent=1), file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or _untrained_checkpoint(Path(folder))
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "mel": lambda: mel(seconds, rounds),
            "encoder": lambda: encoder(checkpoint, seconds, rounds),
            "decode": lambda: decode(Path(folder), seconds, rounds),
            "job": lambda: job(Path(folder), checkpoint, rounds),
            "growth": lambda: growth(Path(folder), arguments.quick),
        }
        for name in wanted:
            results[name] = sections[name]()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1, default=vars) + "\n", encoding="utf-8")


def _untrained_checkpoint(folder: Path) -> str:
    from torchvision.models import efficientnet_b0

    torch.manual_seed(0)
    path = folder / "untrained" / "model.pt"
    path.parent.mkdir()
    torch.save({f"encoder.net.2.{k}": v for k, v in efficientnet_b0(num_classes=1000).state_dict().items()}, path)
    return str(path)


def mel(seconds: float, rounds: int) -> dict[str, Any]:
    """Measure power mel spectrograms on one core."""
    torch.set_num_threads(1)
    spec = read_engine_file(bundled_engine_path()).spec
    pcm = crops(4, spec.crop_samples)
    one = (pcm[0] / 32768).astype(np.float32)
    rivals: dict[str, tuple[Callable[[], int], int]] = {}
    for isa in available_isas():
        extractor = MelExtractor(spec, isa=isa)
        rivals[f"singerembed, {isa}, int16 to normalised log-mel"] = (lambda e=extractor: len(e.log_mel(pcm).mel), 1)
    rivals |= {name: (work, 1) for name, work in mel_rivals(spec, one).items()}
    rates = compare(rivals, seconds, rounds)
    print_table("Mel, one core", rates, f"singerembed, {available_isas()[-1]}, int16 to normalised log-mel", "crops/s")
    return rates


def encoder(checkpoint_path: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Measure the encoder alone on all cores, also as a share of the sgemm limit of the machine."""
    cores = available_cores()
    torch.set_num_threads(cores)
    checkpoint = load_checkpoint(checkpoint_path)
    model = export_onnx(checkpoint)
    pcm = crops(8, checkpoint.spec.crop_samples)
    log_mel = MelExtractor(checkpoint.spec).log_mel(pcm).mel
    file = EngineFile(checkpoint.spec, "native", model, {}, {})
    rivals: dict[str, tuple[Callable[[], int], int]] = {}
    for isa in reversed(available_isas()):
        compiled = NativeEngine(file, isa=isa).encoder
        rivals[f"native, {isa}"] = (lambda e=compiled: len(e.encode(log_mel[:4])), cores)
    int8 = NativeEngine(replace(file, spec=replace(file.spec, precision="int8"))).encoder
    rivals[f"native, int8, {int8.isa}"] = (lambda: len(int8.encode(log_mel[:4])), cores)
    session = OnnxRuntimeEngine(file)._session

    def work() -> int:
        session.run(None, {"log_mel": log_mel[:1]})
        return 1

    ours = f"native, {available_isas()[-1]}"
    rivals["ONNX Runtime, one shared session, a thread a core"] = (work, cores)
    rivals |= {name: (rival, 1) for name, rival in encoder_rivals(model, checkpoint, log_mel, cores).items()}
    rates = compare(rivals, seconds, rounds)
    print_table(f"Encoder, {cores} cores", rates, ours, "crops/s")
    flops, architecture = sgemm(cores)
    shares = {name: rate.median * ENCODER_FLOP / flops for name, rate in rates.items()}
    print(f"\nsgemm ({architecture}) does {flops / 1e9:.0f} GFLOP/s, which is {flops / ENCODER_FLOP:.0f} crops/s.")
    print("Shares: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    return {"rates": rates, "sgemm_flops": flops, "sgemm_kernel": architecture, "shares_of_sgemm": shares}


def decode(folder: Path, seconds: float, rounds: int) -> dict[str, Any]:
    """Measure decoding of stereo recordings to mono crops, on one core."""
    (folder / "decode").mkdir()
    catalog = make_library(folder / "decode", 1, 60)
    rivals: dict[str, tuple[Callable[[], int], int]] = {}
    for path in sorted(catalog.parent.glob("0.*")):
        rivals[path.suffix[1:]] = (lambda p=str(path): _decode_all(p), 1)
    rates = compare(rivals, seconds, rounds)
    print("\n## Decoding, stereo to mono, one core\n\n| codec | crops/s | ms a crop |\n| --- | --- | --- |")
    for name, rate in rates.items():
        print(f"| {name} | {rate.text()} | {1000 / rate.median:.2f} |")
    return rates


def _decode_all(path: str) -> int:
    with open_recording(path, 44_100, TimeLimit(600)) as reader:
        samples = 0
        while n := len(reader.read(4 * 176_400)):
            samples += n
    return samples // 176_400


def growth(folder: Path, quick: bool) -> dict[str, Any]:
    """Measure throughput and memory for few to many tracks, and the start of a run over ten million rows."""
    counts = GROWTH_TRACKS[:3] if quick else GROWTH_TRACKS
    print(
        "\n## Growth: short recordings, an engine that returns at once\n\n"
        "| tracks | tracks/s | peak MB |\n| --- | --- | --- |"
    )
    found = []
    for n in counts:
        figures = _growth_point(folder, str(n))
        found.append(figures)
        print(f"| {n:,} | {figures['tracks_per_second']:,.0f} | {figures['peak_mb']:.0f} |")
    rows = 1_000_000 if quick else 10_000_000
    first = _growth_point(folder, str(rows), "--start-only")
    print(f"\nOver a catalogue of {rows:,} rows the first crop is embedded after {first['first_crop_seconds']:.1f} s.")
    return {"growth": found, "start": first}


def _growth_point(folder: Path, *arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.growth", *arguments]
    environment = {**os.environ, "TMPDIR": str(folder)}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    figures: dict[str, float] = json.loads(result.stdout)
    return figures


if __name__ == "__main__":
    main()
