"""Fixtures of the page tests: a real Chromium, a stub server, and a page that is watched for every kind of misbehaviour.

Without Chromium the tests that need it skip and say how to get it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from .stub_server import Front, StubServer

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
VIEWPORT = {"width": 1280, "height": 800}
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


@pytest.fixture(scope="session")
def front() -> Iterator[Front]:
    server = Front()
    yield server
    server.close()


@pytest.fixture
def stub(front) -> Iterator[StubServer]:
    server = StubServer(front)
    yield server
    for gate in list(server.gates.values()):
        gate.set()
    server.close()


class Contexts:
    """Browser contexts, kept from test to test: a new one has to fetch and compile all modules again."""

    def __init__(self, browser) -> None:
        self._browser = browser
        self._kept: dict[tuple[tuple[str, object], ...], object] = {}

    def new(self, **options):
        context = self._browser.new_context(**({"viewport": VIEWPORT} | options))
        context.set_default_timeout(TIMEOUT_MS)
        context.add_init_script(WATCH)
        return context

    def get(self, **options):
        key = tuple(sorted(options.items()))
        if key not in self._kept:
            self._kept[key] = self.new(**options)
        return self._kept[key]


@pytest.fixture(scope="session")
def contexts(browser) -> Contexts:
    return Contexts(browser)


MEDIA = ("color_scheme", "reduced_motion")


@pytest.fixture
def open_page(contexts, front, stub):
    """open_page(path, locale=..., viewport=..., **context options) -> (page, watch), at the stub's page or that of another url.

    `alone`: in a context of its own, for a test that changes more of it than pages and their storage.
    """
    opened = []

    def open_(
        path: str = "/",
        *,
        url: str = front.url,
        locale: str = "en-US",
        viewport=VIEWPORT,
        alone: bool = False,
        **options,
    ):
        media = {name: options.pop(name) for name in MEDIA if name in options}
        alone = alone or not options.keys() <= {"has_touch"}  # rights and keys stay in a context
        context = (contexts.new if alone else contexts.get)(locale=locale, **options)
        page = context.new_page()
        watch = Watch(origin=url)
        opened.append((context, watch, alone))
        storage = context.new_cdp_session(page)
        storage.send("Storage.clearDataForOrigin", {"origin": url, "storageTypes": "local_storage"})
        storage.detach()
        if viewport != VIEWPORT:
            page.set_viewport_size(viewport)
        if media:
            page.emulate_media(**media)
        page.on("console", lambda message: watch.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: watch.problems.append(str(error)))

        def note_request(request) -> None:
            parts = urlsplit(request.url)
            if f"{parts.scheme}://{parts.netloc}" != url:
                watch.foreign.append(request.url)

        page.on("request", note_request)
        page.goto(url + path)
        return page, watch

    yield open_
    for context, _, alone in opened:
        for page in context.pages:
            page.close()
        if alone:
            context.close()
    for _, watch, _ in opened:
        watch.check()
