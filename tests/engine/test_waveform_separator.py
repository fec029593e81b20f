"""Separators of other makes: ONNX models from samples to samples, made here, built, refused, and run."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import soundfile
from click.testing import CliRunner
from conftest import embed_lines
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from singerembed.cli.main import cli
from singerembed.engine import load
from singerembed.engine.build_separator import made_mixture
from singerembed.engine.build_waveform_separator import build_waveform_separator
from singerembed.engine.file import SeparatorFile, read_separator_file
from singerembed.engine.separation import Separation
from singerembed.engine.separator import Separator
from singerembed.errors import CheckpointError, EngineError, OutputError, SingerEmbedError, UsageError
from singerembed.jobs.describe import describe
from singerembed.jobs.stems import separate_catalog
from singerembed.model.mel import mix_down
from singerembed.model.separator_spec import SeparatorSpec, WaveformSpec
from singerembed.model.spec import ModelSpec

RATE = 44_100
CROP = 4 * RATE
SEGMENT = 6 * RATE
ALL = -199.0  # dB: every voice counts
KERNEL = np.hanning(41).astype(np.float32) / 20  # a low pass of 20 samples on either side

Node = onnx.NodeProto
Voice = Callable[..., NDArray[np.float32]]


def model(
    path: Path,
    nodes: list[Node],
    taken: list[Any],
    given: dict[str, list[Any]],
    constants: dict[str, NDArray[Any]] | None = None,
    kind: int = TensorProto.FLOAT,
) -> str:
    """Write a model with the input "mix", of shape `taken`, and the outputs `given`."""
    graph = helper.make_graph(
        nodes,
        "separator",
        [helper.make_tensor_value_info("mix", kind, taken)],
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in given.items()],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, path)
    return str(path)


def stems_model(path: Path, length: int | str = SEGMENT, channels: int | str = 2, batch: int | str = 1) -> str:
    """Write a model of two stems: each channel low-passed, and what that leaves."""
    nodes = [
        helper.make_node("Transpose", ["mix"], ["channels"], perm=[1, 0, 2]),
        helper.make_node("Conv", ["channels", "kernel"], ["filtered"], pads=[20, 20]),
        helper.make_node("Transpose", ["filtered"], ["low"], perm=[1, 0, 2]),
        helper.make_node("Sub", ["mix", "low"], ["high"]),
        helper.make_node("Unsqueeze", ["low", "one"], ["low_stem"]),
        helper.make_node("Unsqueeze", ["high", "one"], ["high_stem"]),
        helper.make_node("Concat", ["high_stem", "low_stem"], ["stems"], axis=1),
    ]
    constants = {"kernel": KERNEL.reshape(1, 1, -1), "one": np.array([1])}
    return model(path, nodes, [batch, channels, length], {"stems": [batch, 2, channels, length]}, constants)


def spec_file(folder: Path, text: str) -> str:
    (folder / "spec.toml").write_text(text, encoding="utf-8")
    return str(folder / "spec.toml")


def built(folder: Path, path: str, text: str) -> SeparatorFile:
    output = str(folder / "s.engine")
    build_waveform_separator(path, spec_file(folder, text), output, force=True)
    return read_separator_file(output)


@pytest.fixture(scope="module")
def separator_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Separator]:
    folder = tmp_path_factory.mktemp("waveform")
    file = built(folder, stems_model(folder / "low.onnx"), "sample_rate = 44100\nstem = 1\n")
    return str(folder / "s.engine"), Separator(file)


def test_the_voice_is_the_stem_that_was_named(separator_file: tuple[str, Separator]) -> None:
    path, separator = separator_file
    assert separator.spec == SeparatorSpec.from_dict(separator.spec.to_dict())
    mixture = made_mixture(SEGMENT, RATE)
    expected = np.stack([np.convolve(channel, KERNEL, mode="same") for channel in mixture.T], axis=1)
    found = separator.vocals(mixture)
    assert found.shape == mixture.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)
    facts = describe(path)
    assert (facts["kind"], facts["spec"]["name"]) == ("separator", "low")
    assert facts["verification"]["difference_db"] < -100  # the filter is shorter than the context


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ({"length": "n"}, "segment_seconds = 6.0"),
        ({"length": "n", "channels": "c"}, "segment_seconds = 6\nchannels = 2"),
        ({"batch": "b", "channels": "c"}, "channels = 2"),
        ({}, "segment_seconds = 6.0\nchannels = 2\noutput = 'stems'\nname = 'mine'\ncontext_seconds = 0.5"),
    ],
)
def test_what_a_model_leaves_open_is_given(tmp_path: Path, shape: dict[str, Any], text: str) -> None:
    spec = built(tmp_path, stems_model(tmp_path / "m.onnx", **shape), f"sample_rate = 44100\nstem = 1\n{text}").spec
    assert isinstance(spec, WaveformSpec)
    assert (spec.channels, spec.segment, spec.stem, spec.batch_axis) == (2, SEGMENT, 1, True)
    assert (spec.name, spec.context) == (("mine", RATE // 2) if "mine" in text else ("m", RATE))


def test_what_it_does_to_a_recording_is_in_its_hash(tmp_path: Path) -> None:
    path = stems_model(tmp_path / "m.onnx")
    texts = ["stem = 1", "stem = 1", "stem = 0"]
    hashes = [built(tmp_path, path, f"sample_rate = 44100\n{text}").sha256 for text in texts]
    assert len(set(hashes)) == 2
    assert hashes[0] == hashes[1]


IDENTITY = [helper.make_node("Identity", ["mix"], ["out"])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample_rate = \nstem = 1", r"spec.toml is not TOML: .*line 1"),
        ("", "no sample_rate; it needs sample_rate = 44100"),
        ("sample_rate = 48000", "is 48000, and encoders hear 44100 Hz. Voices are not resampled"),
        ("sample_rate = 44100.0", "sample_rate is 44100.0, and must be a whole number of Hz"),
        ("sample_rate = true", "sample_rate is True"),
        ("sample_rate = 44100\nsegment = 3", "has segment, which means nothing here; known are sample_rate, channels"),
        ("sample_rate = 44100\nstem = -1", "stem is -1, and must be a whole number, counted from 0"),
        ("sample_rate = 44100\nchannels = 6", "channels is 6, and must be 1 or 2"),
        ("sample_rate = 44100\ncontext_seconds = nan", "context_seconds is nan"),
        ("sample_rate = 44100\ncontext_seconds = 2", "takes 6 s at a time, and crops of 4 s with 2 s on either side"),
        ("sample_rate = 44100\nchannels = 1", "channels means 1 channels, and .* takes 2. Leave it out"),
        ("sample_rate = 44100\nsegment_seconds = 8", "means 352800 samples, and .* takes 264600. Leave it out"),
        ("sample_rate = 44100\noutput = 'x'", "has no output 'x'; it has stems"),
        ("sample_rate = 44100", r"stems is \[1, 2, 2, 264600\]: say which of the 2 is the voice with stem = N"),
        ("sample_rate = 44100\nstem = 2", "there is no stem 2, counted from 0"),
    ],
)
def test_a_spec_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        built(tmp_path, stems_model(tmp_path / "m.onnx"), text)
    assert not (tmp_path / "s.engine").exists()


def _with_two_outputs(path: Path) -> str:
    nodes = [helper.make_node("Identity", ["mix"], [name]) for name in ("vocals", "band")]
    return model(path, nodes, [1, 2, SEGMENT], {name: [1, 2, SEGMENT] for name in ("vocals", "band")})


def _dividing_by_level(path: Path) -> str:
    nodes = [
        helper.make_node("ReduceMax", ["mix"], ["peak"], keepdims=1),
        helper.make_node("Div", ["mix", "peak"], ["out"]),
    ]
    return model(path, nodes, [1, 2, SEGMENT], {"out": [1, 2, SEGMENT]})


def _with_noise(path: Path) -> str:
    nodes = [
        helper.make_node("RandomNormalLike", ["mix"], ["noise"]),
        helper.make_node("Add", ["mix", "noise"], ["out"]),
    ]
    return model(path, nodes, [1, 2, SEGMENT], {"out": [1, 2, SEGMENT]})


def _cutting(path: Path) -> str:
    nodes = [helper.make_node("Slice", ["mix", "from", "to", "axis"], ["out"])]
    constants = {"from": np.array([0]), "to": np.array([-7]), "axis": np.array([2])}
    return model(path, nodes, [1, 2, "n"], {"out": [1, 2, "m"]}, constants)


def _of_shape(*taken: int | str, kind: int = TensorProto.FLOAT) -> Callable[[Path], str]:
    return lambda path: model(path, IDENTITY, list(taken), {"out": list(taken)}, kind=kind)


def _of_bytes(content: bytes) -> Callable[[Path], str]:
    def write(path: Path) -> str:
        path.write_bytes(content)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("make", "text", "kind", "message"),
    [
        (_with_two_outputs, "", UsageError, r'has the outputs vocals, band: give output = "..." in .*spec.toml'),
        (_dividing_by_level, "", EngineError, "gives NaN or infinity for silence"),
        (_with_noise, "", EngineError, "gives another voice each time"),
        (_cutting, "segment_seconds = 6", CheckpointError, r"is \[1, 2, 264593\], and must be \[1, 2, 264600\]"),
        (_of_shape(1, 2, "n"), "", UsageError, "takes any number of samples: give segment_seconds in"),
        (_of_shape(1, "c", SEGMENT), "", UsageError, "takes any number of channels: give channels in"),
        (_of_shape(4, 2, SEGMENT), "", CheckpointError, "takes batches of 4"),
        (_of_shape(1, 2, SEGMENT), "stem = 0", CheckpointError, r"with stem = N must be \[1, stems, 2, 264600\]"),
        (_of_shape(1, 2, 2, 1024), "", CheckpointError, r"is \[1, 2, 2, 1024\], and must be .*made inside the model"),
        (_of_shape(SEGMENT), "", CheckpointError, r"is \[264600\], and must be"),
        (_of_shape(1, 6, SEGMENT), "", CheckpointError, "takes 6 channels"),
        (_of_shape(1, 2, 5 * RATE), "", UsageError, "takes 5 s at a time, and crops of 4 s with 1 s on either side"),
        (_of_shape(1, 2, "n"), "segment_seconds = 61", CheckpointError, "takes 61 s at a time, and 60 s at most"),
        (_of_shape(1, 2, SEGMENT, kind=TensorProto.FLOAT16), "", CheckpointError, r"tensor\(float16\). Export it with"),
        (_of_bytes(b"no model"), "", CheckpointError, "is not an ONNX model that can be read"),
        (_of_bytes(b""), "", CheckpointError, "m.onnx is empty"),
        (str, "", CheckpointError, "cannot read .*m.onnx: No such file"),
    ],
)
def test_a_model_that_is_no_separator_is_refused(
    tmp_path: Path, make: Callable[[Path], str], text: str, kind: type[SingerEmbedError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        built(tmp_path, make(tmp_path / "m.onnx"), f"sample_rate = 44100\n{text}")
    assert not (tmp_path / "s.engine").exists()


def test_weights_in_another_file_are_taken_along(tmp_path: Path) -> None:
    path = stems_model(tmp_path / "m.onnx")
    whole = built(tmp_path, path, "sample_rate = 44100\nstem = 1")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=0)
    assert (tmp_path / "m.data").exists()
    apart = built(tmp_path, path, "sample_rate = 44100\nstem = 1")
    mixture = made_mixture(SEGMENT, RATE)
    np.testing.assert_array_equal(Separator(apart).vocals(mixture), Separator(whole).vocals(mixture))
    (tmp_path / "m.data").unlink()
    with pytest.raises(CheckpointError, match=r"m\.data"):
        built(tmp_path, path, "sample_rate = 44100\nstem = 1")


def test_a_network_of_torch_becomes_one(tmp_path: Path) -> None:
    """A network with the parts of Conv-TasNet: strided encoder, dilated mask, decoder. Its weights are drawn."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Net(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Conv1d(2, 16, 20, stride=10, padding=5, bias=False)
            self.mask = nn.Sequential(
                nn.GroupNorm(1, 16), nn.Conv1d(16, 32, 3, padding=4, dilation=4), nn.PReLU(), nn.Conv1d(32, 32, 1)
            )
            self.decode = nn.ConvTranspose1d(16, 2, 20, stride=10, padding=5, bias=False)

        def forward(self, mix: Any) -> Any:
            encoded = self.encode(mix)
            masks = torch.sigmoid(self.mask(encoded)).chunk(2, dim=1)
            return torch.stack([self.decode(encoded * mask) for mask in masks], dim=1)

    torch.manual_seed(1)
    net = Net().eval()
    path = str(tmp_path / "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns that it is deprecated
        torch.onnx.export(net, (torch.zeros(1, 2, SEGMENT),), path, input_names=["mix"], opset_version=18, dynamo=False)
    separator = Separator(built(tmp_path, path, "sample_rate = 44100\nstem = 0"))
    mixture = made_mixture(SEGMENT, RATE)
    with torch.inference_mode():
        expected = net(torch.from_numpy(np.ascontiguousarray(mixture.T))[None])[0, 0].numpy().T
    np.testing.assert_allclose(separator.vocals(mixture), expected, atol=1e-5)


# --- in a run and for stems -----------------------------------------------------------------------------------------


@pytest.fixture
def mix(tmp_path: Path, voice: Voice) -> tuple[Path, NDArray[np.float32]]:
    """A stereo recording of 20 s, as 16 bits."""
    left = voice(20, f0=180) + 0.3 * voice(20, f0=2311)
    pcm = np.stack([left, np.roll(left, 300) * 0.7], axis=1)
    soundfile.write(tmp_path / "mix.wav", pcm / 1.5, RATE)
    read, _ = soundfile.read(tmp_path / "mix.wav", dtype="float32")
    return tmp_path, read


def test_a_run_separates_with_it(
    mix: tuple[Path, NDArray[np.float32]], reference_engine: str, separator_file: tuple[str, Separator]
) -> None:
    folder, pcm = mix
    path, separator = separator_file
    lines = ["a,@mix.wav,,", "b,@mix.wav,4,"]
    options: dict[str, Any] = {"separate": path, "min_vocals_db": ALL}
    one, two = (
        embed_lines(folder, reference_engine, folder / f"{n}.parquet", lines, workers=n, **options) for n in (1, 2)
    )
    assert one.equals(two)
    padded = np.pad(pcm, ((RATE, RATE), (0, 0)))
    engine = load.load_engine(reference_engine)
    assert one["crop"].to_pylist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    for i in range(5):
        vocals = separator.vocals(padded[i * CROP : i * CROP + SEGMENT])[RATE:-RATE]
        mono = mix_down(np.ascontiguousarray(vocals), RATE // 10)[0]
        np.testing.assert_array_equal(
            np.array(one["embedding"][i].as_py(), np.float32), engine.embed(mono[np.newaxis]).embedding[0]
        )
        ratio = 10 * np.log10((vocals.astype(float) ** 2).sum() / (pcm[i * CROP :][:CROP].astype(float) ** 2).sum())
        assert one["vocal_ratio"][i].as_py() == pytest.approx(ratio, abs=1e-4)


def test_stems_of_it_have_no_seams(
    mix: tuple[Path, NDArray[np.float32]], separator_file: tuple[str, Separator]
) -> None:
    folder, pcm = mix
    (folder / "c.csv").write_text("path\nmix.wav\n", encoding="utf-8")
    separate_catalog(str(folder / "c.csv"), str(folder / "stems"), separator_file[0])
    with (folder / "stems" / "catalog.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    stem, _ = soundfile.read(folder / "stems" / row["vocals"], dtype="float32")
    expected = np.stack([np.convolve(channel, KERNEL, mode="same") for channel in pcm.T], axis=1)
    np.testing.assert_allclose(stem, expected, atol=2**-14)


def test_a_separator_of_one_channel_hears_the_mono_mix(
    mix: tuple[Path, NDArray[np.float32]], reference_engine: str, voice: Voice
) -> None:
    folder, pcm = mix
    half = model(
        folder / "m.onnx", [helper.make_node("Mul", ["mix", "half"], ["out"])], [1, "n"], {"out": [1, "n"]},
        {"half": np.array([0.5], np.float32)},
    )  # fmt: skip
    built(folder, half, "sample_rate = 44100\nsegment_seconds = 6")
    path = str(folder / "s.engine")
    soundfile.write(folder / "mono.wav", voice(12, f0=180), RATE)  # read as int16
    rows = embed_lines(
        folder,
        reference_engine,
        folder / "o.parquet",
        ["a,@mix.wav,,", "b,@mono.wav,,"],
        separate=path,
        min_vocals_db=ALL,
    )
    plain = embed_lines(folder, reference_engine, folder / "p.parquet", ["a,@mix.wav,,", "b,@mono.wav,,"])
    assert rows["status"].to_pylist() == ["ok"] * 8
    np.testing.assert_allclose(rows["vocal_ratio"].to_pylist(), 20 * np.log10(0.5), atol=1e-4)
    np.testing.assert_allclose(rows["peak_dbfs"].to_pylist(), plain["peak_dbfs"].to_pylist(), atol=1e-4)
    (folder / "c.csv").write_text("path\nmono.wav\nmix.wav\n", encoding="utf-8")
    separate_catalog(str(folder / "c.csv"), str(folder / "stems"), path)
    with (folder / "stems" / "catalog.csv").open(encoding="utf-8") as file:
        mono, mixed = (soundfile.read(folder / "stems" / row["vocals"])[0] for row in csv.DictReader(file))
    np.testing.assert_allclose(mono, voice(12, f0=180) / 2, atol=2**-14)
    np.testing.assert_allclose(mixed, mix_down(pcm, RATE // 10)[0] / 2, atol=2**-14)


def test_longer_crops_than_its_segments_are_refused(separator_file: tuple[str, Separator], spec: ModelSpec) -> None:

    with pytest.raises(
        EngineError, match=r"takes 6 s at a time, in which 5 s with 1 s .* Build it with longer segments"
    ):
        Separation(separator_file[1], replace(spec, crop_samples=5 * RATE), ALL, -60)


def test_the_command(tmp_path: Path) -> None:
    path, said = stems_model(tmp_path / "m.onnx"), spec_file(tmp_path, "sample_rate = 44100\nstem = 1")
    output = str(tmp_path / "m.engine")

    def build(*arguments: str) -> Any:
        return CliRunner().invoke(cli, ["build-engine", *arguments, "-o", output])

    done = build(path, "--separator", said)
    assert done.exit_code == 0, done.output
    assert "mix [1, 2, 264600] to stems, stem 1" in done.stderr
    shown = CliRunner().invoke(cli, ["inspect", output]).stdout
    assert "(separator)" in shown
    assert "a made mixture against itself" in shown
    for arguments, message in (
        ([path], "give --separator FILE.toml, with sample_rate = 44100"),
        ([path, "--separator", said, "--precision", "fp16"], "computes in fp32, as the model does, not fp16"),
        ([path, "--separator", said, "--normalise", "crop"], "--normalise is for encoders"),
        ([path, "--separator", said, "--backend", "native"], "the back ends onnxruntime, tensorrt, tensorrt-rtx"),
        (["byol", "--separator", said], "--separator is for ONNX models, and byol is not named .onnx"),
        ([path, "--separator", str(tmp_path / "none.toml")], "none.toml: No such file"),
    ):
        refused = build(*arguments, "--force")
        assert refused.exit_code == 2, refused.output
        assert message in refused.stderr
    with pytest.raises(OutputError, match="exists"):
        build_waveform_separator(path, said, output)
