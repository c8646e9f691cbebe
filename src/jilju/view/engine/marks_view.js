// Marks: what happened besides steps: the list of it in the window, the newest first.

import { h } from "../dom.js";
import { createRows, setText } from "./rows.js";

const SHOWN_MAX = 20;
const FAULTS = ["refused", "shed", "deadline", "failed", "restart"];

export function createMarksView({ list, empty, words, format, linkRun }) {
  const show = createRows(list, () => {
    const when = h("time", {});
    const what = h("b", {});
    const text = h("span", { class: "mark-text", lang: "en" });
    const name = h("span", { class: "mark-run" });
    const element = h("li", { class: "mark" }, when, what, text, name);
    return {
      element,
      update({ mark, unixMs }) {
        setText(when, format.clock(unixMs));
        setText(what, words.markName(mark.kind));
        element.dataset.fault = String(FAULTS.includes(mark.kind));
        setText(text, mark.text);
        if (mark.run !== null && name.firstChild === null) name.append(linkRun(mark.run));
      },
    };
  });

  /** `marks` of the timeline's window, the oldest first. */
  return function update(frame, marks) {
    empty.hidden = marks.length > 0;
    list.hidden = marks.length === 0;
    const newest = marks.slice(-SHOWN_MAX).reverse();
    show(
      newest.map((mark) => ({ mark, unixMs: mark.at_ms + frame.unix_ms - frame.end_ms })),
      ({ mark }) => `${mark.at_ms} ${mark.kind} ${mark.run}`,
    );
  };
}
