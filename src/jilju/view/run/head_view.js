// The head: what went in, what came out and how long it took, in one sentence and a row of figures.
//
// Owns the section above the time line. Knows nothing of steps or tokens but their numbers.

import { h } from "../dom.js";
import { term } from "../term.js";

const STATES = { completed: "good", running: "live", client_cancelled: "left", deadline: "bad", shed: "bad", failed: "bad" };

/** `choose(index)` picks an answer; `trace()` downloads the trace. */
export function createHeadView({ root, words, rich, choose, trace }) {
  const { t, duration } = words;

  function summary({ run, prompt, sequence, isRunning }) {
    const total = duration(run.total_ms);
    if (sequence === null && run.status >= 400) return h("p", { class: "summary" }, ...rich("summary_refused", { duration: total }));
    if (prompt === null) return h("p", { class: "summary" }, ...rich("summary_unkept", { duration: total }));
    const out = sequence?.output.length ?? 0;
    const cached = prompt.cache?.hit_tokens ?? 0;
    const key = `summary_${out > 0 ? "answered" : "silent"}${cached > 0 ? "_cached" : ""}`;
    const time = duration(sequence?.ledger.total_ms ?? run.total_ms);
    const nodes = rich(key, { tokens: prompt.num_tokens, cached, out, duration: time });
    return h("p", { class: "summary" }, ...nodes, isRunning ? ` ${t("so_far")}` : null);
  }

  function state({ run, sequence }) {
    const reason = sequence?.finish_reason === "stop" && sequence.stop_reason !== null ? "stop_text" : sequence?.finish_reason;
    const said = run.state === "completed" && reason ? t(`finish_${reason}`, { text: String(sequence.stop_reason) }) : null;
    const text = said ? `${t(`run_${run.state}`)} · ${said}` : t(`run_${run.state}`);
    return h("span", { class: `state state-${STATES[run.state]}` }, text);
  }

  function figure(name, value, note = null) {
    const label = h("dt", {}, name ? term(name, t(`figure_${name}`)) : null);
    return h(
      "div",
      { class: "figure-box" },
      label,
      h("dd", {}, h("span", { class: "figure-value" }, value), note && h("span", { class: "figure-note" }, note)),
    );
  }

  function figures({ run, sequence }) {
    const boxes = [];
    const ttftMs = sequence?.ttft_ms ?? run.ttft_ms;
    if (ttftMs !== null) boxes.push(figure("ttft", duration(ttftMs)));
    if (sequence?.tpot_ms != null) {
      boxes.push(figure("tpot", duration(sequence.tpot_ms), t("figure_rate", { rate: words.rate(1000 / sequence.tpot_ms) })));
    }
    if (run.cost?.machine_ms > 0) {
      const { amount, currency, is_default: isDefault, machine_ms: machineMs, joules } = run.cost;
      const time = duration(machineMs);
      const notes = [
        isDefault ? t("figure_no_price") : t("figure_machine", { time }),
        joules === null ? null : `${words.number(joules)} J`,
      ];
      boxes.push(figure("cost", isDefault ? time : words.money(amount, currency), notes.filter(Boolean).join(" · ")));
    }
    return boxes.length > 0 ? h("dl", { class: "figure-row" }, ...boxes) : null;
  }

  function answers({ run, sequence }) {
    if (run.sequences.length < 2) return null;
    const buttons = run.sequences.map((each, index) =>
      h(
        "button",
        { type: "button", class: "segment", "aria-pressed": String(each === sequence), onclick: () => choose(index) },
        t("answer_number", { number: index + 1 }),
      ),
    );
    return h("div", { class: "segments", role: "group", "aria-label": t("answers") }, ...buttons);
  }

  function parameters({ run }) {
    const pairs = Object.entries(run.parameters).filter(([, value]) => value !== null);
    if (pairs.length === 0) return null;
    const text = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));
    const rows = pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, text(value))));
    return h("details", { class: "parameters" }, h("summary", {}, t("parameters")), h("dl", {}, ...rows));
  }

  function fault({ run }) {
    if (run.code === null && run.message === null) return null;
    const title = h("p", { class: "fault-title" }, t("failed_title", { status: String(run.status ?? ""), code: run.code ?? "" }));
    const said = run.message === null ? h("p", {}, t("failed_unkept")) : h("p", { class: "fault-said", lang: "en" }, run.message);
    return h("div", { class: "fault" }, title, said);
  }

  return {
    draw(story) {
      const { run, sequence } = story;
      const open = root.querySelector(".parameters")?.open ?? false;
      const clock = new Intl.DateTimeFormat(words.language, { dateStyle: "medium", timeStyle: "medium" });
      const meta = [
        run.model,
        run.route,
        ...(run.created === null ? [] : [clock.format(run.created * 1000)]),
        ...(run.prompts.length === 0 ? [] : [t(run.is_streamed ? "streamed" : "whole")]),
      ];
      if (sequence?.preemptions > 0) meta.push(t("preempted_times", { count: sequence.preemptions }));
      if (sequence?.resumes > 0) meta.push(t("resumed_times", { count: sequence.resumes }));
      const traceButton = h("button", { type: "button", class: "button", onclick: trace, title: t("trace_hint") }, t("trace"));
      const top = h("div", { class: "head-title" }, h("h1", {}, t("title")), state(story));
      const side = h("div", { class: "head-side" }, h("a", { href: "/runs" }, t("all_runs")), traceButton);
      root.replaceChildren(
        ...[
          h("div", { class: "head-top" }, top, side),
          summary(story),
          figures(story),
          h("ul", { class: "meta" }, h("li", { class: "run-id" }, run.id), ...meta.map((text) => h("li", {}, text))),
          parameters(story),
          fault(story),
          answers(story),
        ].filter((part) => part !== null),
      );
      const details = root.querySelector(".parameters");
      if (details) details.open = open;
    },
  };
}
