"""Several conversations: kept in the browser and nowhere else, chosen, deleted and brought back; a question put otherwise."""

import json
import re

from .axe import check_axe
from .stub_server import Exchange, say


def expect(locator):
    from playwright.sync_api import expect as playwright_expect  # at hand only where the browser fixture did not skip

    return playwright_expect(locator)


def ask(page, text: str = "Hi") -> None:
    count = page.locator(".figures").count()
    page.locator("#composer-text").fill(text)
    page.locator("#composer-text").press("Enter")
    expect(page.locator(".figures")).to_have_count(count + 1)


def titles(page):
    return page.locator(".conversation")


def new_chat(page) -> None:
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#empty")).to_be_visible()


def two_conversations(page) -> None:
    ask(page, "The first question")
    new_chat(page)
    ask(page, "Another\n  matter " + "long " * 40)


def test_a_conversation_outlives_a_reload_and_a_new_tab_begins_anew(open_page, stub):
    page, _ = open_page()
    ask(page, "Remember")
    page.reload()
    expect(page.locator(".user .text")).to_have_text("Remember")
    expect(page.locator(".answer .text")).to_have_text("Hello there.")
    expect(page.locator(".figures")).to_contain_text("total 412 ms")
    other = page.context.new_page()
    other.goto(stub.url)
    expect(other.locator("#empty")).to_be_visible()
    expect(titles(other)).to_have_text(["Remember"])
    titles(other).click()
    expect(other.locator(".answer .text")).to_have_text("Hello there.")
    assert [request["messages"][-1]["content"] for request in stub.bodies] == ["Remember"], "nothing was asked again"


def test_conversations_are_listed_by_what_was_asked_and_chosen(open_page, stub):
    page, _ = open_page()
    expect(page.get_by_text("None yet. What you ask begins one.")).to_be_visible()
    two_conversations(page)
    expect(titles(page)).to_have_text([re.compile("^Another matter long"), "The first question"])
    assert titles(page).first.text_content() == ("Another matter " + "long " * 40)[:80]
    expect(titles(page).first).to_have_attribute("aria-current", "true")
    titles(page).last.click()
    expect(page.locator(".user .text")).to_have_text("The first question")
    expect(page.locator("#composer-text")).to_be_focused()
    ask(page, "and on")
    assert [message["content"] for message in stub.bodies[-1]["messages"]] == [
        "The first question",
        "Hello there.",
        "and on",
    ]
    expect(titles(page).first).to_have_text("The first question")
    check_axe(page)


def test_a_conversation_is_deleted_and_brought_back(open_page, stub):
    page, _ = open_page()
    two_conversations(page)
    page.get_by_role("button", name="Delete “Another").click()
    expect(page.locator("#empty")).to_be_visible()
    expect(titles(page)).to_have_text(["The first question"])
    expect(page.locator(".list-undo")).to_contain_text("Deleted “Another matter")
    expect(page.get_by_role("button", name="Undo")).to_be_focused()
    assert "Another" not in page.evaluate("JSON.stringify(localStorage)")
    check_axe(page)
    page.keyboard.press("Enter")
    expect(page.locator(".user .text")).to_contain_text("Another")
    expect(titles(page)).to_have_count(2)
    expect(page.locator(".list-undo")).to_be_hidden()
    page.get_by_role("button", name="Delete “The first question”").click()
    expect(page.locator(".user .text")).to_contain_text("Another")
    page.reload()
    expect(titles(page)).to_have_count(1)


def test_another_conversation_ends_the_answer_in_the_making_and_keeps_what_came(open_page, stub):
    def script(exchange: Exchange) -> None:
        exchange.begin()
        exchange.token("So far")
        exchange.wait("left")
        for _ in range(10_000):
            exchange.token(" and on")

    page, _ = open_page()
    ask(page, "The first question")
    new_chat(page)
    stub.script = script
    page.locator("#composer-text").fill("Go on for ever")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text")).to_have_text("So far")
    titles(page).filter(has_text="The first").click()
    stub.gates["left"].set()
    assert stub.client_left.wait(10), "the page kept the connection of a conversation that was left"
    expect(page.locator(".answer .text")).to_have_text("Hello there.")
    titles(page).filter(has_text="Go on").click()
    expect(page.locator(".answer .text")).to_have_text("So far")
    expect(page.locator(".badge")).to_have_text("Stopped")


def test_a_page_that_goes_in_mid_answer_keeps_what_came(open_page, stub):
    stub.script = lambda exchange: (exchange.begin(), exchange.token("So far"), exchange.wait("reloaded"))
    page, _ = open_page()
    page.locator("#composer-text").fill("Go on")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text")).to_have_text("So far")
    page.reload()
    stub.gates["reloaded"].set()
    expect(page.locator(".answer .text")).to_have_text("So far")
    expect(page.locator(".badge")).to_have_text("Stopped")


def test_two_tabs_see_the_same_list(open_page, stub):
    page, _ = open_page()
    other = page.context.new_page()
    other.goto(stub.url)
    ask(page, "Seen from afar")
    expect(titles(other)).to_have_text(["Seen from afar"])
    titles(other).click()
    ask(other, "Answered there")
    expect(page.locator(".user .text")).to_have_text(["Seen from afar", "Answered there"])
    other.locator(".remove").click()
    expect(titles(page)).to_have_count(0)
    expect(page.locator(".user .text").first).to_have_text("Seen from afar")


def test_what_the_page_kept_for_a_tab_before_becomes_a_conversation(open_page, stub):
    former = {
        "version": 1,
        "messages": [
            {"id": "1", "role": "user", "text": "An old question"},
            {
                "id": "2", "role": "assistant", "text": "An **old** answer", "phase": "done", "outcome": "completed", "finishReason": "stop",
                "error": None, "usage": None, "timings": None, "measured": {"numTokens": 2, "ttftMs": 5, "totalMs": 9}, "numTokens": 2,
            },
        ],
    }  # fmt: skip
    page, _ = open_page()
    page.evaluate("(text) => sessionStorage.setItem('jilju.conversation', text)", json.dumps(former))
    page.reload()
    expect(page.locator(".answer strong")).to_have_text("old")
    expect(page.locator("div.figures")).to_contain_text("2 out")
    expect(titles(page)).to_have_text(["An old question"])
    assert page.evaluate("sessionStorage.getItem('jilju.conversation')") is None


def test_what_is_no_conversation_is_left_out(open_page, stub):
    page, _ = open_page()
    for kept in ("", "{", "[]", "3", '{"version": 2}', '{"version": 9, "messages": []}'):
        page.evaluate(
            """(text) => {
              localStorage.setItem("jilju.chat.1", text);
              sessionStorage.setItem("jilju.open", "1");
              sessionStorage.setItem("jilju.conversation", text);
            }""",
            kept,
        )
        page.reload()
        expect(page.locator("#empty")).to_be_visible()
        expect(titles(page)).to_have_count(0)
    ask(page)
    expect(titles(page)).to_have_text(["Hi"])


def test_used_up_room_is_said_and_deleting_makes_some(open_page, stub):
    page, _ = open_page()
    ask(page, "An early one")
    page.evaluate(
        """() => localStorage.setItem("jilju.chat.big",
          JSON.stringify({ version: 2, title: "Big", changedAt: 1, messages: [], pad: "x".repeat(4_000_000) }))"""
    )
    page.reload()
    ask(page, "One more")
    expect(page.locator("#notice")).to_contain_text("room for conversations is used up")
    page.get_by_role("button", name="Delete “Big”").click()
    expect(page.locator("#notice")).to_be_hidden()
    page.reload()
    expect(page.locator(".user .text")).to_have_text(["An early one", "One more"])


def test_a_narrow_screen_has_the_list_in_a_sheet(open_page, stub):
    page, _ = open_page(viewport={"width": 390, "height": 844})
    expect(page.locator("#list-aside")).to_be_hidden()
    two_conversations(page)
    toggle = page.get_by_role("button", name="Conversations")
    toggle.click()
    sheet = page.get_by_role("dialog", name="Conversations")
    expect(sheet).to_be_visible()
    check_axe(page)
    sheet.get_by_role("button", name="The first question", exact=True).click()
    expect(sheet).to_be_hidden()
    expect(page.locator(".user .text")).to_have_text("The first question")
    toggle.click()
    page.keyboard.press("Escape")
    expect(sheet).to_be_hidden()
    page.set_viewport_size({"width": 1280, "height": 800})
    expect(titles(page)).to_have_count(2)


def test_a_wide_screen_can_do_without_the_list(open_page, stub):
    page, _ = open_page()
    toggle = page.get_by_role("button", name="Conversations")
    expect(toggle).to_have_attribute("aria-expanded", "true")
    toggle.click()
    expect(page.locator("#list-aside")).to_be_hidden()
    page.reload()
    expect(toggle).to_have_attribute("aria-expanded", "false")
    toggle.click()
    page.reload()
    expect(page.locator("#list-aside")).to_be_visible()


# Questions put otherwise


def test_a_question_is_edited_and_asked_anew_from_there(open_page, stub):
    page, _ = open_page()
    for text in ("first", "second", "third"):
        ask(page, text)
    page.locator(".user").nth(1).get_by_role("button", name="Edit").click()
    field = page.get_by_role("textbox", name="Your message")
    expect(field).to_be_focused()
    expect(field).to_have_value("second")
    check_axe(page)
    stub.script = say("Otherwise.")
    field.fill("second, but better")
    field.press("Enter")
    expect(page.locator(".answer .text").last).to_have_text("Otherwise.")
    expect(page.locator(".user .text")).to_have_text(["first", "second, but better"])
    contents = [message["content"] for message in stub.bodies[-1]["messages"]]
    assert contents == ["first", "Hello there.", "second, but better"]
    page.reload()
    expect(page.locator(".user .text")).to_have_text(["first", "second, but better"])


def test_an_edit_that_is_given_up_or_changes_nothing_asks_nothing(open_page, stub):
    page, _ = open_page()
    ask(page, "as it is")
    edit = page.get_by_role("button", name="Edit")
    for leave in ("Escape", "Enter"):
        edit.click()
        page.keyboard.press(leave)
        expect(page.locator(".user .text")).to_have_text("as it is")
        expect(edit).to_be_focused()
    edit.click()
    page.keyboard.type(" or not")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".user .text")).to_have_text("as it is")
    assert len(stub.bodies) == 1


def test_nothing_is_edited_while_an_answer_comes(open_page, stub):
    stub.script = lambda exchange: (exchange.begin(), exchange.token("On"), exchange.wait("end"), exchange.end())
    page, _ = open_page()
    page.locator("#composer-text").fill("Hi")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text")).to_have_text("On")
    expect(page.get_by_role("button", name="Edit")).to_be_hidden()
    stub.gates["end"].set()
    expect(page.get_by_role("button", name="Edit")).to_be_visible()
