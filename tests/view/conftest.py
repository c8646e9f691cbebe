"""Fixtures of the page tests: a real Chromium, a stub server, and a page that is watched for every kind of misbehaviour.

Without Chromium the tests that need it skip and say how to get it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from .stub_server import StubServer

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT_MS = 10_000  # of an expectation; a slow machine is not a fault of the page
WATCH = """
document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`policy violation: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
"""


@dataclass
class Watch:
    """What must stay empty; a test that provokes console messages names them in `allowed`."""

    origin: str
    problems: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)

    def check(self) -> None:
        unexpected = [text for text in self.problems if not any(re.search(pattern, text) for pattern in self.allowed)]
        assert unexpected == [], f"the console or the page reported: {unexpected}"
        assert self.foreign == [], f"requests left {self.origin}: {self.foreign}"


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    if not CHROMIUM.exists():
        pytest.skip(f"chromium not found at {CHROMIUM}: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        # launch() makes a fresh user-data directory and removes it
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        sync_api.expect.set_options(timeout=TIMEOUT_MS)
        yield chromium
        chromium.close()


@pytest.fixture
def stub() -> Iterator[StubServer]:
    server = StubServer()
    yield server
    for gate in list(server.gates.values()):
        gate.set()
    server.close()


@pytest.fixture
def open_page(browser, stub):
    """open_page(locale=..., viewport=..., **context options) -> (page, watch), at the stub's page or that of another url."""
    opened = []

    def open_(path: str = "/", *, url: str | None = None, **options):
        url = url or stub.url
        options.setdefault("locale", "en-US")
        options.setdefault("viewport", {"width": 1280, "height": 800})
        context = browser.new_context(**options)
        context.set_default_timeout(TIMEOUT_MS)
        context.add_init_script(WATCH)
        page = context.new_page()
        watch = Watch(origin=url)
        page.on("console", lambda message: watch.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: watch.problems.append(str(error)))

        def note_request(request) -> None:
            parts = urlsplit(request.url)
            if f"{parts.scheme}://{parts.netloc}" != url:
                watch.foreign.append(request.url)

        page.on("request", note_request)
        page.goto(url + path)
        opened.append((context, watch))
        return page, watch

    yield open_
    for context, watch in opened:
        context.close()
        watch.check()
