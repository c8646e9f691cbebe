// Station 3, wait: a bar for each cause, and who held what was waited for; also what others cost inside its own steps.

import { h } from "../dom.js";
import { lookOf } from "../kinds.js";
import { blameOf } from "./ledger.js";
import { createStation, meter, owner } from "./station.js";

const BEFORE = ["admit", "link_in", "queue_step", "queue_rows", "queue_tokens", "queue_blocks", "queue_order", "queue_restart"];
const LATER = [
  "prefill_others",
  "decode_others",
  "stall_budget",
  "stall_blocks",
  "stall_preempted",
  "recompute",
  "restart",
  "client",
];
const SHOWN = 4; // culprits of one cause
const LEAST_BAR = 0.02; // of the longest, which is at least this share of the run: what is less has no bar to see
const LEAST_MS = 0.0005; // of a culprit: what is less is printed as nothing

export function createWaitView({ words, rich }) {
  const { t, duration, integer } = words;
  const station = createStation({ name: "wait", number: 3, words });

  function leadOf({ sequence, isRunning }, queuedMs) {
    if (sequence.steps.length === 0) return isRunning ? "lead_wait_so_far" : "lead_wait_only";
    return queuedMs > 0 ? "lead_wait" : "lead_no_wait";
  }

  /** What each run that shared a step with this one did there. */
  function deedsOf({ steps }) {
    const most = new Map(); // run -> {prefill, decode}: tokens
    for (const { run, count, is_prefill: isPrefill } of steps.flatMap((step) => step.neighbours)) {
      const own = most.get(run) ?? { prefill: 0, decode: 0 };
      own[isPrefill ? "prefill" : "decode"] += count;
      most.set(run, own);
    }
    const text = ({ prefill, decode }) =>
      t(prefill > 0 && decode > 0 ? "did_both" : prefill > 0 ? "did_prefill" : "did_decode", { prefill, decode });
    return new Map([...most].map(([run, own]) => [run, text(own)]));
  }

  function culprits(intervals, kind, deeds) {
    const found = blameOf(intervals, [kind]).filter(({ ms }) => ms > LEAST_MS);
    if (found.length === 0) return null;
    const items = found.slice(0, SHOWN).map((each) => {
      const did = deeds.get(each.run);
      return h(
        "li",
        {},
        owner(each, words),
        h("span", { class: "culprit-time" }, duration(each.ms)),
        did ? h("span", { class: "culprit-did" }, did) : null,
      );
    });
    const rest = found.slice(SHOWN);
    if (rest.length > 0)
      items.push(
        h(
          "li",
          {},
          t("more_runs", { runs: integer(rest.length), duration: duration(rest.reduce((sum, { ms }) => sum + ms, 0)) }),
        ),
      );
    return h("ul", { class: "culprits" }, ...items);
  }

  function causes({ sequence }, kinds, longest) {
    const deeds = deedsOf(sequence);
    const byKind = sequence.ledger.by_kind;
    return kinds
      .filter((kind) => byKind[kind] > 0)
      .map((kind) => {
        const row = h(
          "div",
          { class: "cause" },
          h("span", { class: "cause-name" }, t(`kind_${kind}`)),
          h("span", { class: "cause-time" }, duration(byKind[kind])),
          byKind[kind] / longest < LEAST_BAR ? null : meter(byKind[kind] / longest, lookOf(kind)),
        );
        return h("li", {}, row, culprits(sequence.ledger.intervals, kind, kind.endsWith("_others") ? deeds : new Map()));
      });
  }

  return {
    station,
    draw(story) {
      const { sequence } = story;
      const byKind = sequence.ledger.by_kind;
      const queued = BEFORE.filter((kind) => kind.startsWith("queue_")).reduce((sum, kind) => sum + (byKind[kind] ?? 0), 0);
      station.say(
        rich(leadOf(story, queued), { duration: duration(queued), reach: duration((byKind.admit ?? 0) + (byKind.link_in ?? 0)) }),
      );
      // waits that are next to nothing in the run have no bar, however they compare
      const longest = Math.max(sequence.ledger.total_ms * LEAST_BAR, ...[...BEFORE, ...LATER].map((kind) => byKind[kind] ?? 0));
      const before = causes(story, BEFORE, longest);
      const later = causes(story, LATER, longest);
      const parts = [h("ul", { class: "causes" }, ...before)];
      if (later.length > 0) parts.push(h("h3", {}, ...rich("later_waits")), h("ul", { class: "causes" }, ...later));
      station.body.replaceChildren(...parts);
    },
  };
}
