"""Markdown of answers: what it looks like, that it keeps up with a stream, and that no text does anything but be read."""

import pytest

from .payloads import HEAVY, PAYLOADS
from .stub_server import Exchange, say


def expect(locator):
    from playwright.sync_api import expect as playwright_expect  # at hand only where the browser fixture did not skip

    return playwright_expect(locator)


def ask(page, text: str = "Hi") -> None:
    page.locator("#composer-text").fill(text)
    page.locator("#composer-text").press("Enter")


def text_of(page):
    return page.locator(".answer .text").last


RICH = """# Title

A *soft* and a **strong** word, `code`, ~~gone~~, a [link](https://example.invalid/a?b=1&c=2) and 1 < 2 & 3.
Second line<br>third

1. one
2. two
   - inner

- [x] done
- [ ] open

> said

```python
if a < b:
    print("&amp;")
```

| City | People |
|---|--:|
| 서울<br>부산 | 9 |

![a chart](https://example.invalid/x.png) <b>not bold</b>
"""


def test_markdown_becomes_elements(open_page, stub):
    stub.script = say(*[RICH[at : at + 7] for at in range(0, len(RICH), 7)])
    page, _ = open_page()
    ask(page)
    expect(page.locator(".ask-again")).to_be_visible()
    text = text_of(page)
    expect(text.locator("h3")).to_have_text("Title")
    expect(text.locator("em")).to_have_text("soft")
    expect(text.locator("strong")).to_have_text("strong")
    expect(text.locator("del")).to_have_text("gone")
    expect(text.locator("p > code")).to_have_text("code")
    expect(text.locator("ol > li")).to_have_count(2)
    expect(text.locator("ol ul li")).to_have_text("inner")
    expect(text.get_by_text("☑ done")).to_be_visible()
    expect(text.locator("blockquote")).to_have_text("said")
    expect(text.locator("td").first).to_have_text("서울부산")
    expect(text.locator("td br")).to_have_count(1)
    expect(text.locator("td").last).to_have_attribute("align", "right")
    assert text.locator("figure code").text_content() == 'if a < b:\n    print("&amp;")\n'
    expect(text.locator(".code-language")).to_have_text("python")
    expect(text).to_contain_text("1 < 2 & 3.")
    expect(text).to_contain_text("a chart (https://example.invalid/x.png) <b>not bold</b>")
    link = text.get_by_role("link", name="link", exact=True)
    expect(link).to_have_attribute("href", "https://example.invalid/a?b=1&c=2")
    expect(link).to_have_attribute("rel", "noopener noreferrer nofollow")
    expect(link).to_have_attribute("target", "_blank")


def test_a_question_is_plain_text(open_page, stub):
    page, _ = open_page()
    ask(page, "**not strong** <b>&amp;</b>\n\n# no title")
    expect(page.locator(".ask-again")).to_be_visible()
    assert page.locator(".user .text").text_content() == "**not strong** <b>&amp;</b>\n\n# no title"


def test_an_answer_and_its_code_can_be_copied(open_page, stub):
    stub.script = say("Run **this**:\n\n", "```sh\nls -l\n```")
    page, _ = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page)
    clipboard = "navigator.clipboard.readText()"
    page.locator(".copy-code").click()
    expect(page.locator(".copy-code")).to_have_text("Copied")
    assert page.evaluate(clipboard) == "ls -l\n"
    page.locator(".answer .message-actions").get_by_role("button", name="Copy", exact=True).click()
    expect(page.locator(".answer .message-actions")).to_contain_text("Copied")
    assert page.evaluate(clipboard) == "Run **this**:\n\n```sh\nls -l\n```"


def test_copying_works_where_the_page_has_no_right_to_the_clipboard(open_page, stub):
    page, _ = open_page()
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.evaluate("document.addEventListener('copy', () => { window.copied = String(document.activeElement.value); })")
    ask(page)
    page.locator(".answer .message-actions").get_by_role("button", name="Copy", exact=True).click()
    expect(page.locator(".answer .message-actions")).to_contain_text("Copied")
    assert page.evaluate("window.copied") == "Hello there."


def test_what_is_finished_is_not_drawn_again(open_page, stub):
    def script(exchange: Exchange) -> None:
        exchange.begin()
        exchange.token("First block.\n\n```js\nlet a")
        exchange.wait("marked")
        exchange.token(" = 1;\n")
        exchange.token("let b;\n```\n\nLast [block][1].\n\n")
        exchange.wait("seen")
        exchange.token("[1]: https://example.invalid/late\n")
        exchange.end()

    stub.script = script
    page, _ = open_page()
    ask(page)
    expect(page.locator(".code-language")).to_have_text("js")
    page.evaluate("document.querySelectorAll('.answer .text > *').forEach((element) => { element.dataset.old = '1'; })")
    stub.gates["marked"].set()
    expect(text_of(page)).to_contain_text("Last [block][1].")
    assert page.locator("[data-old]").evaluate_all("nodes => nodes.map((node) => node.tagName)") == ["P", "FIGURE"]
    assert page.locator("figure code").text_content() == "let a = 1;\nlet b;\n"
    stub.gates["seen"].set()
    expect(text_of(page).get_by_role("link", name="block")).to_have_attribute("href", "https://example.invalid/late")
    expect(text_of(page)).not_to_contain_text("example.invalid")


# Draws a text as a stream would, a frame a piece, and compares with the same text drawn at once.
STREAMED = """async ({ text, cuts }) => {
  const { createAnswerText } = await import("/view/chat/answer_text.js");
  const words = { t: (key) => key };
  window.requestAnimationFrame = (act) => setTimeout(act, 0);
  performance.now = () => 0; // every drawing takes no time, so none is put off
  const [grown, whole] = [0, 1].map(() => document.body.appendChild(document.createElement("div")));
  const written = createAnswerText({ root: grown, words });
  for (const cut of cuts) {
    written.grow(text.slice(0, cut));
    await new Promise((resolve) => requestAnimationFrame(resolve));
  }
  written.finish(text);
  createAnswerText({ root: whole, words }).finish(text);
  const [a, b] = [grown.innerHTML, whole.innerHTML];
  grown.remove(); whole.remove();
  return a === b ? "" : `${a}\\n---\\n${b}`;
}"""

ODD = "a\r\nb\r\n\r\n\tcode\n\n\n\tmore\n\nText\n===\n\n- x\n\n- y\n\n  z\n1. n\n\n***\n\n~~~\nopen\n\n\n```\n\nstill"


@pytest.mark.parametrize("text", [RICH, ODD], ids=["rich", "odd"])
def test_a_text_drawn_as_it_grows_is_the_text_drawn_at_once(open_page, text):
    page, _ = open_page()
    assert page.evaluate(STREAMED, {"text": text, "cuts": list(range(1, len(text)))}) == ""


# Counts the characters that are read as Markdown while a long text grows a block at a time.
READ = """async ({ num, block }) => {
  const { Lexer } = await import("/view/vendor/marked.esm.js");
  const { createAnswerText } = await import("/view/chat/answer_text.js");
  let numRead = 0;
  window.requestAnimationFrame = (act) => setTimeout(act, 0);
  performance.now = () => 0;
  const { blockTokens } = Lexer.prototype;
  Lexer.prototype.blockTokens = function (source, ...rest) { numRead += source.length; return blockTokens.call(this, source, ...rest); };
  const root = document.body.appendChild(document.createElement("div"));
  const written = createAnswerText({ root, words: { t: (key) => key } });
  let text = "";
  for (let i = 0; i < num; i++) {
    text += block;
    written.grow(text);
    await new Promise((resolve) => requestAnimationFrame(resolve));
  }
  written.finish(text);
  root.remove();
  Lexer.prototype.blockTokens = blockTokens;
  return numRead / text.length;
}"""


def test_the_work_for_a_long_answer_grows_with_its_length_only(open_page):
    page, _ = open_page()
    block = "A paragraph of an answer that goes on.\n\n"
    num_reads = page.evaluate(READ, {"num": 100, "block": block})
    assert 1 <= num_reads < 4, f"each character is read {num_reads:.1f} times; read anew for every block it would be 50"


# Shows every payload by the page's own way, or by the sanitizer alone, then looks at what stands there.
SHOW = """async ({ payloads, bare }) => {
  const { lex, render, sanitize } = await import("/view/chat/markdown.js");
  const words = { t: (key) => key };
  const root = document.querySelector("#messages");
  root.hidden = false;
  for (const payload of payloads) {
    if (bare) for (const html of [payload, `<p>${payload}</p>`, `<a href="${payload}">x</a>`, `<code class="${payload}">x</code>`])
      root.append(sanitize(html, words));
    else for (const block of lex(payload)) root.append(render(block, words));
  }
  await new Promise((resolve) => setTimeout(resolve, 100)); // what would load or run has had its time
  const allowed = new Set("A BLOCKQUOTE BR BUTTON CODE DEL DIV EM FIGCAPTION FIGURE H3 H4 H5 H6 HR LI OL P PRE SPAN STRONG TABLE TBODY TD TH THEAD TR UL".split(" "));
  const names = /^(align|aria-label|class|href|rel|role|start|tabindex|target|title|type)$/;
  const wrong = [];
  for (const element of root.querySelectorAll("*")) {
    if (!allowed.has(element.tagName)) wrong.push(element.outerHTML);
    for (const { name, value } of element.attributes) {
      if (!names.test(name) || (name === "href" && !/^(https?|mailto):/.test(value))) wrong.push(`${name}=${value}`);
      if (name === "class" && !/^(code|code-head|code-language|quiet copy-code|table-frame)$/.test(value)) wrong.push(value);
    }
  }
  for (const link of root.querySelectorAll("a"))
    if (link.rel !== "noopener noreferrer nofollow" || link.target !== "_blank") wrong.push(link.outerHTML);
  return { wrong, pwned: globalThis.pwned, num: root.querySelectorAll("*").length };
}"""


@pytest.mark.parametrize("bare", [False, True], ids=["the page's way", "the sanitizer alone"])
def test_no_hostile_text_runs_or_loads_anything(open_page, stub, bare):
    assert len(PAYLOADS) == len(set(PAYLOADS)) >= 100
    page, watch = open_page()
    dialogs, requests = [], []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    expect(page.locator("#model-name")).to_have_text("stub-1b")
    page.evaluate("import('/view/chat/markdown.js')")
    page.on("request", lambda request: requests.append(request.url))
    found = page.evaluate(SHOW, {"payloads": PAYLOADS, "bare": bare})
    assert found["wrong"] == [] and found["pwned"] is None
    assert found["num"] > 100, "the payloads were not shown at all"
    assert (dialogs, requests) == ([], [])
    if bare:  # of a text that is only taken apart, the browser says what it would not have let it do
        watch.allowed.append("policy violation: (script-src-attr|style-src-attr|style-src-elem|base-uri) ")
        watch.allowed.append("violates the following Content Security Policy .* has been blocked")


def test_an_answer_of_hostile_texts_is_harmless_as_it_streams(open_page, stub):
    whole = "\n\n".join(PAYLOADS)
    stub.script = say(*[whole[at : at + 97] for at in range(0, len(whole), 97)])
    page, _ = open_page()
    dialogs, requests = [], []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    expect(page.locator("#model-name")).to_have_text("stub-1b")
    page.on("request", lambda request: requests.append(request.url.removeprefix(stub.url)))
    ask(page, "Say it all")
    expect(page.locator(".ask-again")).to_be_visible()
    assert page.evaluate("globalThis.pwned") is None
    forbidden = "script, img, svg, iframe, object, embed, style, link, form, input, video, audio, base, meta, math"
    assert text_of(page).locator(forbidden).count() == 0
    assert text_of(page).locator("*").count() > 100
    assert (dialogs, requests) == ([], ["/v1/chat/completions"])


def test_texts_that_are_hard_to_read_are_shown_all_the_same(open_page):
    page, _ = open_page()
    lengths = page.evaluate(
        """async (texts) => {
          const { createAnswerText } = await import("/view/chat/answer_text.js");
          return texts.map((text) => {
            const root = document.createElement("div");
            createAnswerText({ root, words: { t: (key) => key } }).finish(text);
            return root.textContent.length;
          });
        }""",
        HEAVY,
    )
    assert all(length > 0 for length in lengths[:4]), lengths


def test_a_link_opens_when_clicked_and_tells_nothing_of_this_page(open_page, stub):
    stub.script = say("See [there](https://example.invalid/page).")
    page, watch = open_page(alone=True)
    seen = []
    page.context.route(
        "https://example.invalid/**", lambda route: (seen.append(route.request.headers), route.fulfill(body="there"))
    )
    ask(page)
    expect(page.locator(".ask-again")).to_be_visible()
    assert seen == []
    with page.context.expect_page() as opened:
        text_of(page).get_by_role("link", name="there").click()
    opened.value.wait_for_load_state()
    assert opened.value.evaluate("window.opener") is None
    assert len(seen) >= 1 and "referer" not in seen[0]
    assert watch.foreign == []
