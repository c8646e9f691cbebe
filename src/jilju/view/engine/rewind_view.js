// Rewind: the bar that says which moment the page shows, and goes to another one.
//
// Owns the slider, the way back to now and the line about the connection. All that stands above it shows that moment.

import { h, icon } from "../dom.js";
import { explain } from "../faults.js";
import { setText } from "./rows.js";

const STEP_MS = 1000;
const LOSSES = ["network", "connection_lost"];
const LEAPS_MS = { PageUp: 10_000, PageDown: -10_000 };

/** `go(endMs)` shows a moment, `live()` the present, `end()` the end of a file, `retry()` tries the connection again, `askKey()` a key. */
export function createRewindView({ root, notice, status, words, format, go, live, end, retry, askKey }) {
  const { t } = words;
  const lamp = h("span", { class: "live-lamp", "aria-hidden": "true" });
  const liveText = h("span", {});
  const liveButton = h("button", { type: "button", class: "button live", id: "live" }, lamp, liveText);
  const span = { step: STEP_MS, min: 0, max: STEP_MS, value: STEP_MS };
  const slider = h("input", { type: "range", class: "slider", id: "rewind", "aria-label": t("rewind_label"), ...span });
  const when = h("p", { class: "when" });
  const ago = h("span", { class: "ago" });
  const button = (label, path, onclick) =>
    h("button", { type: "button", class: "quiet", "aria-label": label, title: label, onclick }, icon(path));
  const back = button(t("rewind_back"), "M11 5l-5 5 5 5M16 5l-5 5 5 5", () => leap(LEAPS_MS.PageDown));
  const on = button(t("rewind_on"), "M9 5l5 5-5 5M4 5l5 5-5 5", () => leap(LEAPS_MS.PageUp));
  const clock = h("b", {});
  when.append(clock, " ", ago);
  root.append(liveButton, back, slider, on, when);

  let range = { firstMs: 0, lastMs: 1 };
  let shown = { frame: null, mode: "live", isMoment: true };
  let isHeld = false; // a person holds the thumb: what comes in meanwhile does not move it

  // The slider counts from the first moment, so that its end is a whole number of steps away.
  const toMs = () => Math.min(range.firstMs + Number(slider.value), range.lastMs);
  const isAtEnd = () => Number(slider.value) >= Number(slider.max);

  function leap(ms) {
    slider.value = Number(slider.value) + ms;
    choose();
  }

  function choose() {
    if (isAtEnd() && shown.mode !== "file") live();
    else if (isAtEnd()) end();
    else go(toMs());
    say();
  }

  function say() {
    const { frame } = shown;
    if (frame === null) return;
    const atMs = isHeld || !shown.isMoment ? toMs() : frame.end_ms;
    const unixMs = atMs + frame.unix_ms - frame.end_ms;
    setText(clock, format.clock(unixMs));
    const before = (range.lastMs - atMs) / 1000;
    const agoText = before < 1 ? "" : t(shown.mode === "file" ? "before_end" : "before_now", { ago: format.long(Math.round(before)) });
    setText(ago, agoText);
    slider.setAttribute("aria-valuetext", `${format.clock(unixMs)} ${agoText}`);
  }

  liveButton.addEventListener("click", () => (shown.mode === "file" ? end() : live()));
  slider.addEventListener("pointerdown", () => (isHeld = true));
  slider.addEventListener("pointerup", () => (isHeld = false));
  slider.addEventListener("pointercancel", () => (isHeld = false));
  slider.addEventListener("input", choose);
  slider.addEventListener("keydown", (event) => {
    if (!(event.key in LEAPS_MS)) return;
    event.preventDefault();
    leap(LEAPS_MS[event.key]);
  });

  function drawNotice({ state, error, retryMs }) {
    notice.hidden = state !== "lost";
    if (notice.hidden) return;
    const { title, advice, params } = explain(error);
    const isKey = error.code === "invalid_api_key";
    const what = retryMs === null ? t(advice, params) : t("lost_retry", { seconds: Math.round(retryMs / 1000) });
    const act = h("button", { type: "button", class: "button", onclick: isKey ? askKey : retry }, t(isKey ? "give_key" : "try_again"));
    const seen = shown.frame ? ` ${t("lost_shown", { clock: format.clock(shown.frame.unix_ms) })}` : "";
    const isLoss = retryMs !== null && LOSSES.includes(error.code);
    notice.replaceChildren(h("p", {}, h("strong", {}, t(isLoss ? "lost_title" : title)), ` ${what}${seen}`), act);
  }

  let wasLost = false; // said once, not at each try
  return {
    /** The page's state. While a moment is on its way (isMoment is false) the thumb stays where a person has put it. */
    update({ frame, mode, link, isMoment }) {
      shown = { frame, mode, isMoment };
      root.dataset.mode = mode;
      root.dataset.link = link.state;
      setText(liveText, t(mode === "file" ? "file_end" : mode === "past" ? "to_live" : link.state === "live" ? "live" : "connecting"));
      liveButton.setAttribute("aria-pressed", String(mode === "live"));
      drawNotice(link);
      if (link.state !== "connecting" && wasLost !== (link.state === "lost")) {
        wasLost = !wasLost;
        setText(status, t(wasLost ? "said_lost" : "said_back"));
      }
      if (frame === null) return;
      const lastMs = mode === "live" ? frame.end_ms : Math.max(range.lastMs, frame.end_ms);
      range = { firstMs: frame.first_ms, lastMs };
      slider.max = Math.ceil((range.lastMs - range.firstMs) / STEP_MS) * STEP_MS;
      if (isMoment && !isHeld) slider.value = mode === "live" ? slider.max : Math.ceil((frame.end_ms - range.firstMs) / STEP_MS) * STEP_MS;
      say();
    },
  };
}
