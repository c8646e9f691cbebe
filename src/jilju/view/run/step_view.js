// One step: the token it chose and the ones it did not, where its time went, what it moved, and who was in it besides.
//
// Owns the panel below the row of decode. It shows steps of prefill as well.

import { h } from "../dom.js";
import { owner, meter, tokenText } from "./station.js";
import { term } from "../term.js";

const NEIGHBOURS_SHOWN = 6;

/** `panel` is the element to put somewhere; `move(by)` chooses another step. */
export function createStepView({ words, units, rich, move }) {
  const { t, duration, bytes } = words;
  const panel = h("section", { class: "step", "aria-label": t("chosen_step") });
  let drawn = [];

  function head({ sequence }, index) {
    const step = sequence.steps[index];
    const button = (by, sign, label) => {
      const off = index + by < 0 || index + by >= sequence.steps.length;
      return h(
        "button",
        { type: "button", class: "quiet step-move", "aria-label": label, title: label, disabled: off, onclick: () => move(by) },
        sign,
      );
    };
    const title = h(
      "h2",
      {},
      t("step_title", {
        number: index + 1,
        steps: sequence.steps.length,
        kind: t(step.is_recompute ? "kind_recompute" : `step_${step.kind}`),
      }),
    );
    return h("header", { class: "step-head" }, title, button(-1, "←", t("step_before")), button(1, "→", t("step_after")));
  }

  function alternatives(token) {
    const rows = [...token.top];
    if (!rows.some((each) => each.id === token.id))
      rows.push({ id: token.id, text: token.text, bytes: token.bytes, logprob: token.logprob });
    const rest = 1 - rows.reduce((sum, { logprob }) => sum + Math.exp(logprob), 0);
    const items = rows.map((each) => {
      const share = Math.exp(each.logprob);
      const isChosen = each.id === token.id;
      const text = tokenText(each, units);
      const mark = isChosen ? h("span", { class: "visually-hidden" }, ` (${t("chosen")})`) : null;
      return h(
        "li",
        { class: isChosen ? "alternative taken" : "alternative" },
        text,
        meter(share, isChosen ? "decode" : "wait"),
        h("span", { class: "alternative-share" }, words.share(share), mark),
      );
    });
    if (rest > 0.0005)
      items.push(
        h(
          "li",
          { class: "alternative rest" },
          h("span", {}, t("all_other_tokens")),
          meter(rest, "wait"),
          h("span", { class: "alternative-share" }, words.share(rest)),
        ),
      );
    return h("ol", { class: "alternatives" }, ...items);
  }

  function choice({ sequence }, index) {
    const tokens = sequence.output.filter((token) => token.step_index === index);
    const step = sequence.steps[index];
    const holes = { from: step.start + 1, to: step.start + step.count };
    const why = step.is_recompute ? h("p", { class: "note" }, ...rich("computed_again", holes)) : null;
    if (tokens.length === 0) {
      const note = why ?? h("p", { class: "note" }, ...rich("no_token_chunk", holes));
      return h("div", { class: "step-part" }, h("h3", {}, t("no_token")), note);
    }
    const parts = tokens.flatMap((token) => {
      const chip = h(
        "span",
        { class: "chip chip-output" },
        tokenText(token, units),
        h("span", { class: "token-id" }, String(token.id)),
      );
      const line = h(
        "p",
        { class: "chosen-token" },
        chip,
        h("span", { class: "quiet-text" }, token.is_special ? t("token_special") : units.hex(token.bytes)),
      );
      if (token.logprob === null) return [line, h("p", { class: "note" }, ...rich("no_logprobs"))];
      return [line, alternatives(token)];
    });
    const title = h("h3", {}, ...rich("choice_title"));
    return h("div", { class: "step-part" }, title, ...parts, why);
  }

  function time(step) {
    const ownLook = step.is_recompute ? "fault" : step.kind;
    const rows = [
      ["part_schedule", step.schedule_ms, "host"],
      ["part_pack", step.pack_ms, "host"],
      ["part_own", step.own_ms, ownLook],
      ["part_others", step.others_ms, "others"],
      ["part_commit", step.commit_ms, "host"],
    ];
    const [texts, total] = units.sum(
      rows.map(([, ms]) => ms),
      step.ms,
    );
    const unnamed = Math.abs(rows.reduce((sum, [, ms]) => sum + ms, 0) - step.ms) > 0.01;
    const items = rows.map(([key, ms, look], i) =>
      h(
        "tr",
        {},
        h("th", { scope: "row" }, h("span", { class: `swatch look-${look}` }), ...rich(key)),
        h("td", {}, texts[i]),
        h("td", { class: "bar-cell" }, meter(ms / step.ms, look)),
      ),
    );
    const sign = h("span", { class: unnamed ? "sign sign-off" : "sign" }, unnamed ? "≠" : "✓");
    const error = (step.predicted_ms - step.ms) / step.ms;
    const off = words.signedShare(error);
    const foot = h("tr", { class: "sum" }, h("th", { scope: "row" }, t("total")), h("td", {}, total), h("td", {}, sign));
    const predicted = h(
      "tr",
      { class: "quiet-text" },
      h("th", { scope: "row" }, term("predicted", t("predicted"))),
      h("td", {}, duration(step.predicted_ms)),
      h("td", {}, off),
    );
    return h(
      "div",
      { class: "step-part" },
      h("h3", {}, t("step_time")),
      h("table", { class: "figures-table" }, h("tbody", {}, ...items, foot, predicted)),
    );
  }

  function work({ run }, step) {
    const context = step.start + step.count;
    const row = (name, label, value, extra = null) =>
      h("tr", {}, h("th", { scope: "row" }, term(name, t(label))), h("td", {}, value), h("td", { class: "bar-cell" }, extra));
    const share = (value, look) =>
      value === null ? null : h("span", { class: "roof" }, meter(value, look), h("span", {}, words.share(value)));
    const rows = [
      row("moved", "bytes_moved", bytes(step.bytes), share(step.memory_roof_share, "decode")),
      row("flop", "arithmetic", words.flops(step.flops), share(step.compute_roof_share, "prefill")),
      row("intensity", "intensity", t("flop_per_byte", { number: words.number(step.flops / Math.max(step.bytes, 1), 2) })),
      row("kv", "kv_read", bytes(context * run.machine.kv_bytes_per_token), t("of_tokens", { tokens: context })),
    ];
    const note = h("p", { class: "note" }, ...rich(step.rows > 1 ? "work_note_shared" : "work_note", { rows: step.rows }));
    return h(
      "div",
      { class: "step-part" },
      h("h3", {}, ...rich("step_work")),
      h("table", { class: "figures-table" }, h("tbody", {}, ...rows)),
      note,
    );
  }

  function neighbours({ run }, step) {
    const items = step.neighbours.slice(0, NEIGHBOURS_SHOWN).map((each) => {
      const did = rich.plain(each.is_prefill ? "neighbour_prefill" : "neighbour_decode", { tokens: each.count });
      return h(
        "li",
        {},
        h("span", { class: `swatch look-${each.is_prefill ? "prefill" : "decode"}` }),
        owner({ run: each.run, isSelf: each.run === run.id }, words),
        h("span", { class: "quiet-text" }, did),
      );
    });
    const rest = step.rows - 1 - items.length;
    if (rest > 0) items.push(h("li", {}, t("more_neighbours", { rows: rest })));
    const body = items.length > 0 ? h("ul", { class: "neighbours" }, ...items) : h("p", { class: "note" }, t("alone"));
    return h("div", { class: "step-part" }, h("h3", {}, ...rich("step_neighbours", { rows: step.rows })), body);
  }

  return {
    panel,
    draw(story, index) {
      const step = story.sequence?.steps[index];
      panel.hidden = step === undefined;
      if (step === undefined) return;
      // the same step again, as polling brings it: its token may be new, all else is drawn
      const mark = [
        step.serial,
        story.sequence.index,
        story.sequence.steps.length,
        story.sequence.output.filter((token) => token.step_index === index).length,
      ];
      if (String(mark) === String(drawn)) return;
      drawn = mark;
      const focused = panel.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
      panel.replaceChildren(
        head(story, index),
        h("div", { class: "step-parts" }, choice(story, index), time(step), work(story, step), neighbours(story, step)),
      );
      if (focused) panel.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
    },
  };
}
