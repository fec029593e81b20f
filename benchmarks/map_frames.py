"""Measures the frame rate of the page's 3D map and of Plotly's scatter3d: python -m benchmarks.map_frames [POINTS ...]

In a headless Chromium without a GPU, at the size of the page. The browser is limited to 60 frames per second, so the
time per frame of our map is printed too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

SECONDS = 4
N_SINGERS = 80
SCRIPT = """
const {map, trace} = JSON.parse(document.getElementById('data').textContent);
const element = document.getElementById('map');
element.style.width = '600px';
async function framesASecond(step) {  // after a second to warm up
  let frames = 0, angle = 0;
  const start = performance.now() + 1000;
  for (let now = 0; now < start + 1000 * SECONDS; now = await new Promise(requestAnimationFrame)) {
    frames += now > start;
    step(angle += 0.01);
  }
  return frames / SECONDS;
}
async function measure() {
  const ours = new PointMap(element, map);
  ours.turn(false);
  const fps = await framesASecond(angle => { ours.yaw = angle; ours.draw(); });
  const start = performance.now();
  for (let i = 0; i < 50; i++) { ours.yaw += 0.01; ours.draw(); }
  const milliseconds = (performance.now() - start) / 50;
  element.remove();
  const theirs = document.getElementById('plotly');
  const scene = {camera: {eye: {x: 1.4, y: 1.4, z: 0.8}}};
  await Plotly.newPlot(theirs, [trace], {scene, width: 600, height: 416, margin: {t: 0, r: 0, b: 0, l: 0}},
    {plotGlPixelRatio: devicePixelRatio});
  const plotly = await framesASecond(angle => Plotly.relayout(theirs, {'scene.camera':
    {eye: {x: 2 * Math.cos(angle), y: 2 * Math.sin(angle), z: 0.8}}}));
  return {fps, milliseconds, plotly};
}
"""


def make_page(n: int) -> str:
    """Return a page with `n` points in `N_SINGERS` clusters, for both maps."""
    rng = np.random.default_rng(0)
    singer = np.sort(rng.integers(0, N_SINGERS, n))
    points = rng.standard_normal((N_SINGERS, 3))[singer] + 0.15 * rng.standard_normal((n, 3))
    points /= np.linalg.norm(points, axis=1).max()
    names = [f"crop {i}" for i in range(n)]
    x, y, z = points.round(4).T.tolist()
    colours = [f"hsl({330 * i // N_SINGERS},75%,{(42, 58)[i % 2]}%)" for i in singer.tolist()]
    data: dict[str, Any] = {
        "map": {
            "points": points.round(4).ravel().tolist(),
            "singer": singer.tolist(),
            "singers": [f"singer {i}" for i in range(N_SINGERS)],
            "crops": names,
        },
        "trace": {"type": "scatter3d", "mode": "markers", "x": x, "y": y, "z": z, "text": names,
                  "marker": {"size": 3, "color": colours}},
    }  # fmt: skip
    map_js = (resources.files("singerembed.evaluation") / "map.js").read_text(encoding="utf-8")
    return (
        "<!doctype html><meta charset=utf-8><style>.map canvas { width: 600px; height: 416px }</style>"
        "<div class=map id=map></div><div id=plotly></div>"
        f"<script type='application/json' id=data>{json.dumps(data)}</script>"
        f"<script>{get_plotlyjs()}</script><script>const SECONDS = {SECONDS};{map_js}{SCRIPT}</script>"
    )


def main() -> None:
    """Print a table with one row per number of points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=int, nargs="*", default=[1000, 5000, 20_000])
    counts = parser.parse_args().points
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    software = ("use-angle=swiftshader", "enable-unsafe-swiftshader")  # for Plotly's WebGL
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1300,1000", *software):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_script_timeout(120)
    try:
        print("| points | the page's map, frames/s | its time a frame, ms | Plotly's scatter3d, frames/s |")
        print("| --- | --- | --- | --- |")
        with tempfile.TemporaryDirectory() as folder:
            for n in counts:
                page = Path(folder) / f"{n}.html"
                page.write_text(make_page(n), encoding="utf-8")
                driver.get(page.as_uri())
                found = driver.execute_async_script("measure().then(arguments[0])")
                print(f"| {n} | {found['fps']:.1f} | {found['milliseconds']:.1f} | {found['plotly']:.1f} |", flush=True)
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
