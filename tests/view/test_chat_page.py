"""The chat page in a real Chromium, against a stub server that scripts every answer.

Each test also fails on any console error, policy violation or request that leaves the origin (see conftest.py).
"""

import json
import re
from functools import partial

import pytest

from .axe import check_axe
from .stub_server import MODEL, TIMINGS, USAGE, Exchange, say


def expect(locator):
    from playwright.sync_api import expect as playwright_expect  # at hand only where the browser fixture did not skip

    return playwright_expect(locator)


def ask(page, text: str = "Hi") -> None:
    page.locator("#composer-text").fill(text)
    page.locator("#composer-text").press("Enter")


def answer(page):
    return page.locator(".answer").last


# Streaming


def test_an_answer_appears_token_by_token(open_page, stub):
    def script(exchange: Exchange) -> None:
        exchange.wait("begin")
        exchange.begin()
        exchange.token("Seoul")
        exchange.wait("more")
        exchange.token(" is")
        exchange.token(" it.")
        exchange.wait("end")
        exchange.end()

    stub.script = script
    stub.health = {"running": 0, "waiting": 1}
    page, _ = open_page()
    ask(page, "What is the capital?")
    expect(page.locator(".user .text")).to_have_text("What is the capital?")
    expect(page.locator(".phase-word")).to_have_text("waiting")
    stub.gates["begin"].set()
    expect(answer(page).locator(".text")).to_have_text("Seoul")
    expect(page.locator(".phase-word")).to_have_text("writing")
    expect(answer(page)).to_have_attribute("aria-busy", "true")
    stub.gates["more"].set()
    expect(answer(page).locator(".text")).to_have_text("Seoul is it.")
    expect(page.locator(".figures")).to_have_count(0)
    stub.gates["end"].set()
    expect(page.locator(".figures")).to_have_count(1)
    expect(answer(page)).to_have_attribute("aria-busy", "false")
    expect(page.locator("#status")).to_have_text("Answer complete, 11 tokens.")


def test_the_request_asks_for_a_stream_with_usage_and_timings(open_page, stub):
    page, _ = open_page()
    expect(page.locator("#model-name")).to_have_text("stub-1b")
    ask(page, "Hello?")
    expect(page.locator(".ask-again")).to_be_visible()
    assert stub.bodies == [
        {
            "model": "stub-1b",
            "messages": [{"role": "user", "content": "Hello?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "timings": True,
            "return_token_ids": True,
        }
    ]


def test_a_second_question_carries_the_conversation(open_page, stub):
    stub.script = say("One", ".")
    page, _ = open_page()
    ask(page, "first")
    expect(page.locator(".ask-again")).to_be_visible()
    ask(page, "second")
    expect(page.locator(".figures")).to_have_count(2)
    assert stub.bodies[1]["messages"] == [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "second"},
    ]


def test_reading_is_said_when_no_request_waits_and_how_much(open_page, stub):
    stub.script = lambda exchange: (exchange.wait("begin"), say("Yes")(exchange))
    stub.health = {"running": 1, "waiting": 1}
    page, _ = open_page()
    ask(page, "one two three")
    expect(page.locator(".phase-figure")).to_have_text(re.compile(r"^\d s$"))
    expect(page.locator(".phase-word")).to_have_text("waiting")
    stub.health = {"running": 1, "waiting": 0}
    expect(page.locator(".phase-word")).to_have_text("reading 11 tokens")
    stub.gates["begin"].set()
    expect(answer(page).locator(".text")).to_have_text("Yes")


SPLITS = """
async () => {
  const { SseParser } = await import("/view/sse.js");
  const stream = 'data: {"a":"서울 👩‍👩‍👧"}\\n\\n: wait\\n\\ndata: one\\r\\ndata:two\\r\\n\\r\\nevent: x\\ndata: \\n\\ndata: [DONE]\\n\\n';
  const bytes = new TextEncoder().encode(stream);
  const read = (cuts) => {
    const decoder = new TextDecoder(), parser = new SseParser(), events = [];
    for (let i = 0; i + 1 < cuts.length; i++)
      events.push(...parser.push(decoder.decode(bytes.subarray(cuts[i], cuts[i + 1]), { stream: true })));
    return events;
  };
  const results = new Set();
  for (let first = 0; first <= bytes.length; first++)
    for (let second = first; second <= bytes.length; second++)
      results.add(JSON.stringify(read([0, first, second, bytes.length])));
  results.add(JSON.stringify(read([...bytes.keys(), bytes.length])));
  return [...results];
}
"""


def test_the_event_reader_gives_the_same_events_however_the_bytes_are_cut(open_page):
    page, _ = open_page()
    results = page.evaluate(SPLITS)
    assert [json.loads(result) for result in results] == [['{"a":"서울 👩‍👩‍👧"}', "one\ntwo", "", "[DONE]"]]


def test_the_event_reader_bounds_one_event(open_page):
    page, _ = open_page()
    name = page.evaluate(
        """async () => {
          const { EventTooLong, SseParser } = await import("/view/sse.js");
          const parser = new SseParser();
          try { for (let i = 0; i < 100; i++) parser.push("x".repeat(1 << 16)); } catch (e) { return e instanceof EventTooLong; }
        }"""
    )
    assert name is True


# Stop


def talk_until_left(exchange: Exchange) -> None:
    exchange.begin()
    exchange.token("So far")
    exchange.wait("stopped")
    for _ in range(10_000):  # writing on, a socket that was closed is noticed at once
        exchange.token(" and on")


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_keeps_what_arrived_and_ends_the_request(open_page, stub, how):
    stub.script = talk_until_left
    page, _ = open_page()
    ask(page)
    expect(answer(page).locator(".text")).to_have_text("So far")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(answer(page).locator(".badge")).to_have_text("Stopped")
    stub.gates["stopped"].set()
    assert stub.client_left.wait(10), "the page kept the connection after stop"
    expect(answer(page).locator(".text")).to_have_text("So far")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#composer-text")).to_be_focused()
    stub.script = say("Whole.")
    page.locator(".ask-again").click()
    expect(answer(page).locator(".text")).to_have_text("Whole.")
    assert stub.bodies[1]["messages"] == stub.bodies[0]["messages"]


def test_a_stop_before_the_first_token_is_said(open_page, stub):
    stub.script = lambda exchange: exchange.wait("never mind")
    page, _ = open_page()
    ask(page)
    page.keyboard.press("Escape")
    expect(answer(page)).to_contain_text("Stopped before the first token.")


def test_new_chat_ends_the_answer_and_clears_the_page(open_page, stub):
    stub.script = talk_until_left
    page, _ = open_page()
    ask(page)
    expect(answer(page).locator(".text")).to_have_text("So far")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()
    stub.gates["stopped"].set()
    assert stub.client_left.wait(10), "the page kept the connection after a new chat began"
    stub.script = say("Fresh")
    ask(page, "again")
    expect(answer(page).locator(".text")).to_have_text("Fresh")
    assert stub.bodies[-1]["messages"] == [{"role": "user", "content": "again"}]


# Figures


def test_the_figures_of_an_answer_are_one_line_that_opens_its_run(open_page, stub):
    page, _ = open_page()
    ask(page)
    expect(page.locator(".figure:not(.to-run)")).to_have_text(
        ["214 in", "192 cached", "11 out", "first token 96.4 ms", "31 ms per token", "total 412 ms"]
    )
    expect(page.locator("a.figures")).to_have_attribute("href", "/runs/chatcmpl-stub")
    parts = "host 2.1 ms + waiting 12 ms + prefill 82 ms + waiting 4 ms + decode 310 ms + host 2.2 ms"
    expect(page.get_by_role("img", name=f"Where the time went: {parts} = 412 ms")).to_be_visible()
    widths = page.locator(".ledger rect").evaluate_all(
        "rects => rects.map((rect) => Number(rect.getAttribute('width')))"
    )
    assert sum(widths) == pytest.approx(TIMINGS["total_ms"]), "the ledger bar does not end at the total"
    expect(page.locator(".unbalanced")).to_have_count(0)


def test_a_ledger_that_does_not_balance_is_shown_as_such(open_page, stub):
    stub.script = lambda exchange: (exchange.begin(), exchange.end(timings={**TIMINGS, "decode_ms": 200.0}))
    page, _ = open_page()
    ask(page)
    expect(page.locator(".ledger.unbalanced")).to_have_count(1)
    expect(answer(page)).to_contain_text("do not sum to the total of 412 ms")


def test_a_one_token_answer_has_no_pace(open_page, stub):
    usage = {**USAGE, "completion_tokens": 1, "prompt_tokens": 20, "prompt_tokens_details": {"cached_tokens": 0}}
    stub.script = lambda exchange: (
        exchange.begin(),
        exchange.token("No"),
        exchange.end("length", usage, {**TIMINGS, "tpot_ms": None, "stalled_ms": 0.0, "decode_ms": 314.0}),
    )
    page, _ = open_page()
    ask(page)
    expect(page.locator(".figure:not(.to-run)")).to_have_text(["20 in", "1 out", "first token 96.4 ms", "total 412 ms"])
    expect(answer(page).locator(".badge")).to_have_text("Cut at the token limit")


# Settings


def open_settings(page):
    page.get_by_role("button", name="Settings").click()
    return page.get_by_role("dialog", name="Settings")


def test_settings_reach_the_request_and_outlive_a_reload(open_page, stub):
    page, _ = open_page()
    expect(page.locator("#model-name")).to_have_text("stub-1b")
    sheet = open_settings(page)
    expect(sheet).to_contain_text("Default: 0.7")
    expect(sheet).to_contain_text("what is left of the context of 4,096")
    expect(page.locator("#in-force-list > div")).to_have_text(
        ["top_p0.8", "top_k20", "min_p0", "repetition_penalty1.1"]
    )
    sheet.get_by_label("Temperature").fill("0.2")
    sheet.get_by_label("Seed").fill("42")
    sheet.get_by_label("Max tokens").fill("64")
    sheet.get_by_label("System prompt").fill("Answer in one word.")
    sheet.get_by_role("button", name="Save").click()
    expect(sheet).to_be_hidden()
    page.reload()
    ask(page, "Now")
    expect(page.locator(".ask-again")).to_be_visible()
    body = stub.bodies[-1]
    assert {name: body[name] for name in ("temperature", "seed", "max_tokens")} == {
        "temperature": 0.2,
        "seed": 42,
        "max_tokens": 64,
    }
    assert body["messages"][0] == {"role": "system", "content": "Answer in one word."}
    sheet = open_settings(page)
    expect(sheet.get_by_label("Seed")).to_have_value("42")
    sheet.get_by_role("button", name="Use defaults").click()
    sheet.get_by_role("button", name="Save").click()
    ask(page, "Then")
    expect(page.locator(".figures")).to_have_count(2)
    assert not {"temperature", "seed", "max_tokens"} & stub.bodies[-1].keys()


WRONG_SETTINGS = [
    ("Temperature", "warm", "“warm” is not a number. Write it like 0.7, with a point."),
    ("Temperature", "0,7", "“0,7” is not a number. Write it like 0.7, with a point."),
    ("Temperature", "2.1", "2.1 is outside 0 to 2."),
    ("Seed", "1.5", "“1.5” is not a whole number. Write it like 42."),
    ("Seed", "9007199254740993", "9007199254740993 is outside"),
    ("Max tokens", "0", "0 is outside 1 to 4,096."),
    ("Max tokens", "5000", "5000 is outside 1 to 4,096."),
]


def test_a_wrong_setting_is_explained_and_not_kept(open_page, stub):
    page, _ = open_page()
    expect(page.locator("#model-name")).to_have_text("stub-1b")
    for label, given, said in WRONG_SETTINGS:
        sheet = open_settings(page)
        field = sheet.get_by_label(label)
        expect(field).to_have_value("")
        field.fill(given)
        field.press("Enter")
        expect(sheet.locator(".field-error", has_text=said)).to_be_visible()
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_be_focused()
        page.keyboard.press("Escape")
        expect(sheet).to_be_hidden()
        assert page.evaluate("localStorage.getItem('jilju.settings')") is None


def test_kept_settings_that_are_not_valid_are_left_out(open_page, stub):
    page, _ = open_page()
    page.evaluate("localStorage.setItem('jilju.settings', JSON.stringify({temperature: 'x', seed: 3, evil: '1'}))")
    page.reload()
    ask(page)
    expect(page.locator(".ask-again")).to_be_visible()
    assert stub.bodies[-1]["seed"] == 3
    assert not {"temperature", "evil"} & stub.bodies[-1].keys()


# Keyboard, input methods, accessibility


def test_everything_works_by_keyboard_alone(open_page, stub):
    page, _ = open_page()
    expect(page.locator("#composer-text")).to_be_focused()
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    assert stub.bodies == []
    page.keyboard.press("Enter")
    expect(page.locator(".ask-again")).to_be_visible()
    assert stub.bodies[0]["messages"][-1]["content"] == "line one\nline two"
    expect(page.locator("#composer-text")).to_have_value("")
    seen = set()
    for _ in range(24):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        special = page.evaluate(
            "document.activeElement === document.body || document.activeElement.id === 'composer-text'"
        )
        assert special or outline != "none", (
            f"focus is not visible on {page.evaluate('document.activeElement.outerHTML')}"
        )
    assert {"new-chat", "open-settings", "toggle-theme", "scroller", "quiet ask-again"} <= seen, seen
    page.locator("#open-settings").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#setting-temperature")).to_be_focused()
    page.keyboard.type("0")
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.locator("#open-settings")).to_be_focused()
    page.locator("#new-chat").focus()
    page.keyboard.press("Space")
    expect(page.locator("#composer-text")).to_be_focused()


def test_enter_belongs_to_the_input_method_while_it_composes(open_page, stub):
    page, _ = open_page(locale="ko-KR")
    session = page.context.new_cdp_session(page)
    page.locator("#composer-text").focus()
    session.send("Input.imeSetComposition", {"text": "안녕", "selectionStart": 2, "selectionEnd": 2})
    expect(page.locator("#composer-text")).to_have_value("안녕")
    # what a Korean input method sends for the Enter that ends a composition: key code 229
    session.send(
        "Input.dispatchKeyEvent", {"type": "keyDown", "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
    )
    taken = page.evaluate(
        """() => [{ isComposing: true }, { keyCode: 229 }].map((how) => {
          const event = new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true, ...how });
          return !document.querySelector("#composer-text").dispatchEvent(event);
        })"""
    )
    assert taken == [False, False], "browsers differ in which of the two signs they give"
    expect(page.locator(".message")).to_have_count(0)
    assert stub.bodies == []
    session.send("Input.insertText", {"text": "안녕"})
    page.keyboard.press("Enter")
    expect(page.locator(".user .text")).to_have_text("안녕")
    expect(page.locator(".ask-again")).to_be_visible()
    assert [body["messages"][-1]["content"] for body in stub.bodies] == ["안녕"]


def test_a_blank_message_is_not_sent(open_page, stub):
    page, _ = open_page()
    ask(page, "  \n ")
    expect(page.locator("#send")).to_be_disabled()
    expect(page.locator(".message")).to_have_count(0)
    assert stub.bodies == []


def test_every_control_has_a_name(open_page):
    page, _ = open_page()
    page.locator("#open-settings").click()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, dialog")].filter((element) => {
          const label = element.labels?.[0]?.textContent || element.getAttribute("aria-label") || element.textContent;
          return !label.trim();
        }).map((element) => element.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize(("locale", "color_scheme", "width"), [("en-US", "light", 1440), ("ko-KR", "dark", 390)])
def test_axe_finds_nothing_serious(open_page, stub, locale, color_scheme, width):
    stub.script = say(
        "# Title\n\n",
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n",
        "```js\nlet a;\n```\n\n",
        "> [link](https://example.invalid/)",
    )
    page, watch = open_page(locale=locale, color_scheme=color_scheme, viewport={"width": width, "height": 844})
    expect(page.locator("#model-name")).to_have_text("stub-1b")
    check_axe(page)
    ask(page, "**Hi**")
    expect(page.locator(".figures")).to_be_visible()
    check_axe(page)
    watch.allowed.append("status of 429")
    stub.script = lambda exchange: exchange.refuse(429, "overloaded", "too much")
    page.locator(".ask-again").click()
    expect(page.locator(".fault")).to_be_visible()
    check_axe(page)
    page.locator("#open-settings").click()
    page.locator("#setting-temperature").fill("hot")
    page.keyboard.press("Enter")
    expect(page.locator(".field-error").first).to_be_visible()
    check_axe(page)


def test_axe_finds_nothing_serious_while_an_answer_comes_and_in_the_key_dialog(open_page, stub):
    stub.script = lambda exchange: (exchange.begin(), exchange.token("Half"), exchange.wait("end"), exchange.end())
    page, watch = open_page()
    ask(page)
    expect(answer(page).locator(".text")).to_have_text("Half")
    check_axe(page)
    stub.gates["end"].set()
    expect(page.locator(".figures")).to_be_visible()
    watch.allowed.append("status of 401")
    stub.key = "right"
    ask(page)
    expect(page.locator("#key-dialog")).to_be_visible()
    page.keyboard.press("Enter")
    check_axe(page)
    page.keyboard.press("Escape")
    expect(page.locator(".fault")).to_contain_text("The server asks for a key.")


# Themes, widths, languages

PAPER = "getComputedStyle(document.body).backgroundColor"
LIGHT, DARK = "rgb(250, 249, 246)", "rgb(19, 20, 22)"


def test_the_theme_follows_the_system_until_one_is_chosen(open_page):
    page, _ = open_page(color_scheme="dark")
    assert page.evaluate(PAPER) == DARK
    page.emulate_media(color_scheme="light")
    assert page.evaluate(PAPER) == LIGHT
    page.get_by_role("button", name="Switch to the dark theme").click()
    assert page.evaluate(PAPER) == DARK
    page.reload()
    assert page.evaluate(PAPER) == DARK
    page.get_by_role("button", name="Switch to the light theme").click()
    assert page.evaluate(PAPER) == LIGHT
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(PAPER) == DARK, "back at the system's theme, the page follows the system again"


CONTRAST = """
() => {
  const style = getComputedStyle(document.documentElement);
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (name) => {
    const probe = document.createElement("i");
    probe.style.color = `var(${name})`;
    document.body.append(probe);
    canvas.fillStyle = getComputedStyle(probe).color;
    probe.remove();
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((byte) => {
      const x = byte / 255;
      return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((m, n) => n - m); return (x + 0.05) / (y + 0.05); };
  const texts = [["--ink", "--paper"], ["--ink", "--sunken"], ["--ink-quiet", "--paper"], ["--ink-quiet", "--raised"], ["--ink-quiet", "--sunken"],
    ["--ink-quiet", "--fault-paper"], ["--fault", "--fault-paper"], ["--fault", "--raised"], ["--on-accent", "--accent"],
    ...["wait", "prefill", "decode", "cached", "host", "fault"].map((kind) => [`--on-${kind}`, `--${kind}`])];
  const marks = ["--accent", "--wait", "--prefill", "--decode", "--cached", "--host", "--fault", "--line-strong"].map((name) => [name, "--paper"]);
  return [...texts.map(([a, b]) => [a, b, ratio(a, b), 4.5]), ...marks.map(([a, b]) => [a, b, ratio(a, b), 3])];
}
"""


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_text_and_marks_have_enough_contrast(open_page, color_scheme):
    page, _ = open_page(color_scheme=color_scheme)
    weak = [row for row in page.evaluate(CONTRAST) if row[2] < row[3]]
    assert weak == [], "WCAG AA: 4.5 for text, 3 for marks"


LONG = "https://example.invalid/" + "a" * 300


LAID_OUT = "(width) => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(innerWidth === width))))"
TOO_WIDE = """() => [...document.querySelectorAll("body, body *")]
    .filter((e) => e.checkVisibility() && !e.closest(".visually-hidden, .skip-link, svg") && e.getBoundingClientRect().right > innerWidth + 0.5)
    .map((e) => e.outerHTML.slice(0, 120))"""


def test_nothing_is_wider_than_the_page(open_page, stub):
    stub.script = say("긴 답변입니다. ", LONG, "\n\tif n < 2: return False")
    page, _ = open_page(locale="ko-KR")
    expect(page.locator("#model-name")).to_have_text("stub-1b")

    def check() -> None:
        for width in (320, 390, 1280):
            page.set_viewport_size({"width": width, "height": 844})
            page.wait_for_function(LAID_OUT, arg=width)
            assert page.evaluate(TOO_WIDE) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    check()
    ask(page, LONG)
    expect(page.locator(".figures")).to_be_visible()
    check()
    page.locator("#open-settings").click()
    check()


def test_a_korean_browser_gets_a_korean_page_and_korean_text_renders(open_page, stub):
    stub.script = say("대한", "민국의 ", "수도는 ", "서울", "입니다.")
    page, _ = open_page(locale="ko-KR")
    assert page.evaluate("document.documentElement.lang") == "ko"
    page.get_by_role("button", name="대한민국의 수도는 어디인가요?").click()
    expect(answer(page).locator(".text")).to_have_text("대한민국의 수도는 서울입니다.")
    expect(page.locator(".figure").nth(1)).to_have_text("캐시 192")
    assert stub.bodies[0]["messages"] == [{"role": "user", "content": "대한민국의 수도는 어디인가요?"}]
    session = page.context.new_cdp_session(page)
    session.send("DOM.enable")
    session.send("CSS.enable")
    root = session.send("DOM.getDocument")["root"]["nodeId"]
    node = session.send("DOM.querySelector", {"nodeId": root, "selector": ".answer .text"})["nodeId"]
    fonts = session.send("CSS.getPlatformFontsForNode", {"nodeId": node})["fonts"]
    assert sum(font["glyphCount"] for font in fonts) >= len("대한민국의수도는서울입니다.")


def test_other_languages_get_english(open_page):
    page, _ = open_page(locale="fi-FI")
    assert page.evaluate("document.documentElement.lang") == "en"
    expect(page.locator("#empty h2")).to_have_text("What would you like to know?")


@pytest.mark.parametrize("folder", ["/view", "/view/chat", "/view/engine", "/view/run"])
def test_the_languages_have_the_same_strings_with_the_same_holes(open_page, folder):
    page, _ = open_page()
    strings = page.evaluate(
        """async (folder) => Object.fromEntries(await Promise.all(["en", "ko"].map(async (language) =>
          [language, (await import(`${folder}/strings.${language}.js`)).STRINGS])))""",
        folder,
    )
    shapes = {
        language: {
            key: len(text) if isinstance(text, list) else sorted(re.findall(r"\{(\w+)\}", text))
            for key, text in table.items()
        }
        for language, table in strings.items()
    }
    assert shapes["ko"] == shapes["en"]


def test_reduced_motion_stops_the_phase_mark(open_page, stub):
    stub.script = lambda exchange: exchange.wait("nothing")
    page, _ = open_page(reduced_motion="reduce")
    ask(page)
    expect(page.locator(".phase-mark")).to_be_visible()
    assert page.locator(".phase-mark").evaluate("mark => getComputedStyle(mark).animationName") == "none"
    page.keyboard.press("Escape")


def test_the_page_follows_the_answer_until_one_scrolls_up(open_page, stub):
    def script(exchange: Exchange) -> None:
        exchange.begin()
        exchange.token("line\n" * 80)
        exchange.wait("scrolled")
        exchange.token("line\n" * 40)
        exchange.token("END")
        exchange.wait("seen")
        exchange.end()

    stub.script = script
    page, _ = open_page()
    distance = (
        "() => { const s = document.querySelector('#scroller'); return s.scrollHeight - s.scrollTop - s.clientHeight; }"
    )
    ask(page)
    expect(answer(page).locator(".text")).to_contain_text("line")
    assert page.evaluate(distance) < 2
    page.mouse.move(600, 400)
    page.mouse.wheel(0, -600)
    expect(page.locator("#to-latest")).to_be_visible()
    top = page.evaluate("document.querySelector('#scroller').scrollTop")
    stub.gates["scrolled"].set()
    expect(answer(page).locator(".text")).to_contain_text("END")
    assert page.evaluate("document.querySelector('#scroller').scrollTop") == pytest.approx(top, abs=600)
    assert page.evaluate(distance) > 400
    page.locator("#to-latest").click()
    expect(page.locator("#to-latest")).to_be_hidden()
    assert page.evaluate(distance) < 2
    stub.gates["seen"].set()
    expect(page.locator(".figures")).to_be_in_viewport()


# Safety and faults


def test_the_policy_is_strict_and_the_watch_would_see_a_breach(open_page):
    page, watch = open_page()
    page.evaluate(
        """() => { try { document.body.insertAdjacentHTML("beforeend", "<b>x</b>"); } catch { /* trusted types */ } }"""
    )
    page.evaluate(
        """() => { const s = document.createElement("style"); s.textContent = "b{}"; document.head.append(s); }"""
    )
    page.evaluate("0")  # a round trip, after which the reports are in
    assert any("require-trusted-types-for" in text for text in watch.problems), watch.problems
    assert any("style-src" in text for text in watch.problems), watch.problems
    watch.allowed.append("policy violation|Content Security Policy|TrustedHTML")


REFUSALS = [
    (400, "context_length_exceeded", {}, "The conversation does not fit any more.", "Start a new chat"),
    (400, "invalid_value", {}, "The server refused the request.", "Check the settings"),
    (403, "forbidden", {}, "The server refuses this address.", "--allow-host 127.0.0.1"),
    (429, "overloaded", {"retry_after_ms": "2300", "Retry_After": "9"}, "The server is busy.", "Try again in 3 s."),
    (503, "not_ready", {"Retry_After": "4"}, "The server is getting ready.", "Try again in 4 s."),
    (503, "engine_unavailable", {}, "The engine does not run any more.", "Restart jilju serve"),
    (500, "internal", {"x_request_id": "req-9"}, "The server made a mistake.", "req-9"),
]


def test_a_refusal_says_what_to_do_and_can_be_tried_again(open_page, stub):
    page, watch = open_page()
    expect(page.locator("#model-name")).to_have_text("stub-1b")  # from here on a body names it
    for status, code, headers, title, advice in REFUSALS:
        watch.allowed.append(f"status of {status}")
        stub.script = partial(refuse, status, code, headers)
        ask(page, code)
        fault = page.locator(".fault")
        expect(fault).to_contain_text(title)
        expect(fault).to_contain_text(advice)
        expect(fault).to_contain_text("given this, allowed <b>that</b>")
        stub.script = say("Fine now")
        fault.get_by_role("button", name="Try again").click()
        expect(answer(page).locator(".text")).to_have_text("Fine now")
        expect(page.locator(".fault")).to_have_count(0)
        assert stub.bodies[-2] == stub.bodies[-1]


def refuse(status: int, code: str, headers: dict[str, str], exchange: Exchange) -> None:
    exchange.refuse(status, code, "given this, allowed <b>that</b>", "max_tokens", **headers)


def test_an_error_in_mid_stream_keeps_what_arrived(open_page, stub):
    def script(exchange: Exchange) -> None:
        exchange.begin()
        exchange.token("Half")
        exchange.fail("nan_logits", "a NaN at position 3")

    stub.script = script
    page, _ = open_page()
    ask(page)
    expect(page.locator(".fault")).to_contain_text("a NaN at position 3")
    expect(answer(page).locator(".text")).to_have_text("Half")
    expect(page.locator(".figure").first).to_have_text("1 out")
    stub.script = say("Whole")
    page.get_by_role("button", name="Try again").click()
    expect(answer(page).locator(".text")).to_have_text("Whole")


@pytest.mark.parametrize("with_done", [False, True])
def test_a_stream_without_finish_reason_and_done_is_not_taken_for_a_whole_answer(open_page, stub, with_done):
    stub.script = lambda exchange: (exchange.begin(), exchange.token("Almost"), with_done and exchange.done())
    page, _ = open_page()
    ask(page)
    expect(page.locator(".fault")).to_contain_text("The answer broke off.")
    expect(answer(page).locator(".text")).to_have_text("Almost")


def test_a_server_that_is_gone_is_said(open_page, stub):
    page, watch = open_page()
    watch.allowed.append("ERR_CONNECTION_REFUSED|ERR_EMPTY_RESPONSE|ERR_CONNECTION_RESET")
    expect(page.locator("#model-name")).to_have_text("stub-1b")
    page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    ask(page)
    expect(page.locator(".fault")).to_contain_text("The server cannot be reached.")
    expect(page.locator(".fault")).to_contain_text(stub.url.removeprefix("http://"))


def test_a_server_that_is_not_ready_is_a_notice_that_can_be_tried_again(open_page, stub):
    page, watch = open_page()
    watch.allowed.append("ERR_CONNECTION_REFUSED")
    page.route("**/v1/models", lambda route: route.abort("connectionrefused"))
    page.reload()
    expect(page.locator("#notice")).to_contain_text("The server cannot be reached.")
    page.unroute("**/v1/models")
    page.locator("#notice").get_by_role("button", name="Try again").click()
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#model-name")).to_have_text("stub-1b")


def test_a_server_with_keys_asks_for_one_and_goes_on(open_page, stub):
    page, watch = open_page()
    watch.allowed.append("status of 401")
    expect(page.locator("#model-name")).to_have_text("stub-1b")
    stub.key = "right"
    ask(page, "Let me in")
    dialog = page.get_by_role("dialog", name="This server asks for a key")
    expect(dialog).to_be_visible()
    dialog.get_by_label("Key").fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("The server does not know this key.")
    dialog.get_by_label("Key").fill("right")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(answer(page).locator(".text")).to_have_text("Hello there.")
    assert page.evaluate("sessionStorage.getItem('jilju.key')") == "right"
    assert page.evaluate("JSON.stringify(localStorage)").find("right") == -1
    page.reload()
    expect(page.locator("#model-name")).to_have_text("stub-1b")
    expect(dialog).to_be_hidden()


def test_a_model_without_declared_defaults_still_works(open_page, stub):
    stub.models = lambda: {"object": "list", "data": [{"id": MODEL["id"], "object": "model"}]}
    page, _ = open_page()
    expect(page.locator("#model-name")).to_have_text("stub-1b")
    sheet = open_settings(page)
    expect(sheet).to_contain_text("Default: the server's")
    expect(page.locator("#in-force")).to_be_hidden()
