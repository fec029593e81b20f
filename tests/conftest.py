"""What several test modules need: golden values, the reference checkpoint and its engine, and recordings."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from numpy.typing import NDArray

from singerembed.jobs.options import RunOptions
from singerembed.jobs.run import RunSummary, run
from singerembed.model.mel import available_isas
from singerembed.model.spec import ModelSpec

RATE = 44_100
GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
sys.path.append(str(GOLDEN.parent.parent))  # for `training`; behind the installed package, which is what is tested


def pytest_configure() -> None:
    """Let the commands that tests start end on SIGINT, which a shell has its jobs in the background ignore."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"mel kernels: {', '.join(available_isas())}"


@dataclass(frozen=True)
class Golden:
    """The official pipeline's values, see tests/golden/README.md."""

    names: list[str]
    pcm: NDArray[np.int16]  # [8, 176400]
    mel: NDArray[np.float32]  # [8, 128, 345], power
    embedding: NDArray[np.float32]  # [8, 1000]


@pytest.fixture(scope="session")
def golden() -> Golden:
    values = np.load(GOLDEN / "expected.npz")
    names = [str(name) for name in values["names"]]
    pcm = [soundfile.read(GOLDEN / "crops" / f"{name}.wav", dtype="int16")[0] for name in names]
    return Golden(names, np.stack(pcm), values["mel"], values["embedding"])


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    return ModelSpec(name="reference", method="untrained")


@pytest.fixture(scope="session")
def reference_tensors() -> dict[str, Any]:
    """The reference weights as torch tensors under torchvision's names."""
    import torch
    import weights

    return {name: torch.from_numpy(np.array(value)) for name, value in weights.state_dict().items()}


@pytest.fixture(scope="session")
def release_folder(tmp_path_factory: pytest.TempPathFactory, reference_tensors: dict[str, Any]) -> Path:
    """A folder as the official release has it, holding the reference weights."""
    import torch

    folder = tmp_path_factory.mktemp("official") / "byol"
    folder.mkdir()
    torch.save({f"encoder.net.2.{name}": tensor for name, tensor in reference_tensors.items()}, folder / "model.pt")
    (folder / "hyperparams.yaml").write_bytes((GOLDEN / "hyperparams.yaml").read_bytes())
    return folder


@pytest.fixture(scope="session")
def reference_engine(tmp_path_factory: pytest.TempPathFactory, release_folder: Path) -> str:
    """Path of the engine built from the reference weights."""
    from singerembed.engine.build import build_engine

    path = str(tmp_path_factory.mktemp("engine") / "reference.engine")
    build_engine(str(release_folder), path)
    return path


@pytest.fixture(scope="session")
def separator_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of the separator built from a small checkpoint with made weights: its voices are no voices."""
    from singerembed.engine.build_separator import build_separator

    path = str(tmp_path_factory.mktemp("separator") / "tiny.engine")
    build_separator(str(Path(__file__).parent / "engine" / "data" / "spleeter-tiny" / "model"), path)
    return path


@pytest.fixture(scope="session")
def voice() -> Callable[..., NDArray[np.float32]]:
    """A function that makes a voice-like mono signal, float32, peak 0.5."""

    def make(seconds: float, sample_rate: int = 44_100, f0: float = 220.0) -> NDArray[np.float32]:
        t = np.arange(round(seconds * sample_rate)) / sample_rate
        phase = 2 * np.pi * f0 * t + 0.3 * np.sin(2 * np.pi * 5.5 * t)
        tone = sum(np.sin(k * phase) / k for k in range(1, 12)) * (1.2 + np.sin(2 * np.pi * 0.7 * t))
        return (0.5 * tone / max(1e-9, np.abs(tone).max())).astype(np.float32) if len(t) else np.empty(0, np.float32)

    return make


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue over the golden crops and every defect named in the issue of a bad night."""
    folder = tmp_path_factory.mktemp("library")
    shutil.copytree(GOLDEN / "crops", folder / "crops")
    rng = np.random.default_rng(0)
    noise = (0.1 * rng.standard_normal((RATE * 9, 6))).astype(np.float32)
    soundfile.write(folder / "zero.wav", np.zeros(9 * RATE), RATE)
    soundfile.write(folder / "short.wav", noise[:441, 0], RATE)
    soundfile.write(folder / "8bit.wav", noise[:, 0], RATE, subtype="PCM_U8")
    soundfile.write(folder / "24bit.wav", noise[:, 0], RATE, subtype="PCM_24")
    soundfile.write(folder / "float.wav", noise[:, 0], RATE, subtype="FLOAT")
    soundfile.write(folder / "six.wav", noise, RATE)
    soundfile.write(folder / "8k.wav", noise[: 8_000 * 9, 0], 8_000)
    soundfile.write(folder / "192k.flac", noise[:, 0], 192_000, subtype="PCM_24")
    nan = noise[:, :1].copy()
    nan[5 * RATE] = np.nan
    soundfile.write(folder / "nan.wav", nan, RATE, subtype="FLOAT")
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("not audio at all\n" * 100, encoding="utf-8")
    (folder / "folder.wav").mkdir()
    soundfile.write(folder / "half.wav", noise[:, 0], RATE)
    content = (folder / "half.wav").read_bytes()
    (folder / "half.wav").write_bytes(content[: len(content) // 2])
    names = sorted(p.name for p in (folder / "crops").iterdir())
    rows = [f"{name},crops/{name},,,golden" for name in names]
    rows += [f"{name},{name},,,made" for name in sorted(p.name for p in folder.iterdir() if p.name != "crops")]
    rows += [
        "missing,missing.wav,,,made",
        "part,float.wav,1,8.5,made",
        "late,float.wav,100,,made",
        "bad,float.wav,x,,made",
    ]
    (folder / "catalog.csv").write_text("track_id,path,start,end,kind\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def finished(library: Path, reference_engine: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunSummary]:
    output = tmp_path_factory.mktemp("out") / "out.parquet"
    summary = run(str(library / "catalog.csv"), str(output), engine=reference_engine)
    return output, summary


def embed_lines(library: Path, engine: str, output: Path, lines: list[str], **options: Any) -> pa.Table:
    """Run over catalogue lines `track_id,path,start,end`, where @ stands for the library's folder; return the rows."""
    catalog = output.with_suffix(".csv")
    text = "track_id,path,start,end\n" + "".join(f"{line}\n" for line in lines)
    catalog.write_text(text.replace("@", f"{library}/"), encoding="utf-8")
    run(str(catalog), str(output), engine=engine, options=RunOptions(**options))
    return pq.read_table(output)
