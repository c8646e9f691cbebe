// Steps table: the last steps as figures, for who reads rather than looks; each row picks its step.
//
// Owns the table. It is drawn only while it is open, and never while something in it has focus.

import { h } from "../dom.js";

const SHOWN = 25;
const COLUMNS = ["when", "ms", "predicted", "host", "prefill", "decode", "rows", "waiting"];

export function createStepsTableView({ details, words, format, store, steps, select }) {
  const { t, duration, integer } = words;
  const body = h("tbody", {});
  const heads = ["step", ...COLUMNS].map((name) => h("th", { scope: "col" }, t(`table_${name}`)));
  const title = t("table_title");
  const caption = h("caption", { class: "visually-hidden" }, title);
  const table = h("table", { class: "sum-table steps-table" }, caption, h("thead", {}, h("tr", {}, ...heads)), body);
  const place = h("div", { class: "table-scroll", tabindex: 0, role: "region", "aria-label": title }, table);
  details.append(h("summary", {}, title), place);

  function line(step, frame) {
    const pick = h("button", { type: "button", class: "pick", onclick: () => select(step.serial) }, integer(step.serial));
    const cells = [
      format.clockMs(step.begin_ms + frame.unix_ms - frame.end_ms),
      duration(step.ms),
      duration(step.predicted_ms),
      duration(step.host_ms),
      ...[step.prefill_tokens, step.decode_tokens, step.rows, step.waiting].map(integer),
    ];
    return h("tr", {}, h("th", { scope: "row" }, pick), ...cells.map((text) => h("td", {}, text)));
  }

  function update() {
    const { frame } = store.get();
    if (!details.open || frame === null || body.contains(document.activeElement)) return;
    const from = Math.max(0, steps.length - SHOWN);
    const lines = Array.from({ length: steps.length - from }, (_, place) => line(steps.at(steps.length - 1 - place), frame));
    body.replaceChildren(...lines);
  }
  details.addEventListener("toggle", update);
  return update;
}
