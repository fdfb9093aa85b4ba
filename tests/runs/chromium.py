"""Chromium without a window, driven through playwright: what a reader of a page would notice."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

REQUIRED = "LLAMAGEN_CHROMIUM"  # environment variable: .ci/run sets it, so that there the tests cannot be skipped
WIDTHS = (1280, 390)
_NOTICED = """() => {
  const found = [], page = document.documentElement;
  if (page.scrollWidth > page.clientWidth) found.push(`overflow: ${page.scrollWidth} of ${page.clientWidth} pixels`);
  for (const image of document.images)
    if (!image.complete || !image.naturalWidth) found.push(`no picture: ${image.alt || image.src.slice(0, 40)}`);
  return found;
}"""


@contextmanager
def browser() -> Iterator[Any]:
    """Skips where there is no Chromium, unless it is required."""
    path = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
    if path is None:
        if os.environ.get(REQUIRED):
            pytest.fail("there is no Chromium: make chromium")
        pytest.skip("there is no Chromium (make chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield started
        finally:
            started.close()


def faults(browser: Any, page: Path, width: int, scheme: str) -> list[str]:
    """What is wrong with a page: sideways scrolling, errors in the console, pictures that are missing or broken."""
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    tab.on("console", lambda message: said.append(f"console: {message.text}") if message.type == "error" else None)
    tab.on("pageerror", lambda error: said.append(f"error: {error}"))
    tab.on("requestfailed", lambda request: said.append(f"not loaded: {request.url[:60]}"))
    try:
        tab.goto(page.absolute().as_uri())
        tab.wait_for_load_state("load")
        return [*tab.evaluate(_NOTICED), *said]
    finally:
        tab.close()
