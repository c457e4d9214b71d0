"""A headless Chromium and a server with the bundled model, for the tests of the page."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from quire import AsyncLLM, EngineConfig
from tests.server.running_server import RunningServer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_MS = 90_000
PLAIN_HTTP = "delete Crypto.prototype.randomUUID; delete Navigator.prototype.clipboard"
"""Removes what browsers offer on localhost and behind TLS alone: the page is also visited by an address."""


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser. Skips where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install '.[test]' brings playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def llm(chromium: Any) -> Iterator[RunningServer]:
    options = {"num_blocks": 300, "threads": 1, "dtype": "float32", "spare": False}
    with RunningServer(AsyncLLM(EngineConfig.from_options(options)), start_seconds=180) as server:
        yield server


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Any]:
    """Opens a view of a server in a browser without a past. Fails on any error that the page logs."""
    errors: list[str] = []
    contexts = []

    def open_page(server: RunningServer, view: str = "chat", *, may_log: bool = False, **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": 1100, "height": 720}, **options)
        contexts.append(context)
        context.add_init_script(PLAIN_HTTP)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        if not may_log:
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(f"{server.url}/#{view}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
