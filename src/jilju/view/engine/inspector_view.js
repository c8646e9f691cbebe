// Inspector: one step under the glass: its time against its prediction, its rows, why others waited, its operations.
//
// Owns the panel below the timeline. The rows come with the frame of that moment, the operations when a person asks for them.

import { ApiError } from "../api.js";
import { h, icon } from "../dom.js";
import { explain } from "../faults.js";
import { term } from "../term.js";
import { bar } from "./bar.js";
import { setText } from "./rows.js";

const CLOSED = ["rows", "tokens", "blocks", "order"];

/** `walk(places)` goes to a neighbour step, `release()` back to where the page came from. Returns show(step, frame, isMoment). */
export function createInspectorView({ root, words, format, linkRun, api, walk, release }) {
  const { t, duration, integer, bytes, share } = words;
  const button = (label, path, onclick) =>
    h("button", { type: "button", class: "quiet", "aria-label": label, title: label, onclick }, icon(path));
  const title = h("h3", { id: "inspector-title" });
  const time = h("div", { class: "step-time" });
  const facts = h("dl", { class: "facts-list" });
  const rows = h("ul", { class: "step-rows" });
  const why = h("p", { class: "step-why" });
  const ops = h("div", { class: "step-ops" });
  const askOps = h("button", { type: "button", class: "button", onclick: loadOps }, t("ops_show"));
  root.append(
    h(
      "header",
      { class: "inspector-head" },
      title,
      button(t("step_before"), "M12 5l-5 5 5 5", () => walk(-1)),
      button(t("step_after"), "M8 5l5 5-5 5", () => walk(1)),
      button(t("step_close"), "M5 5l10 10M15 5L5 15", release),
    ),
    h("div", { class: "inspector-main" }, time, facts),
    h("div", { class: "inspector-rows" }, h("h4", {}, t("step_rows_title")), rows, why),
    h("div", { class: "inspector-ops" }, askOps, ops),
  );
  let shown = null; // {step}

  const keyLine = (name) => h("span", { class: `key-line key-${name}`, "aria-hidden": "true" });

  function drawTime(step) {
    const runMs = step.ms - step.host_ms;
    const top = Math.max(step.ms, step.predicted_ms, step.bound_ms) * 1.02;
    const look = step.prefill_tokens > 0 ? "prefill" : "decode";
    const parts = [
      { look: "host", value: step.host_ms, label: t("step_host"), title: `${t("step_host")} ${duration(step.host_ms)}` },
      { look, value: runMs, label: t("step_run"), title: `${t("step_run")} ${duration(runMs)}` },
    ];
    const at = (ms, name) => {
      const mark = h("span", { class: `line line-${name}`, "aria-hidden": "true" });
      mark.style.left = `${(ms / top) * 100}%`;
      return mark;
    };
    const error = (step.predicted_ms - step.ms) / step.ms;
    const picture = h("div", { class: "against" }, bar(parts, top, time.clientWidth), at(step.predicted_ms, "predicted"));
    time.replaceChildren(
      picture,
      h("p", {}, t("step_measured", { measured: duration(step.ms), host: duration(step.host_ms), share: share(step.host_ms / step.ms) })),
      h("p", {}, keyLine("predicted"), t("step_predicted", { predicted: duration(step.predicted_ms), error: words.signedShare(error) })),
    );
    if (step.bound_ms === 0) return;
    picture.append(at(step.bound_ms, "bound"));
    const aim = term("bound", t("step_bound", { bound: duration(step.bound_ms) }));
    time.append(h("p", {}, keyLine("bound"), aim));
  }

  function drawFacts(step, frame) {
    const runS = (step.ms - step.host_ms) / 1000;
    const roof = (amount, rate) => (rate !== null && runS > 0 ? ` · ${share(amount / runS / rate)}` : "");
    const list = [
      ["prefill", integer(step.prefill_tokens), "lane_prefill"],
      ["decode", integer(step.decode_tokens), "lane_decode"],
      ["memory_roof", `${bytes(step.bytes)}${roof(step.bytes, frame.read_bytes_per_s)}`, "step_bytes"],
      ["compute_roof", `${words.flops(step.flops)}${roof(step.flops, frame.flops_per_s)}`, "step_flops"],
    ];
    facts.replaceChildren(...list.map(([name, value, label]) => h("div", {}, h("dt", {}, term(name, t(label))), h("dd", {}, value))));
  }

  function drawRows(step, frame, isMoment) {
    root.setAttribute("aria-busy", String(!isMoment));
    if (!isMoment) rows.replaceChildren(h("li", { class: "quiet-text" }, t("step_rows_loading")));
    else if (frame.running.length === 0) rows.replaceChildren(h("li", { class: "quiet-text" }, t("step_rows_gone", { rows: step.rows })));
    else rows.replaceChildren(...frame.running.map((row) => rowItem(row)));
    why.replaceChildren(...(step.waiting === 0 ? [t("closed_none")] : whyWaited(step)));
  }

  function rowItem(row) {
    const isPrefill = row.phase === "prefill";
    const isFirst = !isPrefill && row.output_tokens === 1; // the rows are as the step left them
    const inPrompt = { computed: row.computed_tokens, prompt: row.prompt_tokens };
    const text = isPrefill ? t("row_prefill", inPrompt) : isFirst ? t("row_first") : t("row_decode", { output: row.output_tokens });
    const swatch = h("span", { class: `swatch look-${isPrefill || isFirst ? "prefill" : "decode"}`, "aria-hidden": "true" });
    return h("li", { class: "step-row" }, swatch, linkRun(row.run), " ", text);
  }

  function whyWaited({ waiting, closed_by: cause }) {
    const counted = t("closed_waiting", { waiting });
    if (!CLOSED.includes(cause)) return [counted, " ", t("closed_unknown")];
    return [counted, " ", term(`cause_${cause}`, t(`closed_${cause}`))];
  }

  async function loadOps() {
    const { serial } = shown.step;
    askOps.disabled = true;
    try {
      const found = await api.json(`/v1/jilju/steps/${serial}`);
      if (shown?.step.serial === serial) drawOps(found);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (shown?.step.serial !== serial) return;
      const { title: said, advice, params } = explain(error);
      const text = error.status === 404 ? t("ops_gone") : `${t(said)} ${t(advice, params)}`;
      ops.replaceChildren(h("p", { class: "fault-text", role: "alert" }, text));
    } finally {
      askOps.disabled = false;
    }
  }

  function drawOps({ ops: list, run_ms: runMs, is_modelled: isModelled }) {
    askOps.hidden = true;
    const heads = ["op", "count", "flops", "bytes", "ms", "bound"].map((name) => h("th", { scope: "col" }, t(`ops_${name}`)));
    const lines = list.map((op) =>
      h(
        "tr",
        {},
        h("th", { scope: "row" }, op.op, h("span", { class: "shape" }, op.shape)),
        h("td", {}, integer(op.count)),
        h("td", {}, words.flops(op.flops)),
        h("td", {}, bytes(op.bytes)),
        h("td", {}, duration(op.ms), " ", h("span", { class: "quiet-text" }, share(op.share))),
        h("td", {}, t(op.bound === "memory" ? "ops_bound_memory" : "ops_bound_compute")),
      ),
    );
    const caption = h("caption", {}, t("ops_title", { run: duration(runMs) }));
    const table = h("table", { class: "sum-table ops-table" }, caption, h("thead", {}, h("tr", {}, ...heads)), h("tbody", {}, ...lines));
    const place = h("div", { class: "table-scroll", tabindex: 0, role: "region", "aria-label": t("ops_show") }, table);
    ops.replaceChildren(place);
    if (isModelled) ops.append(h("p", { class: "quiet-text" }, t("ops_modelled")));
    place.focus({ preventScroll: true }); // it takes the place of the button that was pressed
  }

  return {
    /** `isMoment`: the frame is of this step's moment; until then its rows are on their way. */
    show(step, frame, isMoment) {
      root.hidden = step === null;
      if (step === null) {
        shown = null;
        return;
      }
      if (shown?.step.serial !== step.serial) {
        ops.replaceChildren();
        askOps.hidden = false;
      }
      shown = { step };
      const began = format.clockMs(step.begin_ms + frame.unix_ms - frame.end_ms);
      setText(title, `${t("step_name", { serial: integer(step.serial) })} · ${began}`);
      drawTime(step);
      drawFacts(step, frame);
      drawRows(step, frame, isMoment);
    },
  };
}
