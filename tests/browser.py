"""A headless Chromium for the tests of pages, or a reason why there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Rendering by software: WebGL works without a graphics card; nothing calls home.
_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"),
]


def executable() -> str | None:
    """Path of a Chromium: REPMATCH_BROWSER, or the first that the path holds."""
    named = os.environ.get("REPMATCH_BROWSER")
    return named or next((found for found in map(shutil.which, _NAMES) if found), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a headless Chromium; the test skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = executable()
    if path is None:
        pytest.skip("no Chromium on this machine; install one (apt-get install chromium) or set REPMATCH_BROWSER")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, headless=True, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()
