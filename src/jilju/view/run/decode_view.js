// Station 5, decode: a column a step, as high as the time since the token before it, and below it the token that it chose.
//
// Owns the row of columns, of which only those in sight exist, and the overview of a row that does not fit. A row of 2,000
// steps costs what a row of 30 does. What a chosen step says is step_view.js.

import { h, svg } from "../dom.js";
import { createStation, tableBehind, tokenText } from "./station.js";
import { median } from "./story.js";
import { textOfBytes, visible } from "./units.js";

const LEAST_WIDTH = 52; // px of a column: a token and a figure can be read
const MOST_WIDTH = 96;
const AROUND = 6; // columns beyond the edges, so that a swipe finds them there
const CUT_AT = 4; // medians: what is higher is cut off, with its figure above it
const OVERVIEW_BINS = 600;
const DOTS = 8; // neighbours drawn one by one

export function createDecodeView({ words, units, rich, select }) {
  const { t, duration } = words;
  const station = createStation({ name: "decode", number: 5, words });
  const inner = h("div", { class: "columns-inner", role: "presentation" });
  const row = h(
    "div",
    { class: "columns", role: "listbox", tabindex: "0", "aria-label": t("decode_steps"), "aria-orientation": "horizontal" },
    inner,
  );
  const overview = svg("svg", { class: "overview-bars", preserveAspectRatio: "none" });
  const view = h("span", { class: "overview-view" });
  const overviewBox = h("div", { class: "overview", "aria-hidden": "true", hidden: true }, overview, view);
  const axis = h("p", { class: "picture-axis" });
  const figure = h("figure", { class: "decode-figure" }, overviewBox, row, axis);
  const behind = h("div", {});
  station.body.append(figure, behind);

  let story = null;
  let width = LEAST_WIDTH;
  let top = 1; // ms of the highest column
  let chosen = null; // index in columns
  let at = null;
  const made = new Map(); // index -> element

  const list = () => story?.columns ?? [];

  function batch({ step, isFirst }) {
    const lane = h("span", { class: "col-batch" });
    if (isFirst) return lane;
    const dots = step.neighbours
      .slice(0, DOTS)
      .map((each) => h("span", { class: each.is_prefill ? "dot look-prefill" : "dot look-decode" }));
    lane.append(...dots);
    const rest = step.rows - 1 - dots.length;
    if (rest > 0) lane.append(h("span", { class: "dots-rest" }, `+${rest}`));
    return lane;
  }

  function stack(column) {
    const chart = h("span", { class: "col-chart" });
    if (column.isFirst) {
      chart.append(h("span", { class: "from-prefill" }, t("from_prefill")));
      return chart;
    }
    const share = Math.min(column.ms / top, 1);
    const bar = h("span", { class: column.ms > top * 1.001 ? "stack cut" : "stack" });
    bar.style.height = `${share * 100}%`;
    for (const { look, ms } of column.parts) {
      const part = h("span", { class: `look-${look}` });
      part.style.flexGrow = String(ms);
      bar.append(part);
    }
    const line = h("span", { class: "predicted" });
    const predicted = Math.min(column.step.predicted_ms / top, 1);
    line.style.bottom = `${predicted * 100}%`;
    const label = h("span", { class: "col-ms" }, units.fixed(column.ms, column.ms < 99.95 ? 1 : 0));
    label.style.bottom = `${Math.max(share, predicted) * 100}%`;
    chart.append(bar, line, label);
    return chart;
  }

  function label(column) {
    const tokens = column.tokens.map((token) => `“${textOfBytes(token.bytes) ?? units.hex(token.bytes)}”`).join(" ");
    if (column.isFirst) return t("first_token_label", { token: tokens });
    const neighbours = column.step.rows - 1;
    return t("column_label", { number: column.stepIndex + 1, token: tokens, duration: duration(column.ms), neighbours });
  }

  function build(index) {
    const column = list()[index];
    const token = column.tokens[0];
    const chip = h("span", { class: "col-token" }, token ? tokenText(token, units) : "–");
    const chance = h("span", { class: "col-chance" });
    if (token?.logprob != null) {
      const bar = h("span", { class: "chance-fill" });
      bar.style.width = `${Math.exp(token.logprob) * 100}%`;
      chance.append(h("span", { class: "chance-bar" }, bar), words.share(Math.exp(token.logprob)));
    }
    const classes = [
      "col",
      column.isFirst && "col-first",
      index === chosen && "chosen",
      at !== null && column.endMs > at && "future",
    ];
    const element = h(
      "div",
      {
        class: classes.filter(Boolean).join(" "),
        role: "option",
        id: `column-${index}`,
        "aria-selected": String(index === chosen),
        "aria-setsize": list().length,
        "aria-posinset": index + 1,
      },
      h("span", { class: "visually-hidden" }, label(column)),
      h("span", { class: "col-drawn", "aria-hidden": "true" }, batch(column), stack(column), chip, chance),
    );
    element.style.left = `${index * width}px`;
    element.style.width = `${width}px`;
    return element;
  }

  /** Makes the columns in sight and drops the others. */
  function drawSight() {
    const from = Math.max(0, Math.floor(row.scrollLeft / width) - AROUND);
    const to = Math.min(list().length, Math.ceil((row.scrollLeft + row.clientWidth) / width) + AROUND);
    for (const [index, element] of made) {
      if (index >= from && index < to) continue;
      element.remove();
      made.delete(index);
    }
    for (let index = from; index < to; index++) {
      if (made.has(index)) continue;
      made.set(index, build(index));
      inner.append(made.get(index));
    }
    const whole = Math.max(list().length * width, 1);
    view.style.left = `${(row.scrollLeft / whole) * 100}%`;
    view.style.width = `${Math.min(row.clientWidth / whole, 1) * 100}%`;
  }

  function drawOverview() {
    const bins = Math.min(list().length, OVERVIEW_BINS);
    const paths = {};
    for (let bin = 0; bin < bins; bin++) {
      const from = Math.floor((bin * list().length) / bins);
      const to = Math.max(from + 1, Math.floor(((bin + 1) * list().length) / bins));
      let highest = list()[from];
      for (let i = from; i < to; i++) if (list()[i].ms > highest.ms) highest = list()[i];
      let ground = 1;
      for (const { look, ms } of highest.parts) {
        const next = Math.max(0, ground - ms / top);
        paths[look] = `${paths[look] ?? ""}M${bin} ${ground.toFixed(4)}H${bin + 1}V${next.toFixed(4)}H${bin}Z`;
        ground = next;
      }
    }
    overview.setAttribute("viewBox", `0 0 ${bins} 1`);
    overview.replaceChildren(...Object.entries(paths).map(([look, d]) => svg("path", { class: `look-${look}`, d })));
  }

  function layout() {
    if (list().length === 0 || row.clientWidth === 0) return;
    const before = width;
    width = Math.min(Math.max(Math.floor(row.clientWidth / list().length), LEAST_WIDTH), MOST_WIDTH);
    const fits = list().length * width <= row.clientWidth;
    overviewBox.hidden = fits;
    inner.style.width = `${list().length * width}px`;
    if (before !== width) clear();
    drawSight();
  }

  function clear() {
    for (const element of made.values()) element.remove();
    made.clear();
  }

  function show(index) {
    const left = index * width;
    if (left < row.scrollLeft || left + width > row.scrollLeft + row.clientWidth) {
      row.scrollLeft = left - (row.clientWidth - width) / 2;
    }
    drawSight();
  }

  function choose(index) {
    if (list()[index]) select(list()[index].stepIndex);
  }

  row.addEventListener("scroll", () => requestAnimationFrame(drawSight), { passive: true });
  row.addEventListener("click", (event) => {
    const column = event.target.closest(".col");
    if (column) choose(Number(column.id.slice("column-".length)));
  });
  row.addEventListener("keydown", (event) => {
    const now = chosen ?? 0;
    const last = list().length - 1;
    const sight = Math.max(1, Math.floor(row.clientWidth / width) - 1);
    const moves = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: last, PageDown: now + sight, PageUp: now - sight };
    if (!(event.key in moves)) return;
    event.preventDefault();
    choose(Math.min(Math.max(moves[event.key], 0), last));
  });
  const drag = (event) => {
    const { left, width: all } = overviewBox.getBoundingClientRect();
    row.scrollLeft = ((event.clientX - left) / all) * list().length * width - row.clientWidth / 2;
  };
  overviewBox.addEventListener("pointerdown", (event) => {
    overviewBox.setPointerCapture(event.pointerId);
    drag(event);
  });
  overviewBox.addEventListener("pointermove", (event) => overviewBox.hasPointerCapture(event.pointerId) && drag(event));
  new ResizeObserver(layout).observe(row);

  function table() {
    const heads = [
      "head_step",
      "head_token",
      "head_time",
      "head_own",
      "head_others",
      "head_host",
      "head_wait",
      "head_predicted",
      "head_bytes",
      "head_rows",
    ];
    const rows = () =>
      list().map((column) => {
        const part = (look) => duration(column.parts.find((each) => each.look === look)?.ms ?? 0);
        const text = column.tokens.map((token) => visible(textOfBytes(token.bytes) ?? units.hex(token.bytes))).join(" ");
        if (column.isFirst) return [t("from_prefill"), text, "–", "–", "–", "–", "–", "–", "–", String(column.step.rows)];
        const parts = ["decode", "others", "host", "wait"].map(part);
        return [
          String(column.stepIndex + 1),
          text,
          duration(column.ms),
          ...parts,
          duration(column.step.predicted_ms),
          words.bytes(column.step.bytes),
          String(column.step.rows),
        ];
      });
    return tableBehind({ label: t("decode_table"), heads: heads.map((key) => t(key)), rows }, words);
  }

  function drawLead() {
    const { sequence } = story;
    const steps = list().filter((column) => !column.isFirst);
    figure.hidden = list().length === 0;
    behind.hidden = steps.length === 0;
    if (steps.length === 0) {
      station.say(rich(sequence.output.length > 0 ? "lead_one_token" : "lead_no_decode"));
      return;
    }
    const middle = median(steps.map((column) => column.step.ms));
    const bytes = median(steps.map((column) => column.step.bytes));
    // true of most machines' steps, but not of a long context on a small model
    const key = story.run.machine.weight_bytes > bytes / 2 ? "lead_decode" : "lead_decode_kv";
    const nodes = rich(key, { steps: steps.length, duration: duration(middle), bytes: words.bytes(bytes) });
    const shares = steps.map((column) => column.step.memory_roof_share).filter((share) => share !== null);
    if (shares.length > 0)
      nodes.push(
        " ",
        ...rich(median(shares) > 1 ? "lead_decode_roof_over" : "lead_decode_roof", { share: words.share(median(shares)) }),
      );
    station.say(nodes);
    axis.replaceChildren(...rich("decode_axis"));
  }

  return {
    station,
    draw(next) {
      const tableWasOpen = behind.querySelector("details")?.open ?? false;
      story = next;
      const times = list()
        .filter((column) => !column.isFirst)
        .map((column) => Math.max(column.ms, column.step.predicted_ms));
      const highest = Math.max(...times, 1e-6);
      top = Math.min(highest, (median(times) ?? highest) * CUT_AT);
      drawLead();
      drawOverview();
      clear();
      layout();
      if (!tableWasOpen) behind.replaceChildren(table());
    },
    select(stepIndex) {
      const index = list().findLastIndex((column) => column.stepIndex === stepIndex);
      for (const old of [chosen, index]) {
        const element = made.get(old);
        element?.classList.toggle("chosen", old === index);
        element?.setAttribute("aria-selected", String(old === index));
      }
      chosen = index < 0 ? null : index;
      if (index < 0) row.removeAttribute("aria-activedescendant");
      else {
        show(index);
        row.setAttribute("aria-activedescendant", `column-${index}`);
      }
    },
    at(ms) {
      at = ms;
      for (const [index, element] of made) element.classList.toggle("future", ms !== null && list()[index].endMs > ms);
    },
  };
}
