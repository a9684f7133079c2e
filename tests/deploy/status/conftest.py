"""A real browser for the status page: Chromium through Playwright, which watches for errors and for strangers."""

import shutil
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.deploy.status.fake_cluster import FakeCluster
from tests.deploy.status.serving import Server, make_app, serving

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE_MS = 60_000.0

Open = Callable[..., Page]


@pytest.fixture
def server(cluster: FakeCluster) -> Iterator[Server]:
    """Of the module's own `cluster`."""
    with serving(make_app(cluster)) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of one module: Playwright keeps an event loop in this thread, in which no other test could run one."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no Chromium here: `apt-get install chromium`, as .ci/run does, to test the status page")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens a page by its URL; options are Playwright's, such as color_scheme. Afterwards: no error on its console, but for
    requests that failed or were refused, no exception, and no request to another host."""
    troubles: list[str] = []
    pages: list[Page] = []

    def open_(url: str, **options: object) -> Page:
        page = browser.new_context(**options).new_page()  # type: ignore[arg-type]
        page.set_default_timeout(PATIENCE_MS)
        host = urlsplit(url).netloc
        page.on("pageerror", lambda error: troubles.append(f"exception: {error}"))
        page.on("console", lambda said: troubles.extend([said.text] if _is_error(said) else []))
        page.on("request", lambda asked: troubles.extend([asked.url] if urlsplit(asked.url).netloc not in ("", host) else []))
        page.goto(url)
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.context.close()
    assert troubles == []


def _is_error(said: ConsoleMessage) -> bool:
    return said.type == "error" and "Failed to load resource" not in said.text
