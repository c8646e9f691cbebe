"""The engine page in a real Chromium, against a server whose engine is made up and whose time a test moves on.

What the page shows is compared with the frame it was sent, which is of the real wire types. Each test also fails on any console
error, policy violation or request that leaves the origin (see conftest.py).
"""

import json
import random
import re
from collections.abc import Iterator

import msgspec
import pytest

from jilju.account.frame import Owned

from .axe import check_axe
from .engine_stub import EngineStub
from .frame_data import FIRST_MS, World, empty_frame

VIEWPORT = {"width": 1440, "height": 1000}


def expect(locator):
    from playwright.sync_api import expect as playwright_expect  # at hand only where the browser fixture did not skip

    return playwright_expect(locator)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture
def stub(front, world) -> Iterator[EngineStub]:
    server = EngineStub(front, world)
    server.now_ms = world.busy_ms
    yield server
    server.close()


@pytest.fixture
def engine(open_page, stub):
    """engine(**context options) -> the page with its first frame drawn."""

    def open_(**options):
        page, watch = open_page("/engine", **({"viewport": VIEWPORT} | options))
        expect(page.locator("#tile-streams .tile-value")).to_be_visible()
        page.watch = watch
        return page

    return open_


def slider(page):
    return page.locator("#rewind")


def held(page):
    return page.locator("#inspector")


def middle(step) -> float:
    return step.begin_ms + step.ms / 2


def step_at(world: World, ms: float):
    return next(step for step in reversed(world.steps) if step.begin_ms <= ms)


def after(step) -> float:
    """The moment that the page asks for: the log has a step from its end on."""
    return step.end_ms + 0.002


def click_step(page, stub: EngineStub, step) -> None:
    """Zooms to the last second and presses the middle of a step that lies in it."""
    page.get_by_role("radio", name="1 s").check()
    box = page.locator(".timeline-canvas").bounding_box()
    share = 1 - (stub.now_ms - middle(step)) / 1000
    page.mouse.click(box["x"] + share * box["width"], box["y"] + 270)


# The present


def test_the_first_frame_fills_tiles_and_state(engine, stub):
    page = engine()
    frame = stub.world.frame(stub.now_ms)
    expect(page.locator("#model-name")).to_have_text(frame.model)
    expect(page.locator("#engine-state")).to_have_text("Ready")
    expect(page.locator(".facts")).to_have_text(re.compile(r"jilju 0\.6\.0 · avx512-vnni · 2 threads · up 2 min \d+ s"))
    expect(page.locator("#tile-streams")).to_contain_text(f"{frame.tiles.streams}{frame.tiles.waiting} waiting")
    expect(page.locator("#tile-output .tile-value")).to_have_text(f"{frame.tiles.output_tokens_per_s:.0f} /s")
    expect(page.locator("#tile-ttft .tile-value")).to_have_text(f"{frame.tiles.ttft_ms.p50:.0f} ms")
    expect(page.locator("#tile-ttft")).to_contain_text("limit 1 s")
    expect(page.locator("#tile-gap .tile-value")).to_have_text(f"{frame.tiles.gap_ms.p50:.1f} ms")
    expect(page.locator("#tile-memory_roof .tile-value")).to_have_text(f"{frame.tiles.memory_roof_share:.0%}")
    expect(page.locator("#tile-kv")).to_contain_text(f"{frame.blocks.held} of 640 blocks")
    expect(page.locator("#tile-prediction .tile-value")).to_have_text(f"±{frame.tiles.prediction_error:.1%}")
    expect(page.locator("#live")).to_have_text("Live")
    assert stub.asked == ["/v1/jilju/events?seconds=60"]


def test_each_frame_moves_the_page_on_and_the_window_stays_a_minute(engine, stub, world):
    page = engine()
    for _ in range(3):
        stub.advance(600)
    frame = world.frame(stub.now_ms)
    expect(page.locator("#tile-streams")).to_contain_text(f"{frame.tiles.waiting} waiting")
    expect(page.locator(".timeline-canvas")).to_have_attribute("aria-valuemax", str(len(frame.steps.serial) - 1))
    expect(page.locator(".when b")).to_have_text(
        page.evaluate("(ms) => new Date(ms).toTimeString().slice(0, 8)", frame.unix_ms)
    )


def test_a_frame_is_drawn_once_and_nothing_is_drawn_between_frames(engine, stub):
    page = engine()
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.evaluate(
        """() => {
          window.draws = 0;
          const clear = CanvasRenderingContext2D.prototype.clearRect;
          CanvasRenderingContext2D.prototype.clearRect = function (...box) { draws += 1; return clear.apply(this, box); };
        }"""
    )
    for count in (1, 2, 3):
        stub.advance(300)
        page.wait_for_function("(count) => draws === count", arg=count)
    page.evaluate("() => new Promise((done) => setTimeout(done, 300))")
    assert page.evaluate("draws") == 3


def test_a_long_run_keeps_the_page_small(engine, stub, world):
    stub.now_ms = world.until_ms - 60_000
    page = engine()
    for _ in range(50):
        stub.advance(1000)
    expect(page.locator(".timeline-canvas")).to_have_attribute(
        "aria-valuemax", str(len(world.frame(stub.now_ms).steps.serial) - 1)
    )
    assert len(world.frame(stub.now_ms).steps.serial) > 3000
    assert page.evaluate("document.querySelectorAll('*').length") < 1500


def test_what_has_focus_keeps_it_as_frames_come(engine, stub):
    page = engine()
    run = next(row.run for row in reversed(stub.world.frame(stub.now_ms).running) if row.run)
    link = page.locator(f"#streams a[href='/runs/{run}']")
    link.focus()
    stub.advance(200)
    stub.advance(200)
    numbers = stub.world.frame(stub.now_ms).steps.serial
    expect(page.locator(".timeline-canvas")).to_have_attribute("aria-valuemax", str(len(numbers) - 1))
    expect(link).to_be_focused()


def test_frames_are_not_read_out(engine, stub):
    page = engine()
    expect(page.locator("#status")).to_be_empty()
    stub.advance()
    stub.advance()
    expect(page.locator("#status")).to_be_empty()
    live = page.evaluate(
        "() => [...document.querySelectorAll('[aria-live], [role=status], [role=alert], [role=log]')].filter((e) => e.checkVisibility()).map((e) => e.id)"
    )
    assert live == ["status"]


# The timeline

COLOURS_BY_LANE = """
(lanes) => {
  const canvas = document.querySelector(".timeline-canvas");
  const scale = canvas.width / canvas.clientWidth;
  const pixel = (name) => {
    const probe = document.createElement("i");
    probe.style.color = `var(${name})`;
    document.body.append(probe);
    const ctx = new OffscreenCanvas(1, 1).getContext("2d");
    ctx.fillStyle = getComputedStyle(probe).color;
    probe.remove();
    ctx.fillRect(0, 0, 1, 1);
    return ctx.getImageData(0, 0, 1, 1).data.slice(0, 3).join();
  };
  const wanted = { prefill: pixel("--prefill"), decode: pixel("--decode"), host: pixel("--host"), wait: pixel("--wait"), ink: pixel("--ink") };
  return lanes.map(([top, height]) => {
    const { data } = canvas.getContext("2d").getImageData(0, top * scale, canvas.width, height * scale);
    const counts = Object.fromEntries(Object.keys(wanted).map((name) => [name, 0]));
    for (let at = 0; at < data.length; at += 4) {
      const colour = data.slice(at, at + 3).join();
      for (const name in wanted) if (data[at + 3] === 255 && wanted[name] === colour) counts[name] += 1;
    }
    return counts;
  });
}
"""
LANES = [[46, 80], [128, 46], [234, 80], [350, 24]]  # prefill, decode, time, waiting


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_prefill_goes_up_decode_down_and_predictions_are_lines(engine, color_scheme):
    page = engine(color_scheme=color_scheme)
    page.wait_for_function("document.querySelector('.timeline-canvas').width > 400")
    prefill, decode, time, waiting = page.evaluate(COLOURS_BY_LANE, LANES)
    assert prefill["prefill"] > 1000 and prefill["decode"] == 0
    assert decode["decode"] > 1000 and decode["prefill"] == 0
    assert min(time["prefill"], time["decode"], time["host"], time["ink"]) > 100
    assert waiting["wait"] > 100 and waiting["prefill"] == 0


def test_the_canvas_follows_the_theme(engine):
    page = engine(color_scheme="light")
    page.wait_for_function("document.querySelector('.timeline-canvas').width > 400")
    page.get_by_role("button", name="Switch to the dark theme").click()
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.evaluate(COLOURS_BY_LANE, LANES)[0]["prefill"] > 1000, "drawn again in the other theme's amber"


def test_pointing_at_a_step_tells_of_it(engine, stub):
    page = engine()
    step = step_at(stub.world, stub.now_ms - 300)
    page.get_by_role("radio", name="1 s").check()
    box = page.locator(".timeline-canvas").bounding_box()
    x = box["x"] + (1 - (stub.now_ms - middle(step)) / 1000) * box["width"]
    page.mouse.move(x, box["y"] + 270)
    tip = page.locator(".timeline-stage .tip")
    expect(tip).to_contain_text(f"Step {step.serial:,}")
    expect(tip).to_contain_text(f"{step.prefill} prefill + {step.decode} decode tokens, {len(step.running)} rows")
    page.mouse.move(x, box["y"] - 40)
    expect(tip).to_be_hidden()


def test_marks_stand_on_the_timeline_and_in_the_list(engine, stub):
    page = engine()
    marks = stub.world.frame(stub.now_ms).marks
    expect(page.locator("#marks .mark")).to_have_count(len(marks))
    expect(page.locator("#marks .mark").first).to_contain_text("past its deadline")
    expect(page.locator("#marks .mark").first.locator("a")).to_have_attribute("href", "/runs/chatcmpl-0061b7c2")
    box = page.locator(".timeline-canvas").bounding_box()
    restart = next(mark for mark in marks if mark.kind == "restart")
    x = box["x"] + (1 - (stub.now_ms - restart.at_ms) / 60_000) * box["width"]
    page.mouse.move(x, box["y"] + 12)
    expect(page.locator(".timeline-stage .tip")).to_contain_text("the engine was started again")


def test_the_table_of_steps_is_the_timeline_in_figures(engine, stub):
    page = engine()
    page.locator("#steps-table summary").click()
    last = stub.world.frame(stub.now_ms).steps
    row = page.locator("#steps-table tbody tr").first
    expect(page.locator("#steps-table tbody tr")).to_have_count(25)
    expect(row.get_by_role("button")).to_have_text(f"{last.serial[-1]:,}")
    cells = row.locator("td").all_text_contents()[-4:]
    assert cells == [
        str(last.prefill_tokens[-1]),
        str(last.decode_tokens[-1]),
        str(last.rows[-1]),
        str(last.waiting[-1]),
    ]
    row.get_by_role("button").click()
    expect(held(page)).to_contain_text(f"Step {last.serial[-1]:,}")


# A step, held


def test_a_pressed_step_is_held_with_its_rows_and_everything_shows_its_moment(engine, stub):
    page = engine()
    stub.wait_for("opened")
    step = step_at(stub.world, stub.now_ms - 450)
    click_step(page, stub, step)
    stub.wait_for("closed")
    expect(held(page)).to_contain_text(f"Step {step.serial:,}")
    assert float(stub.windows()[-1]["end_ms"]) == pytest.approx(after(step), abs=1e-4)
    expect(held(page).locator(".step-row")).to_have_count(len(step.running))
    for row in step.running:
        if row.run:
            expect(held(page).locator(f"a[href='/runs/{row.run}']")).to_be_visible()
    error = (step.predicted_ms - step.ms) / step.ms
    sign = "+" if error > 0 else "−"
    expect(held(page)).to_contain_text(re.compile(rf"predicted, {re.escape(sign)}[\d.]+% against what was measured"))
    share = step.host_ms / step.ms
    expect(held(page)).to_contain_text(re.compile(rf"on the host \({share * 100:.1f}%\)|on the host \({share:.0%}\)"))
    why = "all rows were taken" if step.waiting else "Nobody waited."
    expect(held(page).locator(".step-why")).to_contain_text(why)
    frame = stub.world.frame(after(step))
    expect(page.locator("#tile-streams")).to_contain_text(f"{frame.tiles.waiting} waiting")
    expect(page.locator("#live")).to_have_text("Back to live")


def test_the_aim_of_a_step_with_a_prompt_is_a_dashed_line_beside_its_time(engine, stub):
    page = engine()
    step = next(step for step in reversed(stub.world.steps) if step.prefill and step.begin_ms < stub.now_ms - 50)
    click_step(page, stub, step)
    expect(held(page).locator(".step-row")).to_have_count(len(step.running))
    expect(held(page)).to_contain_text("aim: 40 ms at most")
    top = max(step.ms, step.predicted_ms, 40) * 1.02
    picture = held(page).locator(".against").bounding_box()
    for name, ms in (("predicted", step.predicted_ms), ("bound", 40)):
        line = held(page).locator(f".line-{name}").bounding_box()
        assert line["x"] - picture["x"] == pytest.approx(ms / top * picture["width"], abs=2)
    host, run = (piece.bounding_box()["width"] for piece in held(page).locator(".against .piece").all())
    assert host == pytest.approx(step.host_ms / top * picture["width"], abs=1)
    assert run == pytest.approx(step.run_ms / top * picture["width"], abs=1)


def test_the_operations_of_a_step_come_when_asked_for(engine, stub):
    page = engine()
    step = step_at(stub.world, stub.now_ms - 450)
    click_step(page, stub, step)
    assert not [path for path in stub.asked if "/steps/" in path]
    held(page).get_by_role("button", name="Operations of this step").click()
    expect(held(page).locator(".ops-table tbody tr")).to_have_count(4)
    expect(held(page).locator(".ops-table tbody tr").first).to_contain_text("[9 tokens, 896] x [896, 9728] Q4_K")
    assert stub.asked[-1] == f"/v1/jilju/steps/{step.serial}"
    expect(held(page).get_by_role("region")).to_be_focused()
    held(page).get_by_role("button", name="The step after").click()
    expect(held(page)).to_contain_text(f"Step {step.serial + 1:,}")
    expect(held(page).locator(".ops-table")).to_have_count(0)


def test_a_held_step_is_let_go_of_with_escape_and_the_present_comes_back(engine, stub):
    page = engine()
    stub.wait_for("opened")
    click_step(page, stub, step_at(stub.world, stub.now_ms - 450))
    stub.wait_for("closed")
    expect(held(page)).to_be_visible()
    page.keyboard.press("Escape")
    expect(held(page)).to_be_hidden()
    stub.wait_for("opened")
    expect(page.locator("#live")).to_have_text("Live")


def test_steps_are_walked_through_with_the_keyboard_and_said(engine, stub):
    page = engine()
    steps = stub.world.frame(stub.now_ms).steps
    canvas = page.locator(".timeline-canvas")
    canvas.focus()
    expect(canvas).to_have_attribute("aria-valuetext", re.compile("No step picked"))
    page.keyboard.press("ArrowLeft")
    expect(canvas).to_have_attribute("aria-valuetext", re.compile(f"^Step {steps.serial[-1]:,} "))
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("PageDown")
    expect(canvas).to_have_attribute("aria-valuetext", re.compile(f"^Step {steps.serial[-12]:,} "))
    expect(canvas).to_have_attribute("aria-valuenow", str(len(steps.serial) - 12))
    page.keyboard.press("+")
    expect(page.locator(".segments input[value='20000']")).to_be_checked()
    page.keyboard.press("Home")
    expect(held(page)).to_contain_text(f"Step {steps.serial[0]:,}")
    page.keyboard.press("Escape")
    expect(held(page)).to_be_hidden()


def test_a_zoomed_timeline_is_dragged_while_a_step_is_held(engine, stub):
    page = engine()
    click_step(page, stub, step_at(stub.world, stub.now_ms - 450))
    expect(held(page)).to_be_visible()
    before = page.locator(".timeline-canvas").evaluate("(canvas) => canvas.toDataURL()")
    box = page.locator(".timeline-canvas").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 900, box["y"] + 100, steps=4)
    page.mouse.up()
    page.mouse.move(box["x"] + 300, box["y"] - 60)
    page.wait_for_function("(old) => document.querySelector('.timeline-canvas').toDataURL() !== old", arg=before)
    expect(held(page)).to_contain_text(f"Step {step_at(stub.world, stub.now_ms - 450).serial:,}")


COLUMNS_LAW = """
async (cases) => {
  const { createSteps } = await import("/view/engine/steps.js");
  const { pixelColumns, roundUp } = await import("/view/engine/pixels.js");
  return cases.map(({ steps: columns, endMs, spanMs, width, scale }) => {
    const steps = createSteps();
    steps.replace({ steps: columns, marks: [], end_ms: endMs });
    const found = pixelColumns(steps, { beginMs: endMs - spanMs, endMs }, width, scale);
    const most = (name) => Math.max(0, ...columns[name].filter((_, i) =>
      columns.begin_ms[i] < endMs && columns.begin_ms[i] + columns.ms[i] > endMs - spanMs + spanMs / (width * scale)));
    const shown = (name) => Math.max(0, ...found.map((column) => column[name]));
    return {
      apart: found.every(({ x0, x1 }, i) => x1 > x0 && (i === 0 || x0 >= found[i - 1].x1)),
      few: found.length <= width * scale + 2,
      peaks: ["ms", "prefill_tokens", "decode_tokens", "waiting"].every((name) => shown(name.split("_")[0]) >= most(name)),
      tops: found.every(({ ms }) => roundUp(ms) >= ms * 0.9999 && roundUp(ms) <= ms * 2 + 1e-9),
    };
  });
}
"""


def random_steps(draw: random.Random) -> dict[str, object]:
    count, at = draw.choice([0, 1, 2, 40, 900]), 1000.0
    names = ("serial", "prefill_tokens", "decode_tokens", "waiting")
    steps: dict[str, list[float]] = {name: [draw.randrange(300) for _ in range(count)] for name in names}
    steps |= {"begin_ms": [], "ms": [], "host_ms": [], "predicted_ms": []}
    for _ in range(count):
        ms = draw.choice([0.3, 4.0, 90.0]) * draw.uniform(0.5, 2)
        at += draw.choice([0, 0, 0.2, 700]) * draw.random()
        for name, value in zip(("begin_ms", "ms", "host_ms", "predicted_ms"), (at, ms, ms / 9, ms), strict=True):
            steps[name].append(value)
        at += ms
    view = {"spanMs": draw.choice([1000, 60_000]), "width": draw.choice([300, 1358]), "scale": draw.choice([1, 2, 1.5])}
    return {"steps": steps, "endMs": at + draw.choice([0, 500]), **view}


def test_no_peak_is_lost_where_steps_share_a_pixel_and_columns_never_overlap(engine):
    draw = random.Random(3)
    for law in engine().evaluate(COLUMNS_LAW, [random_steps(draw) for _ in range(200)]):
        assert law == {"apart": True, "few": True, "peaks": True, "tops": True}


def test_frames_that_overlap_are_joined_without_a_step_twice(engine, stub, world):
    early, late = world.frame(stub.now_ms), world.frame(stub.now_ms + 700, since_ms=stub.now_ms - 300)
    serials = engine().evaluate(
        """async ([early, late]) => {
          const { createSteps } = await import("/view/engine/steps.js");
          const steps = createSteps();
          steps.replace(early);
          steps.append(late);
          return steps.column("serial");
        }""",
        [json.loads(msgspec.json.encode(frame)) for frame in (early, late)],
    )
    assert serials == world.frame(stub.now_ms + 700).steps.serial


# Blocks, queue, waterfalls


def test_the_areas_of_the_map_sum_to_the_pool_whatever_is_shared(engine):
    draw, pools = random.Random(5), []
    for _ in range(300):
        held, cached, free = (draw.choice([0, 1, 7, draw.randrange(5000)]) for _ in range(3))
        blocks = [draw.randrange(1, 400) for _ in range(draw.randrange(6))] if held else []
        holders = [{"run": None, "blocks": count, "cached": draw.randrange(count + 1)} for count in blocks]
        pools.append({"total": held + cached + free, "held": held, "cached": cached, "free": free, "holders": holders})
    sums = engine().evaluate(
        """async (pools) => {
          const { segments, stripes } = await import("/view/engine/blocks_view.js");
          return pools.map((pool) => {
            const sums = { own: 0, shared: 0, cached: 0, free: 0 };
            let at = 0;
            for (const { kind, blocks } of segments(pool).parts) {
              for (const { width } of stripes(at, at + blocks, 37)) sums[kind] += width;
              at += blocks;
            }
            return sums;
          });
        }""",
        pools,
    )
    for pool, found in zip(pools, sums, strict=True):
        assert found["own"] + found["shared"] == pytest.approx(pool["held"], abs=1e-6)
        assert [found["cached"], found["free"]] == pytest.approx([pool["cached"], pool["free"]], abs=1e-6)


def test_a_cell_of_a_big_pool_stands_for_several_blocks(engine, stub):
    blocks = stub.world.frame(stub.now_ms).blocks
    big = msgspec.structs.replace(blocks, total=40_000, free=40_000 - blocks.held - blocks.cached)
    stub.changes = {"blocks": big}
    page = engine()
    expect(page.locator("#blocks-sum")).to_contain_text("A cell is 34 blocks: 544 tokens")
    assert page.locator(".cell").count() < 200


def test_the_block_map_adds_up_to_the_pool(engine, stub):
    page = engine()
    blocks = stub.world.frame(stub.now_ms).blocks
    areas = page.evaluate(
        """() => {
          const areas = {};
          for (const { dataset, width } of document.querySelectorAll(".cell"))
            areas[dataset.kind] = (areas[dataset.kind] ?? 0) + width.baseVal.value;
          return areas;
        }"""
    )
    assert areas["own"] + areas.get("shared", 0) == pytest.approx(blocks.held, abs=1e-3)
    assert areas["cached"] == pytest.approx(blocks.cached, abs=1e-3)
    assert areas["free"] == pytest.approx(blocks.free, abs=1e-3)
    expect(page.locator(".sum")).to_have_text(
        re.compile(rf"{blocks.held} held \+ {blocks.cached} cached \+ {blocks.free} free = {blocks.total} blocks ✓")
    )


def test_a_pool_that_does_not_add_up_says_so(engine, stub):
    blocks = stub.world.frame(stub.now_ms).blocks
    stub.changes = {"blocks": msgspec.structs.replace(blocks, free=blocks.free - 3)}
    page = engine()
    expect(page.locator(".sum-true")).to_have_text("≠")
    expect(page.locator(".sum-true")).to_have_class(re.compile("fault-text"))


def test_a_pool_that_a_new_engine_has_not_told_of_is_no_sum_of_nothing(engine, stub):
    blocks = stub.world.frame(stub.now_ms).blocks
    stub.changes = {"blocks": msgspec.structs.replace(blocks, total=0, held=0, cached=0, free=0, holders=[])}
    page = engine()
    expect(page.locator("#blocks-sum")).to_contain_text("The engine tells of its blocks with its first step.")
    expect(page.locator("#blocks-sum .sum")).to_be_hidden()


def test_pointing_at_a_stream_lights_its_cells_and_the_other_way_round(engine, stub):
    page = engine()
    place, holder = next((i, each) for i, each in enumerate(stub.world.frame(stub.now_ms).blocks.holders) if each.run)
    page.locator("#streams .stream").nth(place).hover()
    lit = page.locator(".cell.lit")
    assert {cell.get_attribute("data-holder") for cell in lit.all()} == {str(place)}
    page.locator(".blocks-picture").evaluate("(e) => e.scrollIntoView({ block: 'center' })")
    page.locator(f".cell[data-holder='{place}']").first.hover()
    expect(page.locator("#streams .stream.lit")).to_have_count(1)
    expect(page.locator(".blocks-tip")).to_contain_text(f"{holder.run}: {holder.blocks} blocks")
    page.locator("#queue-title").hover()
    expect(page.locator(".cell.lit")).to_have_count(0)


def test_the_queue_says_why_since_when_until_when_and_for_whom(engine, stub):
    page = engine()
    frame = stub.world.frame(stub.now_ms)
    assert len(frame.waiting) > 1
    rows = page.locator("#queue .wait")
    expect(rows).to_have_count(min(6, len(frame.waiting)))
    first = frame.waiting[0]
    expect(rows.first).to_contain_text("all rows taken")
    expect(rows.first).to_contain_text(f"{first.prompt_tokens} tokens")
    expect(rows.first).to_contain_text(re.compile(r"starts in [\d.]+ ms|starts now"))
    expect(rows.first).to_contain_text(f"{first.holders[0].share:.0%}")
    rows.first.locator(".term").click()
    expect(page.locator("#term-box")).to_contain_text("Each step has room for so many rows")
    stub.advance(0, waiting=[])
    expect(page.locator("#queue-empty")).to_have_text("Nobody waits.")


def test_a_row_of_another_key_has_a_word_and_no_link(engine, stub):
    frame = stub.world.frame(stub.now_ms)
    stub.changes = {"waiting": [msgspec.structs.replace(frame.waiting[0], run=None, holders=[])]}
    page = engine()
    expect(page.locator("#queue .wait")).to_contain_text("another key’s")
    expect(page.locator("#queue a")).to_have_count(0)


def test_waterfalls_end_where_their_totals_say(engine, stub):
    page = engine()
    frame = stub.world.frame(stub.now_ms)
    expect(page.locator("#falls .fall")).to_have_count(8)
    page.get_by_role("button", name="Show all 20").click()
    expect(page.locator("#falls .fall")).to_have_count(20)
    ruler = page.locator(".fall-ruler").bounding_box()["width"]
    widths = page.evaluate(
        """() => [...document.querySelectorAll("#falls .fall")].map((row) =>
             [...row.querySelectorAll(".piece")].reduce((sum, piece) => sum + piece.getBoundingClientRect().width, 0))"""
    )
    for fall, width in zip(frame.slowest, widths, strict=True):
        assert width == pytest.approx(fall.total_ms / frame.slowest[0].total_ms * ruler, abs=1)
    expect(page.locator("#falls .fall-total", has_text="✓")).to_have_count(20)
    named = next(fall for fall in frame.slowest if fall.run)
    expect(page.locator("#falls a").first).to_have_attribute("href", f"/runs/{named.run}")


def test_a_ledger_that_does_not_sum_up_is_marked(engine, stub):
    fall = stub.world.frame(stub.now_ms).slowest[0]
    stub.changes = {"slowest": [msgspec.structs.replace(fall, total_ms=fall.total_ms + 7)]}
    page = engine()
    expect(page.locator(".fall-total")).to_contain_text("≠")


# Sums


def test_memory_is_a_sum_by_process_and_what_nobody_owns_is_marked_when_it_is_much(engine):
    page = engine()
    tables = page.locator("#memory table")
    expect(tables).to_have_count(2)
    expect(tables.first.locator("tfoot")).to_have_text(re.compile("resident609 MB"))
    expect(tables.first.locator("tbody tr").last).to_have_text(re.compile(r"not touched yet−10\.5 MB"))
    expect(tables.last.locator("tfoot")).to_have_text(re.compile("resident65 MB"))
    expect(tables.first.locator(".fault-text")).to_have_count(0)
    expect(tables.last.locator(".fault-text")).to_contain_text("unattributed")


def test_memory_of_a_gpu_is_in_use(engine, stub):
    memory = [
        Owned(process="gpu", owner="kv", bytes=100 << 30),
        Owned(process="gpu", owner="unattributed", bytes=1 << 30),
    ]
    stub.changes = {"memory": memory}
    page = engine()
    expect(page.locator("#memory caption")).to_have_text("GPU")
    expect(page.locator("#memory tfoot")).to_have_text(re.compile(r"in use108"))


def test_money_is_a_sum_with_idle_as_its_own_line(engine, stub):
    page = engine()
    rows = page.locator("#cost tbody tr")
    expect(rows).to_have_count(6)
    expect(rows.nth(1)).to_have_text(re.compile(r"idle[\d.]+ s19%0\.0\d+ ¢"))
    expect(page.locator("#cost tfoot")).to_have_text(re.compile(r"uptime2 min \d+ s✓0\.\d+ ¢"))
    expect(page.locator("#cost")).to_contain_text("at $0.05 an hour")
    expect(page.locator("#cost")).to_contain_text("A million output tokens: 51 min 40 s of the machine, $0.043.")
    expect(page.locator("#cost")).to_contain_text("team-a")
    expect(page.locator("#cost")).to_contain_text("RAPL package counter")
    cost = stub.world.frame(stub.now_ms).cost
    stub.advance(0, cost=msgspec.structs.replace(cost, idle=cost.idle * 2), energy=None)
    expect(page.locator("#cost tfoot")).to_contain_text("≠")
    expect(page.locator("#cost")).to_contain_text("Energy: this machine has no counter that may be read.")


def test_without_a_price_cost_is_time_of_the_machine(engine, stub):
    cost = stub.world.frame(stub.now_ms).cost
    lines = ("requests", "idle", "load", "failed", "recompute", "host", "total", "price_per_hour")
    stub.changes = {"cost": msgspec.structs.replace(cost, is_default=True, by_key={}, **dict.fromkeys(lines, 0.0))}
    page = engine()
    expect(page.locator("#cost")).to_contain_text("With --price an hour of it costs money, too.")
    expect(page.locator("#cost tfoot")).to_contain_text("✓")
    for amount in page.locator("#cost .amount").all():
        expect(amount).to_be_hidden()
    expect(page.locator("#cost")).to_contain_text("51 min 40 s of the machine.")


def test_calls_are_an_equation_and_the_lamp_tells_when_sums_do_not_balance(engine, stub):
    page = engine()
    frame = stub.world.frame(stub.now_ms)
    expect(page.locator("#calls")).to_contain_text(f"{frame.counts.accepted} accepted =")
    expect(page.locator("#calls")).to_contain_text("Every accepted call is accounted for.")
    expect(page.locator("#balance")).to_have_text("All sums balance")
    stub.advance(
        0,
        counts=msgspec.structs.replace(frame.counts, live=frame.counts.live + 2),
        tiles=msgspec.structs.replace(frame.tiles, imbalance=2),
        state="restarting",
    )
    expect(page.locator("#calls")).to_contain_text("The parts do not add up.")
    expect(page.locator("#balance")).to_have_text("2 out of balance")
    expect(page.locator("#engine-state")).to_have_text("Restarting")


# Words


def explanations(page, root: str = "main") -> dict[str, str]:
    """What each word with dots under it says."""
    return page.evaluate(
        """(root) => Object.fromEntries([...document.querySelectorAll(`${root} .term`)].filter((term) => term.checkVisibility())
          .map((term) => { term.focus(); return [term.textContent, document.querySelector("#term-box").textContent]; }))""",
        root,
    )


@pytest.mark.parametrize("locale", ["en-US", "ko-KR"])
def test_every_term_explains_itself_with_the_numbers_of_now(engine, stub, locale):
    page = engine(locale=locale)
    page.locator(".timeline-canvas").focus()
    page.keyboard.press("ArrowLeft")
    expect(held(page)).to_be_visible()
    expect(held(page).locator(".step-row").first).to_be_visible()
    seen = explanations(page)
    assert len(seen) > 25
    assert all(len(text) > 15 and "{" not in text for text in seen.values()), seen
    frame = stub.world.frame(stub.now_ms)
    assert any(f"{frame.blocks.total}" in text for text in seen.values())
    page.locator("#tile-kv .term").click()
    page.keyboard.press("Escape")
    expect(page.locator("#term-box")).to_be_hidden()
    expect(held(page)).to_be_visible()  # Escape closed the sentence, not the step


def test_terms_of_an_engine_that_did_nothing_explain_themselves_too(open_page, stub):
    stub.world = Still()
    page, _ = open_page("/engine")
    expect(page.locator("#tile-streams .tile-value")).to_be_visible()
    texts = explanations(page, "#tiles").values()
    assert len(texts) == 8 and all(re.match(r"\w+.{20,}", text) for text in texts)


def test_a_korean_browser_gets_a_korean_page(engine):
    page = engine(locale="ko-KR")
    assert page.evaluate("document.documentElement.lang") == "ko"
    expect(page.locator("#engine-state")).to_have_text("준비됨")
    expect(page.locator("#tile-streams .term")).to_have_text("스트림")


def test_what_a_server_says_is_text(engine, stub):
    evil = "<img src=x onerror=alert(1)>"
    frame = stub.world.frame(stub.now_ms)
    stub.changes = {
        "model": evil,
        "state": evil,
        "marks": [msgspec.structs.replace(frame.marks[0], kind=evil, text=evil, run=evil)],
        "waiting": [msgspec.structs.replace(frame.waiting[0], run=evil, cause=evil)],
        "memory": [msgspec.structs.replace(owned, process=evil, owner=evil) for owned in frame.memory],
    }
    page = engine()
    expect(page.locator("#model-name")).to_have_text(evil)
    expect(page.locator("#queue .wait-cause")).to_have_text(evil)
    expect(page.locator("#memory th").last).to_be_attached()
    assert page.locator("main img").count() == 0


# Empty


class Still:
    """An engine that has had no call."""

    until_ms = FIRST_MS + 900

    def frame(self, *_args, since_ms=None, **changes):
        return empty_frame(**changes)


def test_an_engine_without_a_step_says_what_to_do(open_page, stub):
    stub.world = Still()
    page, _ = open_page("/engine")
    expect(page.get_by_role("heading", name="No step yet")).to_be_visible()
    expect(page.get_by_role("link", name="Ask something in the chat")).to_have_attribute("href", "/")
    expect(page.locator("#empty-example")).to_contain_text(f"curl {stub.url}/v1/chat/completions")
    body = page.locator("#empty-example").text_content().split("-d '")[1].rstrip("'")
    assert json.loads(body)["messages"][0]["content"] == "Why is the sky blue?"
    expect(page.locator("#timeline")).to_be_hidden()
    expect(page.locator("#tile-ttft .tile-value")).to_have_text("–")
    check_axe(page)


def test_the_page_wakes_up_with_the_first_step(open_page, stub, world):
    stub.world = Still()
    page, _ = open_page("/engine")
    expect(page.locator("#empty")).to_be_visible()
    stub.send(world.frame(stub.now_ms))
    expect(page.locator("#empty")).to_be_hidden()
    expect(page.locator("#timeline")).to_be_visible()


def test_a_minute_without_steps_is_said_and_not_drawn_as_nothing(engine, stub, world):
    frame = world.frame(stub.now_ms)
    nothing = {name: [] for name in msgspec.structs.asdict(frame.steps)}
    stub.changes = {"steps": msgspec.convert(nothing, type(frame.steps)), "running": [], "waiting": [], "slowest": []}
    page = engine()
    expect(page.locator(".timeline-quiet")).to_have_text("No step in these 60 s: the engine had nothing to do.")
    expect(page.locator("#falls-empty")).to_be_visible()


# Rewind


def test_the_slider_goes_to_a_moment_and_everything_shows_it(engine, stub, world):
    page = engine()
    stub.wait_for("opened")
    slider(page).focus()
    page.keyboard.press("Home")
    stub.wait_for("closed")
    page.keyboard.press("PageUp")
    page.keyboard.press("PageUp")
    page.keyboard.press("ArrowRight")
    at_ms = FIRST_MS + 21_000
    expect(page.locator(".ago")).to_contain_text(re.compile(r"\d s ago"))
    page.wait_for_function("() => document.querySelector('#rewind').value === '21000'")
    frame = world.frame(at_ms)
    expect(page.locator("#tile-output .tile-value")).to_have_text(f"{frame.tiles.output_tokens_per_s:.0f} /s")
    expect(page.locator(".sum")).to_contain_text(f"{frame.blocks.held} held")
    assert float(stub.windows()[-1]["end_ms"]) == at_ms
    expect(slider(page)).to_have_attribute("aria-valuetext", re.compile(r"^\d\d:\d\d:\d\d .* ago$"))


def test_the_end_of_the_slider_and_the_button_are_the_present(engine, stub):
    page = engine()
    stub.wait_for("opened")
    page.get_by_role("button", name="Back 10 s").click()
    stub.wait_for("closed")
    expect(page.locator(".ago")).to_contain_text("10 s ago")
    slider(page).focus()
    page.keyboard.press("End")
    stub.wait_for("opened")
    expect(page.locator("#live")).to_have_text("Live")
    page.get_by_role("button", name="Back 10 s").click()
    stub.wait_for("closed")
    page.locator("#live").click()
    stub.wait_for("opened")
    expect(page.locator(".ago")).to_be_empty()


def test_many_moves_of_the_slider_fetch_the_last_moment_and_not_each(engine, stub, world):
    page = engine()
    slider(page).evaluate(
        """(slider) => {
          for (let value = 20000; value <= 120000; value += 1000) {
            slider.value = value;
            slider.dispatchEvent(new Event("input"));
          }
        }"""
    )
    frame = world.frame(FIRST_MS + 120_000)
    expect(page.locator(".sum")).to_contain_text(f"{frame.blocks.held} held + {frame.blocks.cached} cached")
    assert float(stub.windows()[-1]["end_ms"]) == FIRST_MS + 120_000
    assert len(stub.windows()) <= 3


def test_a_moment_that_cannot_be_had_is_said_and_can_be_tried_again(engine, stub):
    page = engine()
    page.watch.allowed.append("503")
    stub.window_status = 503
    page.get_by_role("button", name="Back 10 s").click()
    expect(page.locator("#notice")).to_be_visible()
    stub.window_status = 200
    page.locator("#notice").get_by_role("button", name="Try again").click()
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator(".ago")).to_contain_text("10 s ago")


def test_a_moment_that_the_ring_has_forgotten_becomes_the_oldest_that_it_has(engine, stub, world):
    page = engine()
    page.watch.allowed.append("400")
    stub.first_ms = FIRST_MS + 40_000
    slider(page).focus()
    page.keyboard.press("Home")
    frame = world.frame(FIRST_MS + 41_000)
    expect(page.locator(".sum")).to_contain_text(f"{frame.blocks.held} held + {frame.blocks.cached} cached")
    expect(page.locator("#notice")).to_be_hidden()
    expect(slider(page)).to_have_attribute("max", str(int(-(-(stub.now_ms - stub.first_ms) // 1000)) * 1000))


# A recorded file


@pytest.fixture
def file_stub(stub):
    stub.status = 404
    stub.changes = {"is_live": False, "memory": None, "cost": None, "energy": None}
    return stub


def test_a_recorded_file_is_wholly_rewind(open_page, file_stub, world):
    page, watch = open_page("/engine", viewport=VIEWPORT)
    watch.allowed.append("404")  # how the page learns that there is no present
    expect(page.locator("#state")).to_have_text("Recorded file")
    assert file_stub.windows() == [{"seconds": "60"}]
    expect(page.locator("#live")).to_have_text("End of the file")
    expect(page.locator("#memory")).to_have_text("A recorded file does not tell of memory.", use_inner_text=True)
    expect(page.locator("#cost")).to_have_text("A recorded file does not tell of cost or energy.", use_inner_text=True)
    slider(page).focus()
    page.keyboard.press("Home")
    page.keyboard.press("PageUp")
    expect(page.locator(".ago")).to_contain_text("before the end")
    assert page.locator("main a").count() == page.locator("#empty a").count(), "runs have no pages in a file"
    frame = world.frame(FIRST_MS + 10_000)
    expect(page.locator("#tile-output .tile-value")).to_have_text(f"{frame.tiles.output_tokens_per_s:.0f} /s")
    page.locator(".timeline-canvas").focus()
    page.keyboard.press("ArrowLeft")
    expect(held(page)).to_contain_text(f"Step {frame.steps.serial[-1]:,}")
    page.keyboard.press("Escape")
    expect(held(page)).to_be_hidden()
    page.locator("#live").click()
    expect(page.locator(".ago")).to_be_empty()
    assert sum("events" in path for path in file_stub.asked) == 1


# The connection


def test_a_lost_connection_is_said_and_made_again(engine, stub):
    page = engine()
    page.watch.allowed.append("503")
    stub.wait_for("opened")
    stub.status = 503
    stub.drop()
    expect(page.locator("#notice")).to_contain_text("The connection is lost.")
    expect(page.locator("#status")).to_have_text("The connection is lost.")
    expect(page.locator("#notice")).to_contain_text("What stands here is of")
    stub.status = 200
    stub.wait_for("closed")
    stub.wait_for("opened")
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#status")).to_have_text("The connection is back.")
    expect(page.locator("#live")).to_have_text("Live")


def test_trying_again_does_not_wait_for_the_back_off(engine, stub):
    page = engine()
    page.watch.allowed.append("503")
    stub.status = 503
    stub.drop()
    expect(page.locator("#notice")).to_be_visible()
    stub.status = 200
    page.locator("#notice").get_by_role("button", name="Try again").click()
    expect(page.locator("#notice")).to_be_hidden()


def test_a_server_that_is_busy_is_said_to_be_busy(open_page, stub):
    stub.window_status = 429
    page, watch = open_page("/engine")
    watch.allowed.append("429")
    page.get_by_role("button", name="Back 10 s").click()
    expect(page.locator("#notice")).to_contain_text("The server refused the request.")
    stub.window_status = 200
    page.locator("#live").click()
    expect(page.locator("#notice")).to_be_hidden()


def test_a_silent_connection_is_taken_for_lost(open_page, stub):
    page, _ = open_page("/engine", alone=True)
    page.clock.install()
    page.reload()
    expect(page.locator("#tile-streams .tile-value")).to_be_visible()
    page.clock.fast_forward(9000)
    expect(page.locator("#notice")).to_be_visible()
    page.clock.fast_forward(2000)
    expect(page.locator("#notice")).to_be_hidden()


HIDE = """(hidden) => {
  Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


def test_a_page_that_nobody_sees_has_no_connection(engine, stub):
    page = engine()
    stub.wait_for("opened")
    page.evaluate(HIDE, True)
    stub.wait_for("closed")
    expect(page.locator("#notice")).to_be_hidden()
    page.evaluate(HIDE, False)
    stub.wait_for("opened")
    stub.advance(400)
    frame = stub.world.frame(stub.now_ms)
    expect(page.locator(".timeline-canvas")).to_have_attribute("aria-valuemax", str(len(frame.steps.serial) - 1))


def test_a_server_with_keys_gets_the_one_that_was_given(open_page, stub):
    stub.key = "sesame"
    page, watch = open_page("/engine")
    watch.allowed.append("401")
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.locator("#notice")).to_contain_text("The server asks for a key.")
    page.locator("#notice").get_by_role("button", name="Give a key").click()
    dialog.get_by_label("Key").fill("sesame")
    dialog.get_by_label("Key").press("Enter")
    expect(page.locator("#tile-streams .tile-value")).to_be_visible()
    expect(page.locator("#notice")).to_be_hidden()


# Looks


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_axe_has_nothing_serious_to_say(engine, stub, color_scheme):
    page = engine(color_scheme=color_scheme)
    check_axe(page)
    page.locator("#steps-table summary").click()
    click_step(page, stub, step_at(stub.world, stub.now_ms - 450))
    expect(held(page).locator(".step-row").first).to_be_visible()
    held(page).get_by_role("button", name="Operations of this step").click()
    expect(held(page).locator(".ops-table")).to_be_visible()
    page.locator("#tile-kv .term").click()
    check_axe(page)


LAID_OUT = "(width) => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(innerWidth === width))))"
TOO_WIDE = """() => [...document.querySelectorAll("body, body *")]
    .filter((e) => e.checkVisibility() && !e.closest(".visually-hidden, .skip-link, svg, .table-scroll, .example"))
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5)
    .map((e) => e.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("locale", ["en-US", "ko-KR"])
def test_nothing_is_wider_than_the_page(engine, stub, locale):
    page = engine(locale=locale)
    page.locator(".timeline-canvas").focus()
    page.keyboard.press("ArrowLeft")
    expect(held(page).locator(".step-row").first).to_be_visible()
    held(page).locator(".inspector-ops button").click()
    expect(held(page).locator(".ops-table")).to_be_visible()
    for width in (320, 390, 768, 1440):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_function(LAID_OUT, arg=width)
        assert page.evaluate(TOO_WIDE) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_finger_picks_a_step(engine, stub):
    page = engine(viewport={"width": 390, "height": 844}, has_touch=True)
    canvas = page.locator(".timeline-canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.touchscreen.tap(box["x"] + 200, box["y"] + 60)
    expect(held(page)).to_be_visible()
    expect(page.locator(".timeline-stage .tip")).to_be_hidden()


def test_everything_is_reached_by_keyboard_with_visible_focus(engine, stub):
    page = engine()
    seen = set()
    for _ in range(200):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
            )
        )
        state = page.evaluate(
            """() => {
              const { activeElement: e } = document;
              if (e === document.body) return "end";
              const shown = e.matches(".segments input") ? e.nextElementSibling : e;
              return getComputedStyle(shown).outlineStyle === "none" ? e.outerHTML : "";
            }"""
        )
        if state == "end":
            break
        assert state == "", f"focus is not visible on {state}"
    assert {"timeline-canvas", "rewind", "live", "term", "run", "falls-more", "SUMMARY"} <= seen, seen
