// Run link: how a run is named in a list: a link to its page, its id where it has no page, or the word for one of another key.

import { h } from "../dom.js";
import { shortId } from "./format.js";

/** `hasPages()`: whether runs have pages here; a recorded file has none of texts, so none of runs. */
export function createRunLink({ words, hasPages }) {
  return function runLink(run) {
    if (run === null) return h("span", { class: "run-of-other" }, words.t("run_of_other"));
    const shown = { class: "run", title: run };
    return hasPages() ? h("a", { ...shown, href: `/runs/${encodeURIComponent(run)}` }, shortId(run)) : h("span", shown, shortId(run));
  };
}
