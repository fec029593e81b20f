"""The evaluation as a whole: sources, what is left out and said, conditions, the command, the page in a browser."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tolerances import SAME_CROP_COSINE

import singerembed
from singerembed.cli.main import cli
from singerembed.errors import InputError, UsageError
from singerembed.evaluation import figures, measure
from singerembed.evaluation.baselines.base import ModelFacts
from singerembed.evaluation.data import read_labelled
from singerembed.evaluation.geometry import (
    average_similarity,
    centroid_confusions,
    cluster_order,
    map_3d,
    spread_sample,
)
from singerembed.evaluation.metrics import equal_error_rate
from singerembed.evaluation.pairs import unit_rows
from singerembed.evaluation.probe import identify_singers
from singerembed.evaluation.result import Evaluation, EvaluationOptions
from singerembed.evaluation.run import evaluate

RATE = 16_000


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `<singer>/<n>.wav` of 8 s, and `catalog.csv` with the columns `singer` and `technique`."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows = ["path,singer,technique"]
    seconds = np.arange(8 * RATE) / RATE
    for singer in range(5):
        (folder / f"s{singer}").mkdir()
        tilt = np.linspace(0.5, 2.5, 5)[singer]
        for take in range(3):
            phase = 2 * np.pi * rng.uniform(120, 300) * seconds + 2 * np.sin(2 * np.pi * 5 * seconds)
            tone = sum(np.sin(k * phase) / k**tilt for k in range(1, 15)) + 0.01 * rng.standard_normal(len(seconds))
            soundfile.write(folder / f"s{singer}" / f"{take}.wav", 0.5 * tone / np.abs(tone).max(), RATE)
            rows.append(f"s{singer}/{take}.wav,s{singer},{'straight' if take % 2 else 'vibrato'}")
    (folder / "catalog.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


class LevelModel:
    """A model of five lines: the mean spectrum in eight bands."""

    batch = 3
    workers = 2
    facts = ModelFacts("bands", 16_000, 0, "eight bands")

    def embed(self, crops: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        power = np.abs(np.fft.rfft(crops, axis=1))[:, :32_000].reshape(len(crops), 8, -1)
        return {"": np.log(power.mean(axis=2) + 1e-3).astype(np.float32)}

    def close(self) -> None:
        pass


def run_bands(source: Path, **options: Any) -> Evaluation:
    return evaluate(read_labelled(str(source)), [LevelModel], EvaluationOptions(n_pairs=4000, **options))


def invoke(*arguments: str, exit_code: int = 0) -> Any:
    result = CliRunner().invoke(cli, list(arguments))
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


def test_folder_and_catalogue_are_one(corpus: Path) -> None:
    folder, catalog = run_bands(corpus), run_bands(corpus / "catalog.csv", conditions=("technique",))
    assert folder.results[0].eer == catalog.results[0].eer
    assert folder.crops.names[:3] == ["s0/0.wav@0", "s0/0.wav@4", "s0/1.wav@0"]
    assert set(catalog.results[0].conditions) == {
        "two recordings", "technique: same", "technique: different", "technique: straight", "technique: vibrato",
    }  # fmt: skip
    assert folder.results[0].eer.value < 0.35


def test_a_condition_keeps_the_pairs_that_it_names(corpus: Path) -> None:
    found = run_bands(corpus / "catalog.csv", conditions=("technique",))
    pairs, crops, unit = found.pairs, found.crops, found.results[0].unit
    value = np.array([crops.recordings[i].conditions["technique"] for i in crops.recording])
    same = value[pairs.first] == value[pairs.second]
    scores = (unit[pairs.first] * unit[pairs.second]).sum(axis=1)
    expected = equal_error_rate(pairs.labels[same], scores[same]).rate
    assert found.results[0].conditions["technique: same"].value == pytest.approx(expected, abs=0.01)


def test_pairs_within_a_group_are_those_that_share_its_value(corpus: Path) -> None:
    found = run_bands(corpus / "catalog.csv", within=("technique",), conditions=("technique",)).results[0]
    assert list(found.conditions)[:2] == ["two recordings", "within technique"]
    assert found.conditions["within technique"] == found.conditions["technique: same"]
    with pytest.raises(UsageError, match="--within sex: there is no such column; there are: technique"):
        run_bands(corpus / "catalog.csv", within=("sex",))


def test_the_nearest_crop_is_of_another_recording(corpus: Path) -> None:
    found = run_bands(corpus)
    unit, crops = found.results[0].unit, found.crops
    similarity = unit @ unit.T
    similarity[crops.recording[:, None] == crops.recording[None]] = -2
    right = crops.singer[similarity.argmax(axis=1)] == crops.singer
    assert 0.2 < right.mean() < 1
    assert found.results[0].nearest.value == pytest.approx(right.mean())


def test_what_centring_gives_is_the_error_rate_by_that_scoring(corpus: Path) -> None:
    plain, centred = run_bands(corpus).results[0], run_bands(corpus, scoring="centred").results[0]
    assert plain.centred == centred.eer == centred.centred
    assert plain.centred != plain.eer
    assert plain.effective_rank == centred.effective_rank
    assert 1 < plain.effective_rank < 8


def test_all_pairs(corpus: Path) -> None:
    found = run_bands(corpus, every_pair=True).results[0]
    first, second = np.triu_indices(len(found.unit), k=1)
    singer = run_bands(corpus).crops.singer
    expected = equal_error_rate(singer[first] == singer[second], (found.unit @ found.unit.T)[first, second]).rate
    assert found.eer.value == pytest.approx(expected, abs=1e-9)
    assert found.eer.low <= found.eer.high


def test_all_pairs_under_a_condition_that_few_satisfy(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval is of pairs that satisfy it, drawn until there are enough, or there is none."""
    monkeypatch.setattr(measure, "_INTERVAL_PAIRS", 40)
    singers = np.repeat(np.arange(6), 5)

    def rare(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.bool_]:
        return (first < 8) & (second < 8)

    pairs = measure._interval_pairs(singers, 0, rare)
    assert len(pairs)
    assert rare(pairs.first, pairs.second).all()
    nothing = measure._interval_pairs(singers, 0, lambda first, _second: first < 0)
    assert len(nothing) == 0


def test_what_is_left_out_is_said(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(corpus, folder)
    soundfile.write(folder / "s0" / "silent.wav", np.zeros(64_000), 16_000)
    soundfile.write(folder / "s0" / "nan.wav", np.full(64_000, np.nan), 16_000, subtype="FLOAT")
    (folder / "s1" / "broken.wav").write_bytes(b"RIFFnothing")
    (folder / "alone.wav").write_bytes(b"")
    notes = " / ".join(run_bands(folder).notes)
    assert "1 recordings lie in no singer's folder" in notes
    assert "bands: 1 silent crops and 1 crops with NaN or infinity left out" in notes
    assert "1 recordings could not be read, first: s1/broken.wav: " in notes


def test_one_singer_has_no_figures_and_that_is_said(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "s0", tmp_path / "c" / "s0")
    found = run_bands(tmp_path / "c")
    assert any("one singer only" in note for note in found.notes)
    fields = found.to_dict()["models"][0]
    assert fields["eer"] | fields["mnr"] | fields["top1"] == {
        "value": None, "low": None, "high": None,
        "missing": "identification needs two singers with two recordings each",
    }  # fmt: skip


def test_one_recording_each_leaves_identification_out_only(corpus: Path, tmp_path: Path) -> None:
    for singer in ("s0", "s1", "s2"):
        (tmp_path / "c" / singer).mkdir(parents=True)
        shutil.copy(corpus / singer / "0.wav", tmp_path / "c" / singer / "0.wav")
    result = run_bands(tmp_path / "c").results[0]
    assert np.isfinite(result.eer.value)
    assert result.top1.missing
    assert result.conditions["two recordings"].missing  # no pair of one singer is left


def test_pair_files(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("1,s0/0.wav,s0/1.wav\n0,s0/0.wav@4,s1/0.wav@0\n0,s0/0.wav,s9/0.wav\n", encoding="utf-8")
    found = run_bands(corpus, pairs_file=str(path))
    rows = zip(found.pairs.first, found.pairs.second, strict=True)
    names = [(found.crops.names[a], found.crops.names[b]) for a, b in rows]
    assert names == [("s0/0.wav@0", "s0/1.wav@0"), ("s0/0.wav@4", "s1/0.wav@0")]
    assert "1 of 3 pairs name crops that are missing or silent" in found.notes
    path.write_text("1,x.wav,y.wav\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"none of its paths is among the data's\. The first is x.wav"):
        run_bands(corpus, pairs_file=str(path))


@pytest.mark.parametrize("source", ["nothing", "empty", "no_column.csv"])
def test_data_that_cannot_be_evaluated(tmp_path: Path, source: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_column.csv").write_text("path,artist\na.wav,b\n", encoding="utf-8")
    with pytest.raises(
        (InputError, UsageError), match=r"no such file|holds no recordings|no column .singer.; it has: a"
    ):
        read_labelled(str(tmp_path / source))


def test_the_probe_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    singers, recordings = np.repeat(np.arange(6), 20), np.repeat(np.arange(24), 5)
    embedding = rng.standard_normal((6, 8))[singers] + 1.5 * rng.standard_normal((120, 8))
    found = identify_singers(embedding, singers, recordings)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    expected = cross_val_score(probe, embedding, singers, groups=recordings, cv=GroupKFold(4)).mean()
    assert found.top1 == pytest.approx(expected, abs=0.08)  # other folds
    assert found.top1 < found.top5 <= 1
    assert (found.folds, found.n_singers, found.n_crops) == (4, 6, 120)
    # A channel that gives each recording away is of no use across recordings.
    channel = np.eye(24)[recordings]
    assert identify_singers(channel, singers, recordings).top1 < 0.4


def test_geometry() -> None:
    rng = np.random.default_rng(0)
    singers = np.repeat([0, 1, 2, 3], 20)
    centres = np.repeat(rng.standard_normal((2, 8)), 2, axis=0)[[0, 2, 1, 3]]  # 0 is like 2, and 1 like 3
    unit = unit_rows(centres[singers] + 0.1 * rng.standard_normal((80, 8)))
    similarity = average_similarity(unit, singers, draws=2000)
    for a in range(4):
        for b in range(4):
            block = unit[singers == a] @ unit[singers == b].T
            expected = block[~np.eye(20, dtype=bool)].mean() if a == b else block.mean()
            assert similarity[a, b] == pytest.approx(expected, abs=0.01)
    order = cluster_order(similarity).tolist()
    assert abs(order.index(0) - order.index(2)) == abs(order.index(1) - order.index(3)) == 1
    confusions = centroid_confusions(unit, singers, np.arange(80) // 10)
    assert confusions.sum() == 80
    assert confusions[0, 0] + confusions[0, 2] == 20
    points = map_3d(unit)
    assert points.shape == (80, 3)
    radius = np.linalg.norm(points - np.median(points, axis=0), axis=1)
    assert radius.max() < 5 * np.median(radius)  # no point flies away
    distance = np.linalg.norm(points[:, np.newaxis] - points[np.newaxis], axis=2)
    nearest = np.argsort(distance, axis=1)[:, 1]
    assert (singers[nearest] % 2 == singers % 2).mean() > 0.95
    some = spread_sample(np.repeat([0, 1], [1000, 5]), 20)
    assert (some >= 1000).sum() == 5


def test_evaluate_command(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "report"
    result = invoke(
        "evaluate",
        str(corpus),
        "--model",
        "mfcc",
        "--model",
        "shipped",
        "-o",
        str(output),
        "--draw-pairs",
        "200",
        "--json",
    )
    facts = json.loads(result.stdout)
    assert facts == json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    assert [m["name"] for m in facts["models"]] == ["mfcc", "shipped"]
    assert (facts["crops"], facts["singers"], facts["recordings"]) == (30, 5, 15)
    assert (output / "table.md").read_text(encoding="utf-8").startswith("| model | parameters |")
    assert len(list((output / "figures").glob("*.svg"))) == len(list((output / "figures").glob("*.png"))) == 7
    again = invoke("evaluate", str(corpus), "--model", "mfcc", "--pairs", str(output / "pairs.txt"), "--json")
    assert json.loads(again.stdout)["models"][0]["eer"] == facts["models"][0]["eer"]
    assert "nothing to evaluate" in invoke("evaluate", str(corpus), exit_code=2).stderr


@pytest.fixture(scope="module")
def output(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("out") / "out.parquet"
    singerembed.run(str(corpus / "catalog.csv"), str(path))
    return path


def test_a_parquet_holds_what_its_engine_gives(output: Path, corpus: Path) -> None:
    result = invoke("evaluate", str(output), "--audio-root", str(corpus), "--model", "shipped", "--json")
    stored, shipped = json.loads(result.stdout)["models"]
    assert stored["eer"]["value"] == pytest.approx(shipped["eer"]["value"], abs=1e-3)
    data = read_labelled(str(output), None, audio_root=str(corpus))
    assert data.stored is not None
    pcm, rate = soundfile.read(data.recordings[0].location, dtype="float32")
    engine = singerembed.load_engine()
    expected = engine.embed(pcm, rate)[0]
    actual = data.stored.embedding[0]
    assert expected @ actual / np.linalg.norm(expected) / np.linalg.norm(actual) > SAME_CROP_COSINE


def test_a_parquet_is_compared_where_its_crops_begin(corpus: Path, tmp_path: Path) -> None:
    rows = [f"{corpus}/s{n % 2}/{n // 2}.wav,s{n % 2},1.5,7.9" for n in range(6)]
    (tmp_path / "parts.csv").write_text("\n".join(["path,singer,start,end", *rows]) + "\n", encoding="utf-8")
    output = str(tmp_path / "out.parquet")
    singerembed.run(str(tmp_path / "parts.csv"), output, options=singerembed.RunOptions(hop_seconds=2.0))
    data = read_labelled(output)
    found = evaluate(data, [LevelModel])
    assert "compared on the 6 crops that all models have embedded (one has 12)" in found.notes
    assert [result.table.start.tolist() for result in found.results] == [[1.5] * 6, [1.5] * 6]


def hover_on(driver: Any, element: Any) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(driver).move_to_element(element).move_by_offset(3, 3).pause(0.5).perform()


def test_report_page(output: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    invoke("report", str(output), "-o", str(page), "--condition", "technique")
    assert {"similarity", "tsne", "scores"} <= {p.name.split("-")[0] for p in (tmp_path / "report-figures").iterdir()}
    text = page.read_text(encoding="utf-8")
    assert "free-voices" in text
    if reason := browser.missing():
        pytest.skip(reason)
    with browser.chromium() as driver:
        driver.get(page.as_uri())
        deadline = time.monotonic() + 60
        while driver.execute_script("return document.body.dataset.drawn") != "4":
            assert time.monotonic() < deadline, driver.get_log("browser")
            time.sleep(0.1)
        errors = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert not errors
        assert {url.partition(":")[0] for url in browser.requested(driver)} <= {"file", "data", "blob"}
        assert not driver.find_element("css selector", "details pre").is_displayed()
        width = "return document.querySelector('table').scrollWidth <= document.body.clientWidth"
        assert driver.execute_script(width)
        heat = driver.find_element("css selector", "#heat0 .nsewdrag")
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", heat)
        hover_on(driver, heat)
        hovered = driver.execute_script("return document.querySelector('#heat0 .hoverlayer').textContent")
        assert re.search(r"s\ds\d0\.\d+", hovered)
        yaw = driver.execute_script("return maps.map0.yaw")
        deadline = time.monotonic() + 60
        while driver.execute_script("return maps.map0.yaw") == yaw:
            assert time.monotonic() < deadline, "the map does not turn"
            driver.execute_script("maps.map0.canvas.scrollIntoView({block: 'center'})")
        assert driver.execute_script("return maps.map0.n") == 30
        assert driver.execute_script("const m = maps.map0; return m.singers[m.singer[0]]") == "s0"
        assert driver.execute_script("return maps.map0.crops[0]").startswith("s0/0.wav@")


def test_names_without_glyphs_print_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    figure, axes = figures._figure(2, 2)
    axes.set_title("\u6b4c\u624b")
    assert all(Path(path).stat().st_size for path in figures._save(figure, str(tmp_path), "a"))
    assert not recwarn.list


def test_report_wants_a_file_of_run(corpus: Path, output: Path, tmp_path: Path) -> None:
    page = str(tmp_path / "p.html")
    assert "as Parquet" in invoke("report", str(corpus / "catalog.csv"), "-o", page, exit_code=1).stderr
    (tmp_path / "p-figures").touch()
    assert "p-figures: File exists" in invoke("report", str(output), "-o", page, exit_code=1).stderr
    result = invoke("report", str(output), "-o", page, "--singer-column", "artist", exit_code=2)
    assert 'no column "artist"; it has: singer, technique' in result.stderr
