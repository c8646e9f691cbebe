// Run link: how a run is named where there is little room: a link to its page, or the word for one of another key.
//
// Owns the short form of an id. The whole id is in the title.

import { h } from "./dom.js";

/** "chatcmpl-91aa07c35e2f10" -> "91aa07c3", enough to tell runs apart on one page; of an id that a client chose, both ends. */
export function shortId(id) {
  const random = id.match(/^[a-z]+[-_]([0-9a-f]{8})[0-9a-f]*$/);
  return random ? random[1] : id.length <= 18 ? id : `${id.slice(0, 9)}…${id.slice(-6)}`;
}

/** `run`: an id, or null where it may not be told. `hasPage`: not of a recorded file, which has no texts and so no runs to show. */
export function runLink(run, { t }, { hasPage = true } = {}) {
  if (run === null) return h("span", { class: "run-of-other" }, t("run_of_other"));
  const shown = { class: "run", title: run };
  return hasPage ? h("a", { ...shown, href: `/runs/${encodeURIComponent(run)}` }, shortId(run)) : h("span", shown, shortId(run));
}
