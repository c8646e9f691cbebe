// The time line: the whole run as one bar, true to scale, and below it the sum of its stations, which is the way to them.
//
// Owns the bar, the fan between bar and sum, the balance sign, and the slider that moves through the run's moments.

import { h, svg } from "../dom.js";
import { lookOf } from "../kinds.js";
import { barPaths, intervalAt, STATION_LOOKS } from "./ledger.js";
import { tableBehind } from "./station.js";

const FAN_WIDTH = 1000; // of the fan's own coordinates

/** "12.3 ms" in two parts: narrow screens have no room for the second. */
function withUnit(text) {
  const [figure, unit] = text.split(" ");
  return [figure, h("span", { class: "cell-unit" }, ` ${unit}`)];
}

/** `seek(ms or null)` shows a moment, or the whole run; `play` is {toggle, setPace}; PACES are its names. */
export function createTimelineView({ root, words, units, rich, seek, play, paces }) {
  const { t, duration } = words;
  const bar = svg("svg", { class: "ledger-bar", preserveAspectRatio: "none", "aria-hidden": "true" });
  const head = h("span", { class: "playhead", hidden: true });
  const tip = h("span", { class: "ledger-tip", hidden: true, "aria-hidden": "true" });
  const slider = h(
    "div",
    { class: "ledger-track", role: "slider", tabindex: "0", "aria-label": t("moment"), "aria-valuemin": 0 },
    bar,
    head,
    tip,
  );
  const fan = svg("svg", { class: "fan", viewBox: `0 0 ${FAN_WIDTH} 1`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const sum = h("ol", { class: "station-sum", "aria-label": t("station_sum") });
  const total = h("p", { class: "total" });
  const playButton = h("button", { type: "button", class: "button play", onclick: () => play.toggle() });
  const pace = h(
    "select",
    { class: "pace", "aria-label": t("pace"), onchange: (event) => play.setPace(event.target.value) },
    ...paces.map((name) => h("option", { value: name }, t(`pace_${name}`))),
  );
  const whole = h("button", { type: "button", class: "quiet", hidden: true, onclick: () => seek(null) }, t("whole_run"));
  const readout = h("p", { class: "readout" });
  const behind = h("div", { class: "timeline-behind" });
  const sumRow = h("div", { class: "sum-row" }, sum, total);
  root.append(
    h(
      "div",
      { class: "timeline-stick" },
      h("div", { class: "timeline-tools" }, playButton, pace, readout, whole),
      slider,
      fan,
      sumRow,
    ),
    behind,
  );

  let story = null;
  let at = null;
  let cells = [];

  const intervals = () => story.sequence.ledger.intervals;
  const totalMs = () => Math.max(story.sequence.ledger.total_ms, story.balance.sumMs, 1e-6);

  function momentText(ms) {
    const { kind } = intervals()[intervalAt(intervals(), ms)];
    const step = story.sequence.steps.findLastIndex((each) => each.begin_ms <= ms && ms <= each.begin_ms + each.ms);
    const what = step < 0 ? t(`kind_${kind}`) : t("kind_in_step", { kind: t(`kind_${kind}`), step: step + 1 });
    return t("moment_at", { duration: duration(ms), what });
  }

  function drawBar() {
    bar.setAttribute("viewBox", `0 0 ${totalMs()} 1`);
    const paths = Object.entries(barPaths(intervals()));
    bar.replaceChildren(...paths.map(([look, d]) => svg("path", { class: `look-${look}`, d })));
  }

  // The sum leaves room for the total at its right, the bar does not: the fan leads from one width to the other.
  function drawFan() {
    if (story === null || fan.clientWidth === 0) return;
    const number = story.stations.length;
    const sumWidth = (sum.clientWidth / fan.clientWidth) * FAN_WIDTH;
    const shapes = story.stations.map(({ name, beginMs, endMs }, index) => {
      const [left, right] = [beginMs, endMs].map((ms) => (ms / totalMs()) * FAN_WIDTH);
      const [from, to] = [index, index + 1].map((i) => (i / number) * sumWidth);
      return svg("path", { class: `fan-${STATION_LOOKS[name]}`, d: `M${left} 0H${right}L${to} 1H${from}Z` });
    });
    fan.replaceChildren(...shapes);
  }

  function drawSum() {
    const { isBalanced, sumMs, totalMs: wanted } = story.balance;
    const [parts, whole] = units.sum(
      story.stations.map(({ ms }) => ms),
      sumMs,
    );
    cells = story.stations.map(({ name, ms }, index) => {
      const link = h(
        "a",
        { href: `#station-${name}`, class: `station-cell cell-${STATION_LOOKS[name]}` },
        h(
          "span",
          { class: "cell-name" },
          h("span", { class: "number" }, String(index + 1)),
          h("span", { class: "cell-title" }, t(`station_${name}`)),
        ),
        h("span", { class: "cell-time" }, ...withUnit(parts[index])),
      );
      return h("li", { class: ms > 0 ? "" : "empty-station" }, link);
    });
    sum.replaceChildren(...cells);
    const sign = h("span", {
      class: isBalanced ? "sign" : "sign sign-off",
      title: t(isBalanced ? "balanced" : "unbalanced_short"),
    });
    sign.append(
      h("span", { "aria-hidden": "true" }, isBalanced ? "✓" : "≠"),
      h("span", { class: "visually-hidden" }, t(isBalanced ? "balanced" : "unbalanced_short")),
    );
    total.replaceChildren(h("span", { class: "equals" }, "="), h("strong", {}, whole), sign);
    const said = h(
      "p",
      { class: "note fault-text", role: "alert" },
      t("unbalanced", { sum: duration(sumMs), total: duration(wanted) }),
    );
    const note = isBalanced ? h("p", { class: "note" }, ...rich("balance_note", { total: whole })) : said;
    behind.replaceChildren(note, ledgerTable());
  }

  function ledgerTable() {
    const kinds = Object.entries(story.sequence.ledger.by_kind).filter(([, ms]) => ms > 0);
    const [parts, whole] = units.sum(
      kinds.map(([, ms]) => ms),
      story.balance.sumMs,
    );
    const share = (ms) => words.share(ms / totalMs());
    const marked = (kind) =>
      h("span", { class: `marked kind-${lookOf(kind) === "others" ? "wait" : lookOf(kind)}` }, t(`kind_${kind}`));
    const rows = () => [
      ...kinds.map(([kind, ms], index) => [marked(kind), parts[index], share(ms)]),
      [t("total"), whole, words.share(1)],
    ];
    return tableBehind({ label: t("ledger_table"), heads: [t("head_kind"), t("head_time"), t("head_share")], rows }, words);
  }

  function drawMoment() {
    const shown = at ?? totalMs();
    slider.setAttribute("aria-valuemax", totalMs().toFixed(3));
    slider.setAttribute("aria-valuenow", shown.toFixed(3));
    slider.setAttribute("aria-valuetext", at === null ? t("whole_run") : momentText(at));
    head.hidden = at === null;
    head.style.left = `${(shown / totalMs()) * 100}%`;
    whole.hidden = at === null;
    readout.textContent = at === null ? "" : momentText(at);
    slider.classList.toggle("at-moment", at !== null);
    bar.style.setProperty("--played", `${(shown / totalMs()) * 100}%`);
    story.stations.forEach(({ beginMs, endMs }, index) => {
      cells[index].classList.toggle("now", at !== null && beginMs <= at && at < endMs);
    });
  }

  new ResizeObserver(drawFan).observe(sum);

  const msUnder = (event) => {
    const { left, width } = slider.getBoundingClientRect();
    return Math.min(Math.max((event.clientX - left) / width, 0), 1) * totalMs();
  };

  function point(event) {
    if (story === null || event.pointerType === "touch") return;
    const ms = msUnder(event);
    tip.hidden = false;
    tip.textContent = momentText(ms);
    const share = ms / totalMs();
    tip.style.left = `${share * 100}%`;
    tip.style.transform = `translateX(${-share * 100}%)`;
  }

  slider.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    slider.setPointerCapture(event.pointerId);
    seek(msUnder(event));
  });
  slider.addEventListener("pointermove", (event) => {
    point(event);
    if (slider.hasPointerCapture(event.pointerId)) seek(msUnder(event));
  });
  slider.addEventListener("pointerleave", () => (tip.hidden = true));
  slider.addEventListener("keydown", (event) => {
    const now = at ?? totalMs();
    const list = intervals();
    const stops = {
      ArrowRight: () => list[intervalAt(list, now) + 1]?.begin_ms ?? null,
      ArrowUp: () => list[intervalAt(list, now) + 1]?.begin_ms ?? null,
      ArrowLeft: () => list.findLast(({ begin_ms: beginMs }) => beginMs < now - 1e-9)?.begin_ms ?? 0,
      ArrowDown: () => list.findLast(({ begin_ms: beginMs }) => beginMs < now - 1e-9)?.begin_ms ?? 0,
      PageUp: () => story.stations.find(({ beginMs }) => beginMs > now + 1e-9)?.beginMs ?? null,
      PageDown: () => story.stations.findLast(({ beginMs }) => beginMs < now - 1e-9)?.beginMs ?? 0,
      Home: () => 0,
      End: () => null,
      Escape: () => null,
    };
    const stop = stops[event.key];
    if (!stop) return;
    event.preventDefault();
    seek(stop());
  });

  return {
    draw(next) {
      story = next;
      drawBar();
      drawSum();
      drawFan();
      drawMoment();
    },
    at(ms) {
      at = ms;
      drawMoment();
    },
    playing(isPlaying) {
      playButton.textContent = t(isPlaying ? "pause" : "play");
      playButton.dataset.playing = String(isPlaying);
    },
  };
}
