"""Fixtures shared by all tests. Their hundreds of small runs log to no wandb unless a test asks for it.

Everything that tests start, such as a Slurm or a browser, ends with them, however they end.
"""

import gc
import os
import shutil
from collections.abc import Iterator
from typing import Any

import guardian
import pytest
from hypothesis import settings

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors; and the other cores have tests of their own
settings.register_profile("shared", deadline=None)  # a busy machine's seconds say nothing of a property
settings.load_profile("shared")
guardian.watch()
LONGEST = ("test_cluster", "test_resume", "test_parity", "test_bitwise", "test_launch", "test_security")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: at the end, side by side, no process waits for another's."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What has been imported stays: stages, which collect garbage, need not look through it."""
    gc.freeze()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by playwright. Without it the test is skipped; in CI it fails."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if not chromium:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=120_000)
        yield browser
        browser.close()
