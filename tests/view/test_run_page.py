"""The page of a run in a real Chromium, with runs made of the contract's own types.

Each test also fails on any console error, policy violation or request that leaves the origin (see conftest.py).
"""

import re
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from jilju.account.time_ledger import KINDS

from .axe import check_axe
from .run_data import (
    ANSWER,
    OTHER_ID,
    RUN_ID,
    Timeline,
    after_engine,
    before_engine,
    chat_prompt,
    cut_run,
    korean_run,
    long_run,
    make_step,
    preempted_run,
    refused_run,
    run_of,
    sequence_of,
    two_answers,
)
from .run_server import RunServer

ANSWER_TEXT = b"".join(ANSWER).decode()


@pytest.fixture
def stub(front) -> Iterator[RunServer]:
    server = RunServer(front)
    yield server
    server.close()


def expect(locator):
    from playwright.sync_api import expect as playwright_expect  # at hand only where the browser fixture did not skip

    return playwright_expect(locator)


def station(page, name: str):
    return page.locator(f"#station-{name}")


def columns_of(page):
    return page.get_by_role("listbox").get_by_role("option")


def wait_until_drawn(page) -> None:
    expect(page.locator(".cell-time")).to_have_count(6)


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"[\d,]+\.?\d*", text)]


# The sum


def test_the_head_says_what_went_in_and_came_out(open_page, stub):
    page, _ = open_page(stub.put(korean_run()))
    expect(page.locator(".summary")).to_have_text(
        "37 tokens went in, 16 of them out of the cache, and 23 came out, in 771 ms."
    )
    expect(page.locator(".state")).to_have_text("completed · the model ended it")
    expect(page.locator(".run-id")).to_have_text(RUN_ID)
    page.locator(".parameters summary").click()
    expect(page.locator(".parameters")).to_contain_text("temperature")


def test_each_kind_of_interval_has_a_name_and_a_station(open_page, stub):
    """A kind that the page does not know would be an error of its own there."""
    page, _ = open_page("/runs")
    named = page.evaluate(
        """async (kinds) => {
          const tables = await Promise.all(["en", "ko"].map((name) => import(`/view/strings.${name}.js`)));
          return kinds.filter((kind) => tables.every(({ STRINGS }) => STRINGS[`kind_${kind}`]));
        }""",
        list(KINDS),
    )
    assert named == list(KINDS)


def test_the_printed_parts_of_the_ledger_sum_to_the_printed_total(open_page, stub):
    run = korean_run()
    page, _ = open_page(stub.put(run))
    cells = page.locator(".cell-time")
    expect(cells).to_have_count(6)
    parts = [numbers(text)[0] for text in cells.all_inner_texts()]
    total = numbers(page.locator(".total strong").inner_text())[0]
    assert round(sum(parts), 1) == total == round(run.total_ms, 1)
    expect(page.locator(".total .sign")).not_to_have_class(re.compile("sign-off"))
    page.locator(".timeline-behind summary").click()
    rows = page.locator(".timeline-behind tbody tr")
    times = [numbers(text)[0] for text in rows.locator("td:nth-child(2)").all_inner_texts()]
    assert round(sum(times[:-1]), 1) == times[-1] == total


def test_the_balance_sign_turns_when_the_intervals_do_not_sum(open_page, stub, front):
    run = korean_run()
    sequence = run.sequences[0]
    short, gap = list(sequence.ledger.intervals), list(sequence.ledger.intervals)
    short[8] = replace(short[8], ms=short[8].ms - 5)
    gap[3:5] = [replace(gap[3], ms=gap[3].ms + 0.05), replace(gap[4], ms=gap[4].ms - 0.05)]
    page, _ = open_page("/runs")
    for ledger in (
        replace(sequence.ledger, intervals=short),
        replace(sequence.ledger, intervals=gap),
        replace(sequence.ledger, is_balanced=False),  # the server's word
    ):
        page.goto(front.url + stub.put(replace(run, sequences=[replace(sequence, ledger=ledger)])))
        expect(page.locator(".total .sign")).to_have_class("sign sign-off")
        expect(page.locator(".total .sign")).to_contain_text("The parts do not sum to the total.")
        expect(page.locator(".timeline-behind [role=alert]")).to_contain_text("does not balance")


def test_the_bar_is_true_to_scale(open_page, stub):
    run = korean_run()
    page, _ = open_page(stub.put(run))
    wait_until_drawn(page)
    boxes = page.evaluate(
        """() => [...document.querySelectorAll(".ledger-bar path")].map((path) =>
             [path.getAttribute("class"), path.getTotalLength(), path.getBBox().x, path.getBBox().width])"""
    )
    prefill = next(interval for interval in run.sequences[0].ledger.intervals if interval.kind == "prefill_own")
    [(_, _, left, width)] = [box for box in boxes if box[0] == "look-prefill"]
    assert left == pytest.approx(prefill.begin_ms, abs=0.01)
    assert width == pytest.approx(prefill.ms, abs=0.01)
    assert page.locator(".ledger-bar").get_attribute("viewBox") == f"0 0 {run.total_ms!r} 1"


# Stations 1 to 4


def test_text_that_the_template_wrote_is_told_from_what_the_messages_say(open_page, stub):
    page, _ = open_page(stub.put(korean_run()))
    wait_until_drawn(page)
    text = station(page, "text")
    assert text.locator(".by-template").all_inner_texts()[0] == "<|im_start|>system↵\n"
    expect(text.locator(".by-role")).to_have_count(2)
    expect(text.locator(".by-role").last).to_contain_text("user: 대한민국의 수도는 어디인가요?")
    expect(text.locator(".lead")).to_contain_text("80 of 161 characters")


def test_tokens_show_ids_cache_and_why_the_match_ended(open_page, stub):
    run = korean_run()
    page, _ = open_page(stub.put(run))
    tokens = station(page, "tokens")
    expect(tokens.locator(".chip")).to_have_count(37)
    expect(tokens.locator(".chip-cached")).to_have_count(16)
    expect(tokens.locator(".chip-special")).to_have_count(5)
    expect(tokens.locator(".chip .token-id").first).to_have_text("151644")
    expect(tokens.locator(".reason")).to_contain_text(
        "the same up to token 24, where it had “서울” and this one has “대한”"
    )
    expect(tokens.locator(".edge")).to_have_count(1)
    tokens.get_by_role("button", name="Show the place").click()
    expect(tokens.locator(".chip-chosen .token-text")).to_have_text("대한")
    expect(tokens.locator(".token-detail")).to_contain_text(
        "bytes eb 8c 80 ed 95 9c · computed in prefill · in block 2"
    )
    page.keyboard.press("ArrowLeft")
    expect(tokens.locator(".chip-chosen .token-text")).to_have_text("↵")
    page.keyboard.press("Home")
    expect(tokens.locator(".token-detail")).to_contain_text("from the cache · in block 1 · special token")


@pytest.mark.parametrize("locale", ["en-US", "ko-KR"])
def test_each_reason_of_a_cache_miss_has_words(open_page, stub, front, locale):
    run = korean_run()
    prompt = run.prompts[0]
    page, _ = open_page("/runs", locale=locale)
    for reason in ("none", "never_seen", "diverged", "evicted", "block_tail", "salt"):
        known = reason == "diverged"
        cache = replace(
            prompt.cache,
            miss_reason=reason,
            first_miss_position=None if reason == "none" else 16,
            earlier_text="서울" if known else None,
            own_text="대한" if known else None,
        )
        page.goto(front.url + stub.put(replace(run, prompts=[replace(prompt, cache=cache)])))
        words = station(page, "tokens").locator(".reason")
        expect(words).to_be_visible()
        assert len(words.inner_text()) > 20
        assert "{" not in words.inner_text()
        assert "[" not in words.inner_text()


def test_waits_name_who_held_what(open_page, stub):
    page, _ = open_page(stub.put(korean_run()))
    wait = station(page, "wait")
    causes = wait.locator(".causes").first.locator("> li")
    link = causes.filter(has_text="waiting for token budget").get_by_role("link")
    expect(link).to_have_attribute("href", f"/runs/{OTHER_ID}")
    expect(causes.filter(has_text="waiting for the running step")).to_contain_text("another key’s run")
    expect(wait.locator(".causes").last).to_contain_text("stalled: budget spent on others")
    expect(wait.locator(".causes").last).to_contain_text("8 prompt tokens, 17 tokens of decode")  # in steps of this run


def test_prefill_is_blocks_as_wide_as_their_tokens(open_page, stub):
    run = long_run(num_prompt=2_048, num_output=8)
    page, _ = open_page(stub.put(run))
    prefill = station(page, "prefill")
    blocks = prefill.locator(".prefill-block")
    expect(blocks).to_have_count(2)
    widths = [box["width"] for box in (blocks.nth(index).bounding_box() for index in range(2))]
    cached = prefill.locator(".prefill-cached").bounding_box()["width"]
    assert widths[0] == pytest.approx(widths[1], rel=0.02)
    assert cached == pytest.approx(sum(widths), rel=0.02)  # 1,024 tokens each
    expect(prefill).to_contain_text("1,024 from the cache + 1,024 computed = 2,048 prompt tokens ✓")
    expect(prefill.locator(".chunk").first).to_contain_text("512 tokens · 3 s · 171 tokens/s · 506 GFLOP")
    expect(prefill.locator(".chunk").first).to_contain_text("of the arithmetic roof")
    prefill.locator(".chunk").nth(1).click()
    expect(page.locator(".step h2")).to_have_text("Step 2 of 9: prefill")
    expect(prefill.locator(".prefill-block").nth(1)).to_have_class(re.compile("chosen"))


def test_a_station_has_the_time_that_the_sum_has(open_page, stub):
    page, _ = open_page(stub.put(korean_run()))
    wait_until_drawn(page)
    in_sum = page.locator(".cell-time").all_inner_texts()
    assert page.locator(".station:not(#station-machine) .station-time").all_inner_texts() == in_sum


def test_prompt_tokens_that_do_not_add_up_are_said(open_page, stub):
    run = korean_run()
    page, _ = open_page(stub.put(replace(run, prompts=[replace(run.prompts[0], num_tokens=40)])))
    expect(station(page, "prefill").locator(".note.fault-text")).to_have_text(
        "16 from the cache + 21 computed ≠ 40 prompt tokens"
    )


# Station 5 and the step


def test_a_column_a_step_and_what_a_chosen_one_says(open_page, stub):
    run = korean_run()
    page, _ = open_page(stub.put(run), viewport={"width": 1440, "height": 900})
    columns = columns_of(page)
    expect(columns.first).to_contain_text("“서울”, made by the last step of prefill")
    expect(columns.first).to_have_attribute("aria-setsize", "23")
    late = columns.nth(7)
    expect(late.locator(".dot")).to_have_count(3)  # two in decode, one in prefill
    expect(late.locator(".look-others")).to_have_count(1)
    late.click()
    expect(late).to_have_attribute("aria-selected", "true")
    panel = page.locator(".step")
    expect(panel.locator("h2")).to_have_text("Step 8 of 23: decode")
    expect(panel).to_contain_text("8 prompt tokens")
    step = run.sequences[0].steps[7]
    expect(panel.locator(".sum")).to_contain_text(f"{step.ms:.2f} ms")
    rows = panel.locator(".figures-table").first.locator("tbody tr")
    times = [numbers(text)[0] for text in rows.locator("td:nth-child(2)").all_inner_texts()]
    assert round(sum(times[:5]), 2) == times[5]
    page.keyboard.press("Tab")  # the row of columns is one stop
    page.get_by_role("listbox").focus()
    page.keyboard.press("ArrowRight")
    expect(panel.locator("h2")).to_have_text("Step 9 of 23: decode")
    panel.get_by_role("button", name="Step before").click()
    expect(panel.locator("h2")).to_have_text("Step 8 of 23: decode")
    expect(panel.get_by_role("button", name="Step before")).to_be_focused()


def test_the_columns_leave_no_time_out(open_page, stub):
    run = korean_run()
    page, _ = open_page(stub.put(run))
    station(page, "decode").locator("summary").click()
    rows = station(page, "decode").locator("tbody tr")
    expect(rows).to_have_count(23)
    parts = page.evaluate(
        """async ([path]) => {
          const { columns } = await import("/view/run/story.js");
          const run = await (await fetch(path)).json();
          return columns(run.sequences[0]).map(({ ms, parts }) => [ms, parts.reduce((sum, part) => sum + part.ms, 0)]);
        }""",
        [f"/v1/jilju/runs/{RUN_ID}"],
    )
    sequence = run.sequences[0]
    assert sum(ms for ms, _ in parts) == pytest.approx(sequence.output[-1].at_ms - sequence.output[0].at_ms, abs=1e-6)
    assert all(whole == pytest.approx(sum_, abs=1e-6) for whole, sum_ in parts)


def test_decode_is_measured_against_memory(open_page, stub, front):
    run = korean_run()
    page, _ = open_page("/runs")
    for share, words in ((0.71, "71% of what memory can give"), (1.1, "so a part was still in the processor's caches")):
        steps = [replace(step, memory_roof_share=share) for step in run.sequences[0].steps]
        page.goto(front.url + stub.put(replace(run, sequences=[replace(run.sequences[0], steps=steps)])))
        expect(station(page, "decode").locator(".lead")).to_contain_text(words)


def test_alternatives_have_probabilities_that_sum_to_one(open_page, stub):
    page, _ = open_page(stub.put(korean_run()))
    rows = page.locator(".alternative")
    expect(rows).to_have_count(6)  # the chosen one, four others, all the rest
    shares = [numbers(text)[-1] for text in rows.locator(".alternative-share").all_inner_texts()]
    assert sum(shares) == pytest.approx(100, abs=1)
    expect(page.locator(".alternative.taken")).to_contain_text("은")
    expect(page.locator(".alternative.rest")).to_contain_text("all others")


def test_without_logprobs_the_page_says_how_to_get_them(open_page, stub):
    page, _ = open_page(stub.put(preempted_run()))
    expect(page.locator(".step")).to_contain_text(
        "Probabilities were not kept, for the call did not ask: logprobs true"
    )
    expect(page.locator(".alternative")).to_have_count(0)


def test_what_was_computed_again_is_in_the_column_that_waited_for_it(open_page, stub):
    page, _ = open_page(stub.put(preempted_run()), viewport={"width": 1440, "height": 900})
    columns = columns_of(page)
    expect(columns).to_have_count(7)
    expect(columns.nth(3).locator(".look-fault")).to_have_count(1)  # computed again
    expect(columns.nth(3).locator(".look-decode")).to_have_count(0)
    expect(columns.nth(3).locator(".look-wait")).to_have_count(1)  # preempted
    expect(columns.nth(5).locator(".look-fault")).to_have_count(1)  # the engine's restart
    expect(page.locator(".meta")).to_contain_text("preempted: 1")
    expect(station(page, "wait")).to_contain_text("engine restart")
    expect(page.locator(".total .sign")).to_have_class("sign")
    page.locator(".step").get_by_role("button", name="Step after").click()
    page.locator(".step").get_by_role("button", name="Step after").click()
    expect(page.locator(".step h2")).to_have_text("Step 4 of 7: computing again")
    expect(page.locator(".step")).to_contain_text("were computed again")


# Stations 6 and 7


def test_tokens_that_make_one_syllable_are_joined(open_page, stub):
    page, _ = open_page(stub.put(korean_run()))
    again = station(page, "again")
    expect(again.locator(".answer-text")).to_have_text(ANSWER_TEXT)
    joined = again.locator(".joined")
    expect(joined).to_have_count(2)
    expect(joined.first.locator(".join-bytes")).to_have_text(["eb b0", "9d"])
    expect(joined.first.locator(".join-text")).to_have_text("밝")
    expect(again.locator(".join").last.locator(".join-text")).to_have_text("<|im_end|>")
    assert "".join(again.locator(".join:not(.no-text) .join-text").all_inner_texts()).replace("·", " ") == ANSWER_TEXT
    joined.first.locator(".join-token").last.click()
    expect(page.locator(".step h2")).to_have_text("Step 10 of 23: decode")


def test_characters_beyond_the_basic_plane_keep_their_places(open_page, stub):
    timeline = Timeline()
    before_engine(timeline)
    prompt = chat_prompt(None, question=["😀".encode(), b" ok"])
    steps = [make_step(timeline, 1, start=0, count=prompt.num_tokens, kind="prefill", ms=150.0)]
    pieces = ["😀".encode()[:2], "😀".encode()[2:], b"!"]
    steps += [
        make_step(timeline, 2 + i, start=prompt.num_tokens + i, count=1, kind="decode", ms=25.0) for i in range(2)
    ]
    after_engine(timeline)
    run = run_of(prompt, [sequence_of(timeline, steps, pieces, with_logprobs=False, end=None)])
    page, _ = open_page(stub.put(run))
    expect(station(page, "again").locator(".join-text")).to_have_text(["😀", "!"])
    expect(station(page, "text").locator(".by-role").last).to_contain_text("😀 ok")


def test_a_step_shows_its_ops_and_they_sum_to_its_time(open_page, stub):
    run = korean_run()
    page, _ = open_page(stub.put(run))
    machine = station(page, "machine")
    expect(machine.locator("tbody tr")).to_have_count(8)
    expect(machine.locator("tbody tr").first).to_contain_text("[3 tokens, 896] x [896, 9728] q4_k")
    expect(machine.locator("tbody tr").first).to_contain_text("memory")
    times = [numbers(text)[0] for text in machine.locator("tr td:nth-child(5)").all_inner_texts()]
    assert round(sum(times[:-1]), 2) == times[-1]
    expect(machine.locator(".roofline")).to_have_attribute("aria-label", re.compile("meet at 9.3 FLOP per byte"))
    station(page, "prefill").locator(".chunk").click()
    expect(machine.locator("tbody tr").first).to_contain_text("[23 tokens, 896] x [896, 9728] q4_k")
    expect(machine.locator("tbody tr").first).to_contain_text("arithmetic")
    columns_of(page).nth(1).click()
    expect(machine.locator("tbody tr").first).to_contain_text("[3 tokens")
    assert stub.asked.count("/v1/jilju/steps/4103") == 1, "the ops of a step were asked for twice"


def test_ops_that_are_gone_are_said_and_the_rest_stays(open_page, stub):
    stub.lost_steps = {4103}
    page, watch = open_page(stub.put(korean_run()))
    watch.allowed.append("404")
    expect(station(page, "machine")).to_contain_text("the ops of this step are gone")
    columns_of(page).nth(2).click()
    expect(station(page, "machine").locator("tbody tr")).to_have_count(8)


def test_a_machine_whose_roofs_are_not_known(open_page, stub):
    run = korean_run()
    machine = replace(run.machine, read_bytes_per_s=None, flops_per_s=None)
    steps = [replace(step, memory_roof_share=None, compute_roof_share=None) for step in run.sequences[0].steps]
    page, _ = open_page(stub.put(replace(run, machine=machine, sequences=[replace(run.sequences[0], steps=steps)])))
    expect(station(page, "machine").locator("tbody tr")).to_have_count(8)
    expect(page.locator(".roofline")).to_have_count(0)
    page.locator('.step [data-term="memory_roof"]').focus()
    expect(page.locator("#term-box")).to_contain_text("was not measured")


# Words


def test_a_word_explains_itself_with_this_runs_numbers_by_keyboard(open_page, stub):
    page, _ = open_page(stub.put(korean_run()))
    word = station(page, "tokens").locator('.lead [data-term="token"]')
    box = page.locator("#term-box")
    station(page, "text").locator(".prompt-text").focus()
    page.keyboard.press("Tab")
    expect(word).to_be_focused()
    expect(box).to_have_text(
        "A token is a piece of text that the model knows as one number; this prompt is 37 tokens for 161 characters."
    )
    expect(word).to_have_attribute("aria-describedby", "term-box")
    page.keyboard.press("Escape")
    expect(box).to_be_hidden()
    page.keyboard.press("Enter")
    expect(box).to_be_visible()
    page.keyboard.press("Tab")
    expect(box).to_have_text(re.compile("^A special token marks structure"))
    page.locator('.step [data-term="kv"]').click()
    expect(box).to_contain_text("the keys and values of 59 tokens, 1.36 MB")


EXPLAIN = """() => [...document.querySelectorAll(".term")].filter((word) => word.checkVisibility()).map((word) => {
  word.focus();
  return document.querySelector("#term-box").textContent;
})"""


@pytest.mark.parametrize("locale", ["en-US", "ko-KR"])
def test_every_word_on_the_page_has_an_explanation(open_page, stub, front, locale):
    page, _ = open_page("/runs", locale=locale)
    for make in (korean_run, preempted_run, refused_run, two_answers):
        page.goto(front.url + stub.put(replace(make(), id=f"chatcmpl-{make.__name__}")))
        expect(page.locator("#station-text .lead")).to_be_visible()
        texts = page.evaluate(EXPLAIN)
        assert len(texts) > 8
        for text in texts:
            assert len(text) > 15
            assert not any(slip in text for slip in ("{", "undefined", "NaN"))
        shown = page.locator("main").inner_text()
        for slip in ("NaN", "undefined", "{", "|term", "\u0001"):
            assert slip not in shown.replace("<|", ""), f"{slip!r} is on the page"


# The moment


def test_the_slider_moves_through_the_run_by_keyboard(open_page, stub):
    page, _ = open_page(stub.put(korean_run()))
    slider = page.get_by_role("slider", name="Moment of the run")
    expect(slider).to_have_attribute("aria-valuetext", "The whole run")
    slider.focus()
    page.keyboard.press("Home")
    expect(slider).to_have_attribute("aria-valuetext", "0 ms: receiving the body")
    expect(station(page, "decode")).to_have_class(re.compile("future"))
    expect(station(page, "again").locator(".answer-text")).to_have_text("")
    for _ in range(4):
        page.keyboard.press("PageUp")
    expect(station(page, "decode")).to_have_class(re.compile("now"))
    expect(station(page, "again").locator(".answer-text")).to_have_text("서울")
    expect(page.locator(".readout")).to_contain_text("ms: ")
    expect(page.locator(".step h2")).to_have_text("Step 1 of 23: prefill")
    page.keyboard.press("Escape")
    expect(slider).to_have_attribute("aria-valuetext", "The whole run")
    expect(station(page, "again").locator(".answer-text")).to_have_text(ANSWER_TEXT)


def test_a_click_on_the_bar_shows_that_moment(open_page, stub):
    run = korean_run()
    page, _ = open_page(stub.put(run))
    wait_until_drawn(page)
    bar = page.locator(".ledger-track").bounding_box()
    prefill = run.sequences[0].steps[0]
    share = (prefill.begin_ms + prefill.ms / 2) / run.total_ms
    page.mouse.click(bar["x"] + bar["width"] * share, bar["y"] + 10)
    expect(page.locator(".readout")).to_have_text(re.compile(r"ms: prefill, step 1$"))
    expect(station(page, "prefill")).to_have_class(re.compile("now"))
    page.get_by_role("button", name="The whole run").click()
    expect(page.locator(".playhead")).to_be_hidden()


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_play_goes_through_the_run_and_ends_with_all_of_it(open_page, stub, motion):
    page, _ = open_page(reduced_motion=motion, path=stub.put(korean_run()))
    page.get_by_label("Pace").select_option("at true speed")
    page.get_by_role("button", name="Play").click()
    expect(page.locator(".playhead")).to_be_visible()
    expect(page.get_by_role("button", name="Play")).to_be_visible()  # the run takes less than a second
    expect(page.locator(".playhead")).to_be_hidden()
    expect(station(page, "again").locator(".answer-text")).to_have_text(ANSWER_TEXT)
    page.get_by_label("Pace").select_option("station by station")
    page.get_by_role("button", name="Play").click()
    expect(station(page, "text")).to_have_class(re.compile("now"))
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    expect(page.locator(".readout")).to_have_text(re.compile("ms: "))


# Several answers, runs in the making, runs that failed


def test_an_answer_of_several_can_be_chosen(open_page, stub):
    page, _ = open_page(stub.put(two_answers()))
    expect(page.get_by_role("button", name="Answer 1")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Answer 2").click()
    expect(station(page, "again").locator(".answer-text")).to_have_text("Seoul is it.")
    expect(page.locator(".total strong")).to_have_text("149.4 ms")
    expect(station(page, "wait")).to_contain_text("another answer of this call")
    expect(page.get_by_role("button", name="Answer 2")).to_be_focused()


def test_a_run_in_the_making_is_followed_to_its_end(open_page, stub):
    run = korean_run()
    path = stub.put(cut_run(run, 5))
    page, _ = open_page(path)
    expect(page.locator(".state")).to_have_text("running")
    expect(station(page, "again").locator(".answer-text")).to_have_text("서울은 대한민국의")
    columns_of(page).nth(3).click()
    page.locator(".station-cell").nth(4).focus()
    stub.put(run)
    expect(page.locator(".state")).to_have_text("completed · the model ended it")
    expect(station(page, "again").locator(".answer-text")).to_have_text(ANSWER_TEXT)
    expect(page.locator(".step h2")).to_have_text("Step 4 of 23: decode")  # the chosen one stays
    expect(page.locator(".station-cell").nth(4)).to_be_focused()
    expect(page.locator("#status")).to_have_text("The run has ended.")
    assert (
        "".join(station(page, "again").locator(".join:not(.no-text) .join-text").all_inner_texts()).replace("·", " ")
        == ANSWER_TEXT
    )


def test_a_run_that_never_reached_a_step(open_page, stub):
    page, _ = open_page(stub.put(refused_run()))
    expect(page.locator(".run-head .fault")).to_contain_text("It ended with 504 deadline_exceeded")
    expect(page.locator(".run-head .fault")).to_contain_text("ask when the server is less busy")
    expect(station(page, "wait")).to_contain_text("waiting for a row")
    expect(station(page, "tokens")).to_contain_text("It was never in a step, so the cache was not asked.")
    expect(station(page, "decode")).to_contain_text("No token was made")
    expect(station(page, "wait")).to_contain_text("waited 2 s and never came into a step")
    expect(station(page, "tokens")).to_contain_text("37 tokens, none computed")
    expect(station(page, "tokens").locator(".chip-computed")).to_have_count(0)
    expect(station(page, "machine")).to_be_hidden()
    expect(page.locator(".step")).to_be_hidden()
    expect(page.locator(".total .sign")).to_have_class("sign")


def test_a_run_without_a_sequence_shows_what_is_known(open_page, stub, front):
    run = replace(refused_run(), sequences=[], prompts=[], created=None, parameters={})
    page, _ = open_page(stub.put(run))
    expect(page.locator(".run-head .fault")).to_contain_text("deadline_exceeded")
    expect(page.locator(".summary")).to_have_text("It was turned away after 2 s, before a token of it was computed.")
    expect(page.locator("#stations")).to_be_hidden()
    page.goto(front.url + stub.put(replace(run, message=None, state="shed", status=429, code="overloaded")))
    expect(page.locator(".run-head .fault")).to_contain_text("It ended with 429 overloaded")
    expect(page.locator(".run-head .fault")).to_contain_text("The caller was told why.")
    page.goto(front.url + stub.put(replace(run, message=None, state="completed", status=200, code=None, ttft_ms=33.0)))
    expect(page.locator(".summary")).to_contain_text("Its text and tokens are not kept")
    expect(page.locator(".figure-row")).to_contain_text("33 ms")
    expect(page.locator(".run-head .fault")).to_have_count(0)


def test_a_run_that_is_not_there_gives_the_recent_ones(open_page, stub):
    stub.put(korean_run())
    stub.put(replace(preempted_run(), id="chatcmpl-2"))
    page, watch = open_page("/runs/chatcmpl-lost")
    watch.allowed.append("404")
    expect(page.locator(".lost")).to_contain_text("There is no run chatcmpl-lost here")
    expect(page.locator(".list-line")).to_have_count(2)
    check_axe(page)
    page.locator(".list-line").first.click()
    expect(page.locator(".run-id")).to_have_text(RUN_ID)


def test_without_an_id_the_recent_runs_are_shown(open_page, stub):
    page, _ = open_page("/runs")
    expect(page.locator("h1")).to_have_text("Recent runs")
    expect(page.locator("#runs")).to_contain_text("No run is kept here.")


def test_a_key_is_asked_for_and_used(open_page, stub):
    stub.key = "open sesame"
    path = stub.put(korean_run())
    page, watch = open_page(path)
    watch.allowed.append("401")
    page.locator("#key-input").fill("open sesame")
    page.locator("#key-input").press("Enter")
    expect(page.locator(".run-id")).to_have_text(RUN_ID)
    expect(station(page, "machine").locator("tbody tr")).to_have_count(8)


def test_the_trace_is_a_file(open_page, stub):
    page, _ = open_page(stub.put(korean_run()))
    with page.expect_download() as download:
        page.get_by_role("button", name="Trace file").click()
    assert download.value.suggested_filename == f"{RUN_ID}.trace.json"


def test_a_server_that_is_gone_is_said(open_page, stub):
    page, watch = open_page(stub.put(cut_run(korean_run(), 3)))
    watch.allowed.append("Failed to load resource|ERR_FAILED")
    expect(page.locator(".state")).to_have_text("running")
    page.route("**/v1/jilju/runs/*", lambda route: route.abort())
    expect(page.locator("#notice .fault-title")).to_have_text("The server cannot be reached.")
    expect(page.locator(".run-id")).to_have_text(RUN_ID)  # what is known stays
    page.unroute("**/v1/jilju/runs/*")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#notice")).to_be_empty()


# Form


def check_fits(page, width: int) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("theme", "locale", "width"), [("light", "en-US", 1440), ("dark", "ko-KR", 390)])
def test_both_themes_are_accessible_and_fit_any_width(open_page, stub, theme, locale, width):
    page, _ = open_page(
        stub.put(korean_run()), viewport={"width": width, "height": 844}, color_scheme=theme, locale=locale
    )
    expect(station(page, "machine").locator("tbody tr")).to_have_count(8)
    check_axe(page)
    assert page.evaluate("document.documentElement.lang") == locale[:2]
    for each in (390, 768, 1440):
        page.set_viewport_size({"width": each, "height": 844})
        check_fits(page, each)


def test_other_runs_are_accessible_and_fit(open_page, stub, front):
    page, _ = open_page("/runs", viewport={"width": 390, "height": 844})
    for make in (preempted_run, two_answers, refused_run):
        page.goto(front.url + stub.put(replace(make(), id=f"chatcmpl-{make.__name__}")))
        expect(page.locator("#station-text .lead")).to_be_visible()
        check_fits(page, 390)
    check_axe(page)


def test_the_time_line_stays_in_sight(open_page, stub):
    page, _ = open_page(stub.put(korean_run()), viewport={"width": 390, "height": 844})
    page.locator(".station-cell").nth(4).click()
    expect(station(page, "decode").locator("h2")).to_be_in_viewport()
    expect(page.locator(".ledger-track")).to_be_in_viewport()
    top = page.locator(".timeline-stick").bounding_box()
    assert station(page, "decode").locator("h2").bounding_box()["y"] >= top["y"] + top["height"]


def test_a_long_run_draws_only_what_is_in_sight(open_page, stub):
    run = long_run()
    page, _ = open_page(stub.put(run), viewport={"width": 390, "height": 844})
    expect(page.locator(".summary")).to_contain_text(
        "4,000 tokens went in, 1,024 of them out of the cache, and 2,000 came out"
    )
    expect(columns_of(page).first).to_have_attribute("aria-setsize", "2000")
    assert page.locator("*").count() < 4_000
    row = page.get_by_role("listbox")
    row.focus()
    page.keyboard.press("End")
    expect(page.locator(".step h2")).to_have_text("Step 2,005 of 2,005: decode")
    expect(page.locator(".col.chosen")).to_be_in_viewport()
    assert columns_of(page).count() < 60
    page.keyboard.press("PageUp")
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".col.chosen")).to_be_in_viewport()
    tokens = station(page, "tokens")
    made = tokens.locator(".chip").count()
    assert made < 1_000
    tokens.locator(".chip-scroll").evaluate("(element) => element.scrollTo(0, element.scrollHeight)")
    expect(tokens.locator(".chip").nth(made)).to_be_attached()
    tokens.get_by_role("button", name="Show the place").click()
    expect(tokens.locator(".chip-chosen")).to_be_in_viewport()
    expect(tokens.locator(".token-detail")).to_contain_text("token 1,025")
    station(page, "decode").locator("summary").click()
    expect(station(page, "decode").locator("tbody tr")).to_have_count(200)
    station(page, "decode").get_by_role("button", name="1,800 more rows").click()
    expect(station(page, "decode").locator("tbody tr")).to_have_count(400)


def test_the_strings_of_both_languages_have_the_same_keys_and_holes(open_page, stub):
    page, _ = open_page("/runs")
    english, korean = page.evaluate(
        """async () => {
          const tables = await Promise.all(["en", "ko"].map((name) => import(`/view/run/strings.${name}.js`)));
          const marks = (text) => [...new Set([...text.matchAll(/\\{\\w+\\}|\\|\\w+\\]/g)].map(([mark]) => mark))].sort();
          return tables.map(({ STRINGS }) => Object.fromEntries(Object.entries(STRINGS).map(([key, text]) => [key, marks(text)])));
        }"""
    )
    assert english == korean
