// Run link: how a run is named in a list: a link to its page, or the word for one of another key.

import { h } from "../dom.js";
import { shortId } from "./format.js";

export function runLink(words, run) {
  if (run === null) return h("span", { class: "run-of-other" }, words.t("run_of_other"));
  return h("a", { class: "run", href: `/runs/${encodeURIComponent(run)}`, title: run }, shortId(run));
}
