// One answer on the page: its text as it grows, its phase, its figures, and what went wrong.
//
// Owns one list item. Knows nothing of requests; it is handed the message as it stands and what a person can do with it.

import { h, icon, svg } from "../dom.js";
import { explain } from "../faults.js";
import { createAnswerText } from "./answer_text.js";
import { answerFigures, ledger } from "./figures.js";
import { actionButton, copyButton, tokensSwitch } from "./message_parts.js";

const BAR_HEIGHT = 1; // of the ledger's own coordinates: its width is the total in milliseconds
const AGAIN = ["M15.5 8a6 6 0 1 0 .5 3", "M16 4v4h-4"];
const ONWARD = ["M8 5l5 5l-5 5"];

/** `now()` in milliseconds, the clock of message.sentAt; `retry()` asks for the last answer once more; `tokens()` fetches its own. */
export function createAnswerView({ words, now, retry, tokens }) {
  const { t, duration, rate } = words;
  const thoughts = h("div", { class: "thoughts-text" });
  const thinking = h("details", { class: "thoughts", hidden: true }, h("summary", {}, t("thoughts")), thoughts);
  const text = h("div", { class: "text" });
  const written = createAnswerText({ root: text, words });
  const phaseWord = h("span", { class: "phase-word" });
  const phaseFigure = h("span", { class: "phase-figure" });
  const phase = h("p", { class: "phase", "aria-hidden": "true" }, h("span", { class: "phase-mark" }), phaseWord, phaseFigure);
  const after = h("div", { class: "after" }); // figures, notes, faults: built when the answer is done
  const name = h("span", { class: "visually-hidden" }, "jilju");
  const switched = tokensSwitch({ words, text, fetchTokens: tokens });
  const item = h("li", { class: "message answer" }, name, thinking, text, switched.root, phase, after);
  let shown = null; // the message as last drawn

  function ledgerBar(timings) {
    const { parts, totalMs, balanced } = ledger(timings);
    const named = parts.map(({ kind, ms }) => t(`ledger_${kind}`, { duration: duration(ms) }));
    const label = t(balanced ? "ledger" : "ledger_unbalanced", { parts: named.join(" + "), total: duration(totalMs) });
    let x = 0;
    const rects = parts.map(({ kind, ms }, index) => {
      const rect = svg("rect", { class: `look-${kind}`, x, y: 0, width: ms, height: BAR_HEIGHT }, svg("title", {}, named[index]));
      x += ms;
      return rect;
    });
    const bar = svg(
      "svg",
      {
        class: balanced ? "ledger" : "ledger unbalanced",
        viewBox: `0 0 ${Math.max(totalMs, x)} ${BAR_HEIGHT}`,
        preserveAspectRatio: "none",
        role: "img",
        "aria-label": label,
      },
      ...rects,
    );
    return balanced ? [bar] : [bar, h("p", { class: "note fault-text" }, label)];
  }

  /** One quiet line, and the way to all that is behind it. */
  function figures(message) {
    const spans = answerFigures(message).map(({ key, params: { ms, ...rest }, kind }) => {
      const text = t(key, ms === undefined ? rest : { ...rest, duration: duration(ms) });
      return h("span", { class: "figure" }, kind ? h("span", { class: `marked kind-${kind}` }, text) : text);
    });
    if (!message.timings) spans.push(h("span", { class: "figure" }, t("measured_here")));
    const bar = message.timings ? ledgerBar(message.timings) : [];
    const line = h("span", { class: "figure-line" }, ...spans);
    if (!message.runId) return h("div", { class: "figures" }, ...bar, line);
    line.append(h("span", { class: "figure to-run" }, t("open_run"), icon(...ONWARD)));
    return h("a", { class: "figures", href: `/runs/${encodeURIComponent(message.runId)}` }, ...bar, line);
  }

  function fault(error) {
    const { title, advice, params } = explain(error);
    return h(
      "div",
      { class: "fault", role: "alert" },
      h("p", { class: "fault-title" }, t(title)),
      h("p", {}, t(advice, params)),
      h("p", { class: "fault-said" }, error.message),
      h("button", { type: "button", class: "button retry", onclick: retry }, t("try_again")),
    );
  }

  function actions(message) {
    const row = h("div", { class: "message-actions" });
    if (message.outcome === "stopped" && message.text !== "") row.append(h("span", { class: "badge" }, t("stopped")));
    if (message.finishReason === "length") row.append(h("span", { class: "badge" }, t("cut_at_limit")));
    if (message.text !== "") row.append(copyButton({ words, text: () => shown.text }));
    if (message.outcome !== "failed") {
      row.append(actionButton({ label: t("ask_again"), paths: AGAIN, onclick: retry, class: "ask-again" }));
    }
    if (message.text !== "") row.append(switched.button);
    return row;
  }

  function drawAfter(message) {
    const parts = [];
    if (message.outcome === "failed") parts.push(fault(message.error));
    if (message.text === "" && message.outcome === "stopped") parts.push(h("p", { class: "note" }, t("stopped_empty")));
    if (message.text === "" && message.outcome === "completed") parts.push(h("p", { class: "note" }, t("empty_answer")));
    if (message.usage || message.measured.numTokens > 0) parts.push(figures(message));
    parts.push(actions(message));
    after.replaceChildren(...parts);
  }

  /** The seconds or the pace beside the phase word; called on every tick of the page's timer too. */
  function drawPhaseFigure() {
    const { phase, firstAt, numTokens, sentAt } = shown;
    if (phase === "writing") {
      const seconds = (now() - firstAt) / 1000;
      const known = numTokens > 1 && seconds > 0.2; // a pace of one gap is noise
      phaseFigure.textContent = known ? t("live_rate", { rate: rate((numTokens - 1) / seconds) }) : "";
    } else if (phase !== "done") {
      const elapsedMs = now() - sentAt;
      phaseFigure.textContent = elapsedMs >= 1000 ? words.seconds(Math.floor(elapsedMs / 1000)) : "";
    }
  }

  function drawPhase({ phase: current, numPrompt }) {
    item.dataset.phase = current;
    item.setAttribute("aria-busy", String(current !== "done")); // a screen reader reads the answer once, whole
    phase.hidden = current === "done";
    if (current === "done") return;
    phaseWord.textContent =
      current === "reading" && numPrompt !== null ? t("phase_reading_tokens", { tokens: numPrompt }) : t(`phase_${current}`);
  }

  return {
    item,
    tick: drawPhaseFigure,
    update(message) {
      const isDone = message.phase === "done";
      const wasDone = shown?.phase === "done";
      if (message.phase !== shown?.phase || message.numPrompt !== shown?.numPrompt) drawPhase(message);
      shown = message;
      thinking.hidden = !message.thoughts;
      if (message.thoughts) thoughts.textContent = message.thoughts;
      if (!isDone) written.grow(message.text);
      else if (!wasDone) {
        written.finish(message.text);
        drawAfter(message);
      }
      drawPhaseFigure();
    },
  };
}
