// Timeline: the steps of the last minute on a canvas, which can be zoomed, pointed at and walked through with the keyboard.
//
// Owns the view on time (what part of the minute, and whether it moves on), hover and the words beside the lanes. A step that
// is picked goes to `select(serial)`; what picking means, the page knows. Draws on new data, on a gesture and on a new theme,
// never on a timer.

import { h } from "../dom.js";
import { term } from "../term.js";
import { createPalette } from "./palette.js";
import { setText } from "./rows.js";
import { drawTimeline, LANES, markClusters } from "./timeline_draw.js";

const SPANS_MS = [60_000, 20_000, 5000, 1000];
const DRAG_PX = 4; // less is a press

/** `store` holds {frame, mode, selected}; `steps` is the data. Returns {stage, zoom, walk, changed}. */
export function createTimelineView({ words, format, store, steps, select }) {
  const { t, duration } = words;
  const spoken = { role: "slider", "aria-label": t("timeline_label"), "aria-describedby": "timeline-hint" };
  const canvas = h("canvas", { class: "timeline-canvas", tabindex: 0, ...spoken });
  const ctx = canvas.getContext("2d");
  const tip = h("div", { class: "tip", hidden: true });
  const lanes = ["prefill", "decode", "time", "waiting"].map((name) => lane(name));
  const stage = h("div", { class: "timeline-stage" }, canvas, ...lanes.map(({ element }) => element), tip);
  const zoom = h("div", { class: "segments", role: "radiogroup", "aria-label": t("zoom") }, ...SPANS_MS.map(zoomButton));
  const quiet = h("p", { class: "timeline-quiet", hidden: true });
  stage.append(quiet);

  let spanMs = SPANS_MS[0];
  let pinnedEndMs = null; // the view's end while it does not follow the steps
  let hover = -1;
  let width = 0;
  let isDue = false;
  let drag = null; // {x, endMs, isMoved}
  const palette = createPalette(invalidate);

  function lane(name) {
    const top = h("span", {});
    const legend = name === "time" ? h("span", { class: "lane-legend" }, t("lane_time_legend"), " · ") : null;
    const key = { prefill: "prefill", decode: "decode", time: "step_time", waiting: "queue_length" }[name];
    const element = h("p", { class: `lane lane-${name}` }, term(key, t(`lane_${name}`)), h("span", {}, legend, top));
    element.style.top = `${LANES[name].title}px`;
    return { name, element, top };
  }

  function zoomButton(ms) {
    const label = duration(ms);
    const input = h("input", { type: "radio", name: "zoom", value: ms, checked: ms === SPANS_MS[0], onchange: () => setSpan(ms) });
    return h("label", {}, input, h("span", {}, label));
  }

  const view = () => {
    const endMs = pinnedEndMs ?? steps.endMs;
    return { beginMs: endMs - spanMs, endMs };
  };
  const selectedIndex = () => (store.get().selected === null ? -1 : steps.indexOf(store.get().selected));
  const toUnix = (ms) => ms + store.get().frame.unix_ms - store.get().frame.end_ms;

  function invalidate() {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(draw);
  }

  function draw() {
    isDue = false;
    const { frame, mode } = store.get();
    if (frame === null || width === 0) return;
    const scale = devicePixelRatio;
    const pixels = [Math.round(width * scale), Math.round(LANES.height * scale)];
    if (canvas.width !== pixels[0] || canvas.height !== pixels[1]) [canvas.width, canvas.height] = pixels;
    const { tops, isEmpty } = drawTimeline({
      ctx,
      width,
      scale,
      steps,
      view: view(),
      colours: palette(),
      clock: (ms) => format.clock(toUnix(ms)),
      clockMs: (ms) => format.clockMs(toUnix(ms)),
      toUnix,
      markName: (kind) => words.markName(kind),
      selected: selectedIndex(),
      hover,
      momentMs: mode === "live" ? null : frame.end_ms,
    });
    for (const { name, top } of lanes) {
      setText(top, t("lane_scale", { top: name === "time" ? duration(tops.time) : tops[name] }));
    }
    quiet.hidden = !isEmpty;
    if (isEmpty) setText(quiet, t("timeline_quiet", { span: duration(spanMs) }));
  }

  // The view

  function setSpan(ms) {
    const middle = selectedIndex() >= 0 ? steps.at(selectedIndex()).begin_ms : null;
    spanMs = ms;
    if (middle !== null) pinnedEndMs = within(middle + ms / 2);
    for (const input of zoom.querySelectorAll("input")) input.checked = Number(input.value) === ms;
    invalidate();
  }

  function zoomBy(places) {
    const place = SPANS_MS.indexOf(spanMs) + places;
    if (place >= 0 && place < SPANS_MS.length) setSpan(SPANS_MS[place]);
  }

  const within = (endMs) => Math.min(steps.endMs, Math.max(endMs, steps.endMs - SPANS_MS[0] + spanMs));

  function reveal(index) {
    const { begin_ms: beginMs, ms } = steps.at(index);
    pinnedEndMs ??= steps.endMs;
    const { beginMs: left, endMs: right } = view();
    if (beginMs < left || beginMs + ms > right) pinnedEndMs = within(beginMs + ms / 2 + spanMs / 2);
  }

  // Pointing

  const indexAt = (x) => {
    const { beginMs, endMs } = view();
    return steps.nearest(beginMs + (x / width) * (endMs - beginMs));
  };

  function point(event) {
    const x = event.offsetX;
    if (drag) {
      drag.isMoved ||= Math.abs(x - drag.x) > DRAG_PX;
      if (drag.isMoved && pinnedEndMs !== null) pinnedEndMs = within(drag.endMs - ((x - drag.x) / width) * spanMs);
    }
    const isAtMarks = event.offsetY < LANES.prefill.title;
    const marks = isAtMarks ? markClusters(steps.marks, view(), width).find((each) => Math.abs(each.x - x) < 8) : null;
    hover = marks ? -1 : indexAt(x);
    if (drag?.isMoved) hover = -1;
    drawTip(x, marks?.marks);
    invalidate();
  }

  function unpoint() {
    hover = -1;
    tip.hidden = true;
    invalidate();
  }

  function drawTip(x, marks) {
    tip.hidden = hover < 0 && !marks;
    if (tip.hidden) return;
    tip.replaceChildren(...(marks ? marks.slice(-6).map(markLine) : stepLines(steps.at(hover))));
    const left = Math.min(Math.max(0, x + 12), Math.max(0, width - tip.offsetWidth));
    const isOver = x > left - 8 && x < left + tip.offsetWidth; // at the right end it goes to the other side
    tip.style.transform = `translateX(${isOver ? Math.max(0, x - tip.offsetWidth - 12) : left}px)`;
  }

  const markLine = (mark) => h("p", {}, h("b", {}, words.markName(mark.kind)), ` ${format.clockMs(toUnix(mark.at_ms))} ${mark.text}`);

  function stepLines(step) {
    const error = words.signedShare((step.predicted_ms - step.ms) / step.ms);
    return [
      h("p", {}, h("b", {}, t("step_name", { serial: words.integer(step.serial) })), ` ${format.clockMs(toUnix(step.begin_ms))}`),
      h("p", {}, t("step_time", { measured: duration(step.ms), predicted: duration(step.predicted_ms), error })),
      h("p", {}, t("step_tokens", { prefill: step.prefill_tokens, decode: step.decode_tokens, rows: step.rows })),
      h("p", {}, t("step_waiting", { waiting: step.waiting })),
    ];
  }

  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerleave", () => drag === null && unpoint());
  canvas.addEventListener("pointerdown", (event) => {
    drag = { x: event.offsetX, endMs: view().endMs, isMoved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointerup", (event) => {
    const wasMoved = drag?.isMoved;
    drag = null;
    const index = indexAt(event.offsetX);
    if (!wasMoved && index >= 0) pick(index);
    if (event.pointerType !== "mouse") unpoint();
  });
  canvas.addEventListener("pointercancel", () => {
    drag = null;
    unpoint();
  });
  canvas.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey) return; // a plain wheel scrolls the page
      event.preventDefault();
      zoomBy(event.deltaY < 0 ? 1 : -1);
    },
    { passive: false },
  );

  // Walking

  const pick = (index) => select(steps.at(index).serial);

  function walk(places) {
    if (steps.length === 0) return;
    const at = selectedIndex();
    pick(at < 0 ? steps.length - 1 : Math.min(steps.length - 1, Math.max(0, at + places)));
  }

  const KEYS = {
    ArrowLeft: () => walk(-1),
    ArrowRight: () => walk(1),
    PageUp: () => walk(10),
    PageDown: () => walk(-10),
    Home: () => walk(-steps.length),
    End: () => walk(steps.length),
    "+": () => zoomBy(1),
    "=": () => zoomBy(1),
    "-": () => zoomBy(-1),
  };
  canvas.addEventListener("keydown", (event) => {
    const act = KEYS[event.key];
    if (!act || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    act();
  });

  // What a screen reader hears when a person walks, and only then: the value changes with the selection.
  function describe() {
    const at = selectedIndex();
    const step = at < 0 ? null : steps.at(at);
    canvas.setAttribute("aria-valuemin", 0);
    canvas.setAttribute("aria-valuemax", Math.max(0, steps.length - 1));
    canvas.setAttribute("aria-valuenow", Math.max(0, at));
    canvas.setAttribute("aria-valuetext", step ? stepLines(step).map((line) => line.textContent).join(". ") : t("timeline_none"));
  }

  new ResizeObserver(([entry]) => {
    width = entry.contentRect.width;
    invalidate();
  }).observe(stage);
  describe();

  return {
    stage,
    zoom,
    walk,
    /** New data, or another selection. */
    changed() {
      if (selectedIndex() < 0) pinnedEndMs = null;
      else reveal(selectedIndex());
      hover = -1;
      tip.hidden = true;
      describe();
      invalidate();
    },
  };
}
