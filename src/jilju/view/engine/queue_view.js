// Queue: who waits, why, since when, until when, and who holds what it waits for.
//
// Owns the list. Knows nothing of how the engine decides: the cause comes with each row.

import { h } from "../dom.js";
import { term } from "../term.js";
import { createFew, createRows, setText } from "./rows.js";

const FEW = 6;
const CAUSES = ["step", "rows", "tokens", "blocks", "order", "restart", "grammar"];

export function createQueueView({ list, more, empty, words, linkRun }) {
  const { t, duration } = words;
  let frame = null;

  function holderText({ holders }) {
    if (holders.length === 0) return [];
    const names = holders.slice(0, 3).flatMap(({ run, share }, place) => [place > 0 ? ", " : "", linkRun(run), ` ${words.share(share)}`]);
    return [t("queue_held_by"), " ", ...names];
  }

  function startText({ predicted_start_ms: startMs }) {
    if (startMs === null) return t("queue_start_unknown");
    return startMs <= frame.end_ms ? t("queue_start_due") : t("queue_start", { in: duration(startMs - frame.end_ms) });
  }

  const show = createRows(list, () => {
    const name = h("span", { class: "wait-run" });
    const since = h("span", { class: "wait-since" });
    const cause = h("span", { class: "wait-cause" });
    const start = h("span", { class: "wait-start" });
    const holders = h("span", { class: "wait-holders" });
    let drawn = {};
    return {
      element: h("li", { class: "wait" }, name, cause, since, start, holders),
      update(row) {
        if (drawn.run !== row.run) name.replaceChildren(linkRun(row.run));
        if (drawn.cause !== row.cause) {
          const known = CAUSES.includes(row.cause);
          cause.replaceChildren(known ? term(`cause_${row.cause}`, t(`cause_${row.cause}`)) : row.cause);
        }
        const held = JSON.stringify(row.holders);
        if (drawn.held !== held) holders.replaceChildren(...holderText(row));
        drawn = { run: row.run, cause: row.cause, held };
        setText(since, t("queue_since", { since: duration(Math.max(0, frame.end_ms - row.since_ms)), tokens: row.prompt_tokens }));
        setText(start, startText(row));
      },
    };
  });

  const showFew = createFew({
    few: FEW,
    button: more,
    label: (count, isOpen) => t(isOpen ? "show_few" : "show_all", { count }),
    show: (rows) => show(rows, ({ run, since_ms: since }) => run ?? `other ${since}`),
  });

  return function update(next) {
    frame = next;
    empty.hidden = frame.waiting.length > 0;
    list.hidden = frame.waiting.length === 0;
    showFew(frame.waiting);
  };
}
