"""A search page, its server, and Chromium."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.search import page
from src.search.page import write_page
from tests.search.pages import ROOT, Browser, make_arguments


@pytest.fixture(scope="session")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the arguments that the album is written with."""
    return make_arguments(tmp_path_factory.mktemp("arguments"))


@pytest.fixture(scope="session")
def album(tmp_path_factory: pytest.TempPathFactory, arguments: dict[str, Any]) -> Path:
    """Return a written page with two files of images."""
    folder = tmp_path_factory.mktemp("pages") / "album"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "FIRST_IMAGES", 20)
        write_page(folder, **arguments)
    return folder


def start_chromium(profile: Path, page_load_strategy: str = "normal") -> Any:
    """Return a headless Chromium; skip the test if there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                  "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no chromium with chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless", "disable-gpu", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", "window-size=1200,900",
                 "force-prefers-reduced-motion",
                 f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.page_load_strategy = page_load_strategy
    browser = webdriver.Chrome(options=options, service=Service(driver))
    browser.set_script_timeout(30)
    return browser


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return a headless Chromium with its own profile."""
    browser = start_chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


@pytest.fixture()
def impatient_chromium(tmp_path: Path) -> Iterator[Any]:
    """Return a headless Chromium that does not wait until a page is loaded."""
    browser = start_chromium(tmp_path / "profile", "none")
    yield browser
    browser.quit()


@pytest.fixture()
def browser(chromium: Any, album: Path) -> Iterator[Browser]:
    """Open the album from disk; check at the end that nothing ran and nothing was fetched."""
    someone = Browser(chromium)
    someone.open(album.joinpath("index.html").as_uri())
    yield someone
    assert someone.js("return window.ran") is None
    assert someone.errors() == []


@pytest.fixture()
def served(album: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """Return a process that serves the page, and its port."""
    # A shell that runs the tests in the background ignores SIGINT for them.
    code = ("import signal, sys; from pathlib import Path; "
            "from src.search.page_server import serve_page; "
            "signal.signal(signal.SIGINT, signal.default_int_handler); "
            "serve_page(Path(sys.argv[1]), 0)")
    with subprocess.Popen([sys.executable, "-c", code, album], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process, int(re.search(r"127\.0\.0\.1:(\d+)/", process.stderr.readline())[1])
        finally:
            process.kill()
