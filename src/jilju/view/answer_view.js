// One answer on the page: its text as it grows, its phase, its figures, and what went wrong.
//
// Owns one list item. Knows nothing of requests; it is handed the message as it stands and the three things a person
// can do with an answer.

import { h, svg } from "./dom.js";
import { explain } from "./faults.js";
import { ledger, timeFigures, tokenFigures } from "./figures.js";

const BAR_HEIGHT = 1; // of the ledger's own coordinates: its width is the total in milliseconds

/** `now()` in milliseconds, the clock of message.sentAt; `retry()` asks for the last answer once more. */
export function createAnswerView({ words, now, retry }) {
  const { t, duration, rate } = words;
  const text = h("div", { class: "text" });
  const grown = document.createTextNode("");
  text.append(grown);
  const phaseWord = h("span", { class: "phase-word" });
  const phaseFigure = h("span", { class: "phase-figure" });
  const phase = h("p", { class: "phase", "aria-hidden": "true" }, h("span", { class: "phase-mark" }), phaseWord, phaseFigure);
  const after = h("div", { class: "after" }); // figures, notes, faults: built when the answer is done
  const item = h("li", { class: "message answer" }, h("span", { class: "visually-hidden" }, "jilju"), text, phase, after);
  let shown = null; // the message as last drawn

  function params(figure) {
    const { ms, rate: perSecond, ...rest } = figure.params;
    if (ms !== undefined) rest.duration = duration(ms);
    if (perSecond !== undefined) rest.rate = rate(perSecond);
    return rest;
  }

  function ledgerBar(timings) {
    const { parts, totalMs, balanced } = ledger(timings);
    const named = parts.map(({ kind, ms }) => t(`ledger_${kind}`, { duration: duration(ms) }));
    const label = t(balanced ? "ledger" : "ledger_unbalanced", { parts: named.join(" + "), total: duration(totalMs) });
    let x = 0;
    const rects = parts.map(({ kind, ms }, index) => {
      const rect = svg(
        "rect",
        { class: `fill-${kind}`, x, y: 0, width: ms, height: BAR_HEIGHT },
        svg("title", {}, named[index]),
      );
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

  function figureLine(name, list) {
    const items = list.map((figure) =>
      h("li", { class: figure.kind ? `figure kind-${figure.kind}` : "figure" }, t(figure.key, params(figure))),
    );
    return h("ul", { class: `figures figures-${name}`, "aria-label": t(`figures_${name}`) }, ...items);
  }

  function figureLines(message) {
    const tokens = figureLine("tokens", tokenFigures(message));
    if (message.timings) return [tokens, figureLine("time", timeFigures(message.timings))];
    tokens.append(h("li", { class: "figure" }, t("measured_here")));
    return [tokens];
  }

  function copyButton() {
    const button = h("button", { type: "button", class: "quiet" }, t("copy"));
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(shown.text);
      button.textContent = t("copied");
    });
    return button;
  }

  function fault(error) {
    const { title, advice, params: holes } = explain(error);
    return h(
      "div",
      { class: "fault", role: "alert" },
      h("p", { class: "fault-title" }, t(title)),
      h("p", {}, t(advice, holes)),
      h("p", { class: "fault-said" }, error.message),
      h("button", { type: "button", class: "button retry", onclick: retry }, t("try_again")),
    );
  }

  function drawAfter(message) {
    const parts = [];
    if (message.outcome === "failed") parts.push(fault(message.error));
    if (message.text === "" && message.outcome === "stopped") parts.push(h("p", { class: "note" }, t("stopped_empty")));
    if (message.text === "" && message.outcome === "completed") parts.push(h("p", { class: "note" }, t("empty_answer")));
    if (message.timings) parts.push(...ledgerBar(message.timings));
    if (message.usage || message.measured.numTokens > 0) parts.push(...figureLines(message));
    const row = h("div", { class: "answer-actions" });
    if (message.outcome === "stopped" && message.text !== "") row.append(h("span", { class: "badge" }, t("stopped")));
    if (message.finishReason === "length") row.append(h("span", { class: "badge" }, t("cut_at_limit")));
    // the clipboard exists in secure contexts only, and localhost is one
    if (message.text !== "" && navigator.clipboard) row.append(copyButton());
    if (message.outcome !== "failed") {
      row.append(h("button", { type: "button", class: "quiet ask-again", onclick: retry }, t("ask_again")));
    }
    parts.push(row);
    after.replaceChildren(...parts);
  }

  /** The seconds or the pace beside the phase word; called on every tick of the page's timer too. */
  function drawPhaseFigure() {
    const message = shown;
    if (message.phase === "writing") {
      const seconds = (now() - message.firstAt) / 1000;
      const known = message.numTokens > 1 && seconds > 0.2; // a pace of one gap is noise
      phaseFigure.textContent = known ? t("live_rate", { rate: rate((message.numTokens - 1) / seconds) }) : "";
    } else if (message.phase !== "done") {
      const elapsedMs = now() - message.sentAt;
      phaseFigure.textContent = elapsedMs >= 1000 ? t("live_elapsed", { elapsed: `${Math.floor(elapsedMs / 1000)} s` }) : "";
    }
  }

  return {
    item,
    tick: drawPhaseFigure,
    update(message) {
      if (message.text.startsWith(grown.data)) grown.appendData(message.text.slice(grown.data.length));
      else grown.data = message.text;
      if (message.phase !== shown?.phase) {
        item.dataset.phase = message.phase;
        item.setAttribute("aria-busy", String(message.phase !== "done")); // a screen reader reads the answer once, whole
        phase.hidden = message.phase === "done";
        if (message.phase !== "done") phaseWord.textContent = t(`phase_${message.phase}`);
      }
      const justDone = message.phase === "done" && shown?.phase !== "done";
      shown = message;
      if (justDone) drawAfter(message);
      else drawPhaseFigure();
    },
  };
}
