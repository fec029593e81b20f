"""The page's map of points, as a reader meets it: in headless Chromium, by mouse, fingers and keys."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import soundfile
from browser import wait
from matplotlib.image import imread
from numpy.typing import NDArray

from singerembed.evaluation.baselines.base import ModelFacts
from singerembed.evaluation.data import read_labelled
from singerembed.evaluation.page import make_page
from singerembed.evaluation.result import Evaluation, EvaluationOptions
from singerembed.evaluation.run import evaluate
from singerembed.evaluation.views import View, make_view

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
NAMES = ["Ann <b>&", "Bea", "Cleo", "Dora", "Eve", "Fay"]  # the next colour is black, which marks what is pointed at
LEVELS_OF_PALENESS = np.linspace(0, 0.35, 16)


class NoiseModel:
    batch = 4
    workers = 1
    facts = ModelFacts("noise", 16_000, 0, "eight numbers of a crop")

    def embed(self, crops: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        return {"": np.ascontiguousarray(crops[:, :8])}

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = tmp_path_factory.mktemp("voices")
    rng = np.random.default_rng(0)
    for singer in ("a", "b"):
        (folder / singer).mkdir()
        for take in range(2):
            soundfile.write(folder / singer / f"{take}.wav", 0.1 * rng.standard_normal(64_000), 16_000)
    return evaluate(read_labelled(str(folder)), [NoiseModel], EvaluationOptions(n_pairs=20))


def write_page(evaluation: Evaluation, path: Path, points: NDArray[np.float32], singers: list[str]) -> str:
    """A page whose map shows `points`, of each of `singers` in turn; its address."""
    view: View = replace(
        make_view(evaluation.results[0], evaluation.crops),
        heat=np.eye(len(singers)),
        heat_names=singers,
        points=points,
        point_singer=np.arange(len(points)) % len(singers),
        point_names=[f"song {i}@4" for i in range(len(points))],
        cohesion=[],
    )
    path.write_text(make_page(evaluation, [view], "Map"), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def few(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A map of one point for each of NAMES, none near another from where the map is first seen."""
    angle = np.arange(len(NAMES)) * 2 * np.pi / len(NAMES)
    points = np.stack([np.cos(angle), np.sin(angle), np.cos(3 * angle)], axis=1).astype(np.float32)
    return write_page(evaluation, tmp_path_factory.mktemp("few") / "page.html", points, NAMES)


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser.chromium() as driver:
        yield driver


def open_map(driver: Any, page: str, *, still: bool = True) -> Any:
    """The canvas of a page's map, which is in sight and, if `still`, does not turn by itself."""
    features = [{"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get(page)
    wait(driver, "document.body.dataset.drawn === '4'")
    canvas = driver.find_element("css selector", "#map0 canvas")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    return canvas


def picture(driver: Any) -> NDArray[np.int64]:
    """The canvas's pixels, [rows, columns, RGB], when all frames that were asked for are drawn."""
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    url = driver.execute_script("return maps.map0.canvas.toDataURL()")
    pixels = imread(io.BytesIO(base64.b64decode(url.partition(",")[2])), format="png")
    return np.asarray(np.round(255 * pixels[:, :, :3]), np.int64)


def inks(driver: Any) -> NDArray[np.int64]:
    """The colours of the singers, as the legend shows them: [singers, RGB]."""
    script = "return maps.map0.entries.map(e => getComputedStyle(e.firstElementChild).color.match(/\\d+/g).map(Number))"
    return np.array(driver.execute_script(script))


def painted(pixels: NDArray[np.int64], ink: NDArray[np.int64]) -> NDArray[np.int64]:
    """The pixels that have a colour, however pale: [n, (row, column)]."""
    shades = ink + np.outer(LEVELS_OF_PALENESS, 255 - ink)
    apart = np.abs(pixels[:, :, np.newaxis] - shades).max(axis=3).min(axis=2)
    return np.argwhere(apart <= 3)


def places(driver: Any) -> NDArray[np.float64]:
    """Where the points of `few` are seen, NaN if they are not: [singers, (row, column)]."""
    pixels = picture(driver)
    found = [painted(pixels, ink) for ink in inks(driver)]
    return np.array([spots.mean(axis=0) if len(spots) else (np.nan, np.nan) for spots in found])


def mouse_at(driver: Any, canvas: Any, place: NDArray[np.float64]) -> Any:
    """A chain of actions that begins with the mouse at a place of the picture."""
    from selenium.webdriver import ActionChains

    row, column = np.round(place - [canvas.size["height"] / 2, canvas.size["width"] / 2]).astype(int).tolist()
    return ActionChains(driver, duration=50).move_to_element_with_offset(canvas, column, row)


def test_points_have_their_singers_colours_and_names(driver: Any, few: str) -> None:
    canvas = open_map(driver, few)
    colours = inks(driver)
    assert len(np.unique(colours, axis=0)) == len(NAMES)
    for singer, place in enumerate(places(driver)):
        mouse_at(driver, canvas, place).perform()
        picture(driver)
        tip = driver.find_element("css selector", "#map0 .tip")
        assert tip.text == f"{NAMES[singer]}\nsong {singer}@4"
    mouse_at(driver, canvas, np.array([2.0, 2.0])).perform()
    picture(driver)
    assert not driver.find_element("css selector", "#map0 .tip").is_displayed()


def test_dragging_turns(driver: Any, few: str) -> None:
    canvas = open_map(driver, few)
    before = places(driver)
    middle = np.array([canvas.size["height"] / 2, canvas.size["width"] / 2])
    mouse_at(driver, canvas, middle).click_and_hold().move_by_offset(40, 0).release().perform()
    after = places(driver)
    assert (after[:, 1] - before[:, 1]).max() > 10  # the front goes along
    assert (after[:, 1] - before[:, 1]).min() < -10  # and the back the other way
    drag = mouse_at(driver, canvas, after[0]).click_and_hold().move_by_offset(40, 0).move_by_offset(-40, 0)
    drag.release().perform()
    assert driver.execute_script("return maps.map0.picked") == -1  # a drag is no click, though it ends on a point
    mouse_at(driver, canvas, middle).click_and_hold().move_by_offset(0, 200).release().perform()
    assert driver.execute_script("return maps.map0.pitch") == pytest.approx(np.pi / 2)  # seen from the top, no farther


def test_the_wheel_zooms_about_the_mouse(driver: Any, few: str) -> None:
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    canvas = open_map(driver, few)
    before = places(driver)
    middle = np.array([canvas.size["height"] / 2, canvas.size["width"] / 2])
    held = int(np.abs(before - middle).sum(axis=1).argmin())
    offset = np.round(before[held] - middle).astype(int).tolist()
    origin = ScrollOrigin.from_element(canvas, offset[1], offset[0])
    mouse_at(driver, canvas, before[held]).scroll_from_origin(origin, 0, -120).perform()
    after = places(driver)
    assert np.abs(after[held] - before[held]).max() < 3
    seen = np.isfinite(after[:, 0])
    assert np.ptp(after[seen], axis=0).sum() > 1.1 * np.ptp(before[seen], axis=0).sum()
    mouse_at(driver, canvas, before[held]).scroll_from_origin(origin, 0, 600).perform()
    assert np.abs(places(driver) - before).max() < 3  # all in sight again, where it was


def test_fingers_turn_and_zoom(driver: Any, few: str) -> None:
    canvas = open_map(driver, few)
    corner = driver.execute_script("const r = arguments[0].getBoundingClientRect(); return [r.x, r.y]", canvas)

    def touch(kind: str, *fingers: tuple[float, float]) -> None:
        points = [{"x": corner[0] + x, "y": corner[1] + y, "id": i} for i, (x, y) in enumerate(fingers)]
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    before = places(driver)
    touch("touchStart", (200, 200))
    touch("touchMove", (240, 200))
    touch("touchEnd")
    turned = places(driver)
    assert (turned[:, 1] - before[:, 1]).max() > 10
    touch("touchStart", (180, 200), (280, 200))
    touch("touchMove", (155, 200), (305, 200))
    touch("touchEnd")
    assert driver.execute_script("return maps.map0.zoom") == pytest.approx(1.5)
    assert driver.execute_script("return maps.map0.held.size") == 0
    spread = np.ptp(turned, axis=0)
    assert np.nanmax(np.abs(places(driver) - turned)) > 0.1 * spread.max()


def test_keys_turn_and_zoom(driver: Any, few: str) -> None:
    from selenium.webdriver.common.keys import Keys

    canvas = open_map(driver, few)
    before = places(driver)
    for key, axis in ((Keys.ARROW_RIGHT, 1), (Keys.ARROW_DOWN, 0)):
        canvas.send_keys(key)
        moved = places(driver)
        assert np.abs(moved - before)[:, axis].max() > 3
        canvas.send_keys({Keys.ARROW_RIGHT: Keys.ARROW_LEFT, Keys.ARROW_DOWN: Keys.ARROW_UP}[key])
        assert np.abs(places(driver) - before).max() < 1
    canvas.send_keys("+")
    assert np.ptp(places(driver), axis=0).sum() > 1.15 * np.ptp(before, axis=0).sum()
    canvas.send_keys("-")
    assert np.abs(places(driver) - before).max() < 1


def test_a_click_brings_a_singer_out(driver: Any, few: str) -> None:
    from selenium.webdriver.common.keys import Keys

    canvas = open_map(driver, few)
    everywhere = places(driver)

    def shown() -> list[int]:
        return np.flatnonzero(np.isfinite(places(driver)[:, 0])).tolist()

    assert shown() == list(range(len(NAMES)))
    entry = driver.find_elements("css selector", "#map0 .legend button")[3]
    entry.click()
    assert (shown(), entry.get_attribute("aria-pressed"), entry.text.split()[-1]) == ([3], "true", "Dora")
    mouse_at(driver, canvas, everywhere[5]).click().perform()  # a point that stands back
    assert shown() == [5]
    mouse_at(driver, canvas, everywhere[5]).click().perform()
    assert shown() == list(range(len(NAMES)))
    entry.click()
    canvas.send_keys(Keys.ESCAPE)
    assert shown() == list(range(len(NAMES)))


def test_it_turns_by_itself_until_stopped(driver: Any, few: str) -> None:
    open_map(driver, few, still=False)
    begin = driver.execute_script("return maps.map0.yaw")
    wait(driver, f"maps.map0.yaw > {begin} + 0.05")
    button = driver.find_element("css selector", "#map0 > button")
    button.click()
    still = picture(driver)
    assert (picture(driver) == still).all()
    button.click()
    wait(driver, f"maps.map0.yaw > {begin} + 0.1")
    mouse_at(driver, driver.find_element("css selector", "#map0 canvas"), np.array([2.0, 2.0])).click().perform()
    assert button.text == "turn"
    still = picture(driver)
    assert (picture(driver) == still).all()


def test_who_asked_for_less_motion_gets_a_map_that_stands(driver: Any, few: str) -> None:
    open_map(driver, few, still=True)
    still = picture(driver)
    assert (picture(driver) == still).all()
    button = driver.find_element("css selector", "#map0 > button")
    assert button.text == "turn"
    button.click()
    wait(driver, "maps.map0.turning && maps.map0.yaw > 0.85")  # yet turns when told to


def test_it_follows_the_size_of_window_and_pixels(driver: Any, few: str) -> None:
    open_map(driver, few)
    size = "[maps.map0.canvas.width, maps.map0.canvas.height]"
    css = "[maps.map0.canvas.clientWidth, maps.map0.canvas.clientHeight]"
    try:
        for width, ratio in ((500, 1), (800, 2), (700, 1.5), (650, 3)):
            screen = {"width": width, "height": 900, "deviceScaleFactor": ratio, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            drawn = min(2, ratio)
            wait(driver, f"{css}[0] < {width} && {css}.every((side, k) => {size}[k] === Math.round(side * {drawn}))")
            assert np.isfinite(places(driver)).all()
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_five_thousand_points(driver: Any, evaluation: Evaluation, tmp_path: Path) -> None:
    singers = [f"singer {i}" for i in range(50)]
    points = np.random.default_rng(0).standard_normal((5000, 3)).astype(np.float32)
    page = write_page(evaluation, tmp_path / "page.html", points, singers)
    for log in ("browser", "performance"):
        driver.get_log(log)  # of earlier tests
    canvas = open_map(driver, page)
    assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert {url.partition(":")[0] for url in browser.requested(driver)} <= {"file", "data", "blob"}
    colours = inks(driver)
    for singer in (0, 7, 30):  # a hundred points, in this colour and no other
        driver.execute_script("maps.map0.pick(arguments[0])", singer)
        counts = [len(painted(picture(driver), ink)) for ink in np.unique(colours, axis=0)]
        own = np.unique(colours, axis=0).tolist().index(colours[singer].tolist())
        assert counts[own] > 100
        assert sum(counts) == counts[own]
    spots = painted(picture(driver), colours[30])
    mouse_at(driver, canvas, spots[len(spots) // 2].astype(float)).perform()
    picture(driver)
    assert driver.find_element("css selector", "#map0 .tip").text.splitlines()[0] == "singer 30"
