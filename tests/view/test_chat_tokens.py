"""The tokens of a message: which ones are shown, how they are joined to characters, and what the template wrote."""

import itertools

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .axe import check_axe
from .stub_server import Exchange, say


def expect(locator):
    from playwright.sync_api import expect as playwright_expect  # at hand only where the browser fixture did not skip

    return playwright_expect(locator)


def ask(page, text: str = "Hi") -> None:
    page.locator("#composer-text").fill(text)
    page.locator("#composer-text").press("Enter")


def show_tokens(message) -> None:
    message.get_by_role("button", name="Tokens").click()


def test_an_answer_is_shown_by_its_own_tokens(open_page, stub):
    stub.vocabulary |= {
        11: "Say",
        12: " \n",
        13: "bytes:\\x20\\xec",
        14: "bytes:\\x84",
        15: "bytes:\\x9c",
        16: "bytes:\\xff",
        17: "",
    }

    def script(exchange: Exchange) -> None:
        exchange.begin()
        exchange.token("Say", 11)
        exchange.token(" \n", 12)
        exchange.token("", 13)
        exchange.token("", 14)
        exchange.token(" 서", 15)
        exchange.token("�", 16)
        exchange.token("", 17)
        exchange.end()

    stub.script = script
    page, _ = open_page()
    ask(page)
    answer = page.locator(".answer")
    show_tokens(answer)
    expect(answer.locator(".tokens-count")).to_have_text("Tokens: 8")
    expect(answer.locator(".token-text")).to_have_text(["Say", "·⏎", "·서", "⟨ff⟩", "∅", "<|im_end|>"])
    expect(answer.locator(".token-id")).to_have_text(["11", "12", "13", "14", "15", "16", "17", "2"])
    joined = answer.locator(".joined")
    expect(joined).to_have_count(1)
    expect(joined.locator(".token-bytes")).to_have_text(["20 ec", "84", "9c"])
    expect(answer.locator(".special")).to_have_text("<|im_end|>2")
    expect(answer.locator(".token-break")).to_have_count(1)
    expect(answer.locator(".text")).to_be_hidden()
    expect(answer.get_by_role("button", name="Tokens")).to_have_attribute("aria-pressed", "true")
    check_axe(page)
    show_tokens(answer)
    expect(answer.locator(".text")).to_be_visible()
    expect(answer.locator(".tokens")).to_be_hidden()


def test_a_question_is_shown_with_what_the_template_wrote_around_it(open_page, stub):
    stub.script = say("Fine", ".")
    page, _ = open_page()
    page.evaluate("localStorage.setItem('jilju.settings', JSON.stringify({ system: 'Be brief' }))")
    page.reload()
    ask(page, "How are")
    expect(page.locator(".ask-again")).to_be_visible()
    ask(page, "And now")
    expect(page.locator(".figures")).to_have_count(2)
    first, second = page.locator(".user").all()
    show_tokens(first)
    wrapped = ["<|im_start|>", "user", "⏎", "How", "·are", "<|im_end|>", "⏎", "<|im_start|>", "assistant", "⏎"]
    system = ["<|im_start|>", "system", "⏎", "Be", "·brief", "<|im_end|>", "⏎"]
    expect(first.locator(".token-text")).to_have_text(system + wrapped)
    expect(first.locator(".tokens-count")).to_have_text("Tokens: 17, of which the model’s template wrote 13")
    texts = first.locator(".token:not(.template, .special) .token-text")
    expect(texts).to_have_text(["Be", "·brief", "How", "·are"])
    show_tokens(second)
    expect(second.locator(".token-text")).to_have_text(
        [
            "<|im_end|>",
            "⏎",
            "<|im_start|>",
            "user",
            "⏎",
            "And",
            "·now",
            "<|im_end|>",
            "⏎",
            "<|im_start|>",
            "assistant",
            "⏎",
        ]
    )


def test_a_long_text_shows_its_tokens_bit_by_bit(open_page, stub):
    stub.script = say(*["word "] * 500)
    page, _ = open_page()
    ask(page)
    answer = page.locator(".answer")
    show_tokens(answer)
    expect(answer.locator(".token")).to_have_count(400)
    answer.get_by_role("button", name="Show the other 101").click()
    expect(answer.locator(".token")).to_have_count(501)
    expect(answer.get_by_role("button", name="Show the other")).to_be_hidden()


def test_an_answer_whose_ids_are_not_known_is_split_anew(open_page, stub):
    page, _ = open_page()
    ask(page)
    expect(page.locator(".ask-again")).to_be_visible()
    page.evaluate(
        """() => { const key = Object.keys(localStorage).find((name) => name.startsWith("jilju.chat."));
          const entry = JSON.parse(localStorage.getItem(key));
          delete entry.messages[1].tokenIds;
          localStorage.setItem(key, JSON.stringify(entry)); }"""
    )
    page.reload()
    stub.posts["/tokenize"] = lambda body: {"tokens": [stub.vocabulary.id_of(body["prompt"])]}
    show_tokens(page.locator(".answer"))
    expect(page.locator(".token-text")).to_have_text(["Hello·there."])


def test_tokens_that_cannot_be_had_are_said_to_be(open_page, stub):
    page, watch = open_page()
    watch.allowed.append("status of 404")
    ask(page)
    expect(page.locator(".ask-again")).to_be_visible()
    del stub.posts["/detokenize"]
    show_tokens(page.locator(".answer"))
    expect(page.locator(".answer .tokens")).to_contain_text("The server refused the request.")
    stub.posts["/detokenize"] = stub._detokenized
    show_tokens(page.locator(".answer"))
    show_tokens(page.locator(".answer"))
    expect(page.locator(".answer .token")).to_have_count(4)


JOIN = """async (tokens) => {
  const { joined } = await import("/view/chat/tokens.js");
  return joined(tokens.map((bytes, id) => ({ id, bytes: Uint8Array.from(bytes) }))).map(({ text, tokens }) => [text, tokens.map(({ id }) => id)]);
}"""


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


texts = st.text(max_size=12).map(str.encode)


@st.composite
def cut_anywhere(draw: st.DrawFn) -> list[bytes]:
    data = draw(st.one_of(texts, st.binary(max_size=12), st.tuples(texts, st.binary(max_size=2), texts).map(b"".join)))
    cuts = sorted(draw(st.sets(st.integers(0, len(data)), max_size=8)) | {0, len(data)})
    return [data[begin:end] for begin, end in itertools.pairwise(cuts)]


def test_tokens_are_joined_to_the_smallest_whole_characters(open_page):
    page, _ = open_page()

    @given(st.lists(cut_anywhere(), min_size=20, max_size=40))
    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    def check(cases: list[list[bytes]]) -> None:
        results = page.evaluate(
            f"async (cases) => {{ const join = {JOIN}; return Promise.all(cases.map(join)); }}",
            [[list(token) for token in case] for case in cases],
        )
        for tokens, groups in zip(cases, results, strict=True):
            assert [token_id for _, ids in groups for token_id in ids] == list(range(len(tokens)))
            for text, ids in groups:
                data = b"".join(tokens[token_id] for token_id in ids)
                if text is not None:
                    assert text.encode("utf-8", "surrogatepass") == data
                    parts = [b"".join(tokens[i] for i in ids[:n]) for n in range(1, len(ids))]
                    assert not any(map(is_text, parts)), "a group that ends earlier would do"
                else:
                    assert not is_text(data)

    check()


def test_the_texts_of_tokens_are_read_as_the_server_writes_them(open_page):
    page, _ = open_page()
    texts = ["a", "서", "bytes:\\xec\\x84", "bytes:", "bytes:\\xzz", ""]
    found = page.evaluate(
        """async (texts) => { const { tokenBytes } = await import("/view/chat/tokens.js");
          return texts.map((text) => [...tokenBytes(text)]); }""",
        texts,
    )
    assert [bytes(data) for data in found] == [b"a", "서".encode(), b"\xec\x84", b"bytes:", b"bytes:\\xzz", b""]
