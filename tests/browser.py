"""A headless Chromium for tests of pages: what it draws, what it logs, and what it tries to fetch."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def missing() -> str:
    """Why there is no browser here; empty if there is one."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(lacking)} not installed (Debian: chromium chromium-driver)" if lacking else ""


@contextmanager
def chromium() -> Iterator[Any]:
    """A driver of a headless Chromium with software WebGL, its console and network recorded."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (
        "headless=new", "no-sandbox", "disable-background-networking", "disable-dev-shm-usage", "window-size=1300,1000",
        "use-angle=swiftshader", "enable-unsafe-swiftshader",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def wait(driver: Any, condition: str) -> None:
    """Wait until a condition in JavaScript holds."""
    deadline = time.monotonic() + 60
    while not driver.execute_script(f"return {condition}"):
        assert time.monotonic() < deadline, (condition, driver.get_log("browser"))
        time.sleep(0.05)


def requested(driver: Any) -> list[str]:
    """The addresses that were asked for since the last call."""
    sent = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
