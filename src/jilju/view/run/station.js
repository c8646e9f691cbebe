// A station: the frame that all seven parts of the way share, and small drawings that several of them use.

import { h } from "../dom.js";
import { runLink } from "../run_link.js";
import { textOfBytes, visible } from "./units.js";

/** Returns {section, body, say, showTime}. `lead` is one sentence, of nodes. */
export function createStation({ name, number, words }) {
  const lead = h("p", { class: "lead" });
  const time = h("span", { class: "station-time" });
  const body = h("div", { class: "station-body" });
  const title = h("h2", { id: `title-${name}` }, h("span", { class: "number" }, String(number)), words.t(`station_${name}`));
  const section = h(
    "section",
    { class: "station", id: `station-${name}`, "aria-labelledby": `title-${name}` },
    h("header", { class: "station-head" }, title, time),
    lead,
    body,
  );
  return {
    section,
    body,
    say: (nodes) => lead.replaceChildren(...nodes),
    showTime: (text) => (time.textContent = text),
  };
}

/** Draws anew, and the focus is where it was: on the element that stands in the same place now. */
export function keepFocus(root, draw) {
  const focused = document.activeElement;
  const path = [];
  if (root.contains(focused)) {
    for (let element = focused; element !== root; element = element.parentElement)
      path.unshift([...element.parentElement.children].indexOf(element));
  }
  draw();
  if (path.length === 0 || focused.isConnected) return;
  let element = root;
  for (const index of path) element = element?.children[index];
  element?.focus({ preventScroll: true });
}

/** Who it was: a link to the run, this call itself, or somebody whose run is not for these eyes. */
export function owner({ run, isSelf = false }, words) {
  return isSelf ? h("span", {}, words.t("owner_self")) : runLink(run, words);
}

/** A token's text as a chip shows it: its own text, or its bytes if they are only a part of a character. */
export function tokenText(token, units) {
  const text = textOfBytes(token.bytes);
  if (text !== null) return h("span", { class: "token-text" }, visible(text));
  return h("span", { class: "token-text token-bytes" }, units.hex(token.bytes) || "–");
}

/** A bar from the left, `share` of its row; the figure stands beside it as text. */
export function meter(share, look) {
  const fill = h("span", { class: `meter-fill look-${look}` });
  fill.style.width = `${Math.min(Math.max(share, 0), 1) * 100}%`;
  return h("span", { class: "meter", "aria-hidden": "true" }, fill);
}

/** A closed table behind a chart, built when it is opened first. `rows()` gives rows of cells; the first cell names the row. */
export function tableBehind({ label, heads, rows }, { t }) {
  const SHOWN = 200;
  const table = h("table", {}, h("thead", {}, h("tr", {}, ...heads.map((head) => h("th", { scope: "col" }, head)))));
  const bodyRows = h("tbody");
  const caption = h("caption", { class: "visually-hidden" }, label);
  table.prepend(caption);
  table.append(bodyRows);
  const wrap = h("div", { class: "table-wrap", tabindex: "0", role: "region", "aria-label": label }, table);
  const details = h("details", { class: "behind" }, h("summary", {}, t("as_table")), wrap);
  let left = null;
  const more = h("button", { type: "button", class: "quiet", onclick: () => grow() });

  function grow() {
    const next = left.splice(0, SHOWN);
    bodyRows.append(
      ...next.map(([head, ...cells]) => h("tr", {}, h("th", { scope: "row" }, head), ...cells.map((cell) => h("td", {}, cell)))),
    );
    if (left.length > 0) {
      more.textContent = t("more_rows", { rows: left.length });
      wrap.after(more);
    } else more.remove();
  }

  details.addEventListener("toggle", () => {
    if (!details.open || left !== null) return;
    left = rows();
    grow();
  });
  return details;
}
