"""The chat page against the real HTTP server with a stand-in engine: routes, policy, keys, figures and aborts fit together."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from jilju import view
from jilju.config import ApiKey
from jilju.serve.app import create_app
from tests.serve.stub import StubClient, make_context

START_S = 20.0


def expect(locator):
    from playwright.sync_api import expect as playwright_expect  # at hand only where the browser fixture did not skip

    return playwright_expect(locator)


class Served:
    """The real app on a thread of its own."""

    def __init__(self, client: StubClient, **changes: object):
        app = create_app(make_context(client, view_dir=view.DIRECTORY, **changes))
        self._server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=0)
        )
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()), daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_S
        while not self._server.started:
            assert time.monotonic() < deadline and self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[object]:
    running: list[Served] = []

    def serve_(client: StubClient, **changes: object) -> Served:
        running.append(Served(client, **changes))
        return running[-1]

    yield serve_
    for served in running:
        served.close()


def ask(page, text: str) -> None:
    page.locator("#composer-text").fill(text)
    page.locator("#composer-text").press("Enter")


def test_an_answer_and_its_balanced_ledger(open_page, serve):
    text = "대한민국의 수도는 서울입니다. 👩‍👩‍👧"
    served = serve(StubClient(answer=lambda request: [*text.encode(), 258], delay_s=0.002))
    page, _ = open_page(url=served.url, locale="ko-KR")
    expect(page.locator("#model-name")).not_to_be_empty()
    page.get_by_role("button", name="대한민국의 수도는 어디인가요?").click()
    expect(page.locator(".figures")).to_be_visible()
    assert page.locator(".answer .text").text_content() == text
    expect(page.locator(".figure", has_text="출력")).to_have_text(f"출력 {len(text.encode()) + 1}")
    expect(page.locator(".ledger")).to_have_count(1)
    expect(page.locator(".ledger.unbalanced")).to_have_count(0)


def test_settings_reach_the_engine(open_page, serve):
    client = StubClient()
    served = serve(client)
    page, _ = open_page(url=served.url)
    expect(page.locator("#model-name")).not_to_be_empty()
    page.locator("#open-settings").click()
    expect(page.locator("#in-force")).to_be_visible()
    page.locator("#setting-temperature").fill("0.25")
    page.locator("#setting-seed").fill("77")
    page.locator("#setting-maxTokens").fill("9")
    page.locator("#setting-system").fill("Be brief.")
    page.locator("#setting-maxTokens").press("Enter")
    ask(page, "Hi")
    expect(page.locator(".figures")).to_be_visible()
    params = client.requests[-1].params
    assert (params.temperature, params.seed, params.max_tokens) == (0.25, 77, 9)
    assert "Be brief." in bytes(id_ for id_ in client.requests[-1].prompt_ids if id_ < 256).decode()


def test_stop_aborts_the_request_in_the_engine(open_page, serve):
    client = StubClient(answer=lambda request: list(b"So far and no further"), hang_at=6)
    served = serve(client)
    page, _ = open_page(url=served.url)
    ask(page, "Go on for ever")
    expect(page.locator(".answer .text")).to_have_text("So far")
    page.keyboard.press("Escape")
    expect(page.locator(".badge")).to_have_text("Stopped")
    expect(page.locator(".answer .text")).to_have_text("So far")
    deadline = time.monotonic() + START_S
    while client.live and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.aborted == [client.requests[0].id] and not client.live


def test_a_conversation_that_does_not_fit_is_refused_with_advice(open_page, serve):
    served = serve(StubClient())
    page, watch = open_page(url=served.url)
    watch.allowed.append("status of 400")
    ask(page, "long " * 1000)
    expect(page.locator(".fault")).to_contain_text("The conversation does not fit any more.")


def test_a_server_with_keys_takes_the_browsers_own_password_field(open_page, serve):
    served = serve(StubClient(), keys=(ApiKey(name="me", secret="s3cret"),))
    page, _ = open_page(url=served.url, http_credentials={"username": "me", "password": "s3cret"})
    ask(page, "Hi")
    expect(page.locator(".figures")).to_be_visible()
    expect(page.locator("#key-dialog")).to_be_hidden()


def test_the_browsers_own_password_given_for_a_page_of_a_folder_holds_for_the_api(open_page, serve):
    served = serve(StubClient(), keys=(ApiKey(name="me", secret="s3cret"),))
    page, watch = open_page("/livez", url=served.url, http_credentials={"username": "me", "password": "s3cret"})
    watch.allowed.append("status of 401")
    page.goto(f"{served.url}/view/base.css")  # a document in a folder, with no script of its own
    page.evaluate("document.body.replaceChildren(Object.assign(document.createElement('header'), { id: 'bar' }))")
    given = page.evaluate(
        """async () => {
          const { openPage } = await import("/view/page.js");
          const { api } = openPage({ page: "run", strings: { en: {}, ko: {} } });
          const asked = new Promise((resolve) => {
            const look = () => (document.querySelector("dialog[open]") ? resolve("a key was asked for") : setTimeout(look, 20));
            look();
          });
          return Promise.race([asked, api.json("/v1/models").then(({ object }) => object)]);
        }"""
    )
    assert given == "list"
