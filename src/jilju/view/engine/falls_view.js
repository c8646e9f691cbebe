// Waterfalls: the slowest calls of the window, each as the bar of its ledger, all on one scale of time.
//
// Owns the list. The same parts stand as words in each row for those who do not see the bar.

import { h } from "../dom.js";
import { lookOf } from "../kinds.js";
import { bar } from "./bar.js";
import { createFew, createRows, setText } from "./rows.js";

const FEW = 8;
const STATES = ["completed", "client_cancelled", "deadline", "shed", "failed"];
const ROUNDING_MS = 0.05; // a few dozen parts, each rounded to a µs: far below this

const isBalanced = ({ parts, total_ms: totalMs }) =>
  Math.abs(parts.reduce((sum, { ms }) => sum + ms, 0) - totalMs) <= ROUNDING_MS;

export function createFallsView({ list, more, empty, words, format, linkRun }) {
  const { t, duration } = words;
  let frame = null;
  let longestMs = 0;
  let roomPx = 0;
  let drawn = [];
  const ruler = h("span", { class: "fall-bar fall-ruler", "aria-hidden": "true" }); // as wide as a bar of the whole scale
  list.before(h("div", { class: "fall", "aria-hidden": "true" }, ruler));
  new ResizeObserver(([entry]) => {
    roomPx = entry.contentRect.width;
    if (frame) draw();
  }).observe(ruler);

  const label = (kind, ms) => `${t(`kind_${kind}`)} ${duration(ms)}`;

  const show = createRows(list, () => {
    const name = h("span", { class: "fall-run" });
    const facts = h("span", { class: "fall-facts" });
    const total = h("b", { class: "fall-total" });
    const place = h("span", { class: "fall-bar" });
    const spoken = h("span", { class: "visually-hidden" });
    return {
      element: h("li", { class: "fall" }, name, facts, place, total, spoken),
      update(fall) {
        if (name.firstChild === null) name.append(linkRun(fall.run));
        const { parts } = fall;
        const balanced = isBalanced(fall);
        const cached = fall.cached_tokens > 0 ? t("fall_cached", { cached: fall.cached_tokens }) : "";
        const state = fall.state === "completed" ? "" : STATES.includes(fall.state) ? ` · ${t(`run_${fall.state}`)}` : ` · ${fall.state}`;
        const began = format.clock(fall.begin_ms + frame.unix_ms - frame.end_ms);
        setText(facts, `${began} · ${t("fall_tokens", { prompt: fall.prompt_tokens, cached, output: fall.output_tokens })}${state}`);
        setText(total, `= ${duration(fall.total_ms)} ${balanced ? "✓" : "≠"}`);
        total.classList.toggle("fault-text", !balanced);
        setText(spoken, parts.map(({ kind, ms }) => label(kind, ms)).join(", "));
        const pieces = parts.map(({ kind, ms }) => ({ look: lookOf(kind), label: t(`kind_${kind}`), value: ms, title: label(kind, ms) }));
        place.replaceChildren(bar(pieces, longestMs, roomPx));
      },
    };
  });

  const showFew = createFew({
    few: FEW,
    button: more,
    label: (count, isOpen) => t(isOpen ? "show_few" : "show_all", { count }),
    show: (falls) => show(falls, (fall) => `${fall.run} ${fall.begin_ms}`),
  });

  function draw() {
    longestMs = frame.slowest[0]?.total_ms ?? 0;
    drawn = frame.slowest;
    showFew(frame.slowest);
  }

  const isSame = (falls) =>
    falls.length === drawn.length &&
    falls.every((fall, place) => fall.run === drawn[place].run && fall.begin_ms === drawn[place].begin_ms);

  return function update(next) {
    frame = next;
    empty.hidden = frame.slowest.length > 0;
    list.hidden = frame.slowest.length === 0;
    if (!isSame(frame.slowest)) draw();
  };
}
