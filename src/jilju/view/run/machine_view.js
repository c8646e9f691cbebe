// Station 7, the machine under it: the ops of the chosen step, the longest first, and the step under the machine's two roofs.
//
// Owns the table and the picture's place. The ops come from the server when a step is chosen.

import { h } from "../dom.js";
import { drawRoofline } from "./roofline.js";
import { createStation, meter } from "./station.js";

export function createMachineView({ words, units, rich }) {
  const { t, duration, bytes } = words;
  const station = createStation({ name: "machine", number: 7, words });
  const ops = h("div", { class: "ops" });
  const picture = h("figure", { class: "roofline-box" });
  const caption = h("figcaption", { class: "picture-axis" });
  station.body.append(ops, picture);

  const table = h("table", { class: "ops-table", role: "table" }); // narrow screens lay its rows out as grids, so all roles are named
  const wrap = h("div", { class: "table-wrap", tabindex: "0", role: "region", "aria-label": t("ops_table") }, table);
  const note = h("p", { class: "note" });
  let roofline = null;

  const cell = (attributes, ...children) => h("td", { role: "cell", ...attributes }, ...children);

  function drawOps({ step, data, problem }) {
    if (problem) {
      ops.replaceChildren(
        h(
          "p",
          { class: "note" },
          t(problem.status === 404 ? "ops_gone" : "ops_failed"),
          " ",
          h("span", { lang: "en" }, problem.message),
        ),
      );
      return;
    }
    if (data === null) {
      ops.setAttribute("aria-busy", "true"); // the last step's table stands until this one's is here
      return;
    }
    ops.removeAttribute("aria-busy");
    const heads = ["head_op", "head_count", "head_flops", "head_bytes", "head_time", "head_share", "head_bound"];
    const top = h("tr", { role: "row" }, ...heads.map((key) => h("th", { scope: "col", role: "columnheader" }, ...rich(key))));
    const [times, total] = units.sum(
      data.ops.map((op) => op.ms),
      data.run_ms,
    );
    const rows = data.ops.map((op, index) => {
      const look = op.bound === "compute" ? "prefill" : "decode";
      const name = h(
        "th",
        { scope: "row", role: "rowheader" },
        h("code", { class: "op-name" }, op.op),
        h("span", { class: "op-shape" }, op.shape),
      );
      const cells = [`× ${op.count}`, words.flops(op.flops), bytes(op.bytes), times[index]];
      const share = cell({ class: "bar-cell" }, meter(op.share, look), h("span", {}, words.share(op.share)));
      return h(
        "tr",
        { role: "row" },
        name,
        ...cells.map((text) => cell({}, text)),
        share,
        cell({}, h("span", { class: `marked kind-${look}` }, t(`bound_${op.bound}`))),
      );
    });
    const sum = data.ops.reduce((all, op) => all + op.ms, 0);
    const isBalanced = Math.abs(sum - data.run_ms) <= Math.max(0.01, data.run_ms * 0.001);
    const sign = h("span", { class: isBalanced ? "sign" : "sign sign-off" }, isBalanced ? "✓" : "≠");
    const sums = ["", words.flops(data.flops), bytes(data.bytes), total].map((text) => cell({}, text));
    const foot = [h("th", { scope: "row", role: "rowheader" }, t("total")), ...sums, cell({}, sign), cell({})];
    table.replaceChildren(
      h("caption", { class: "visually-hidden" }, t("ops_table")),
      h("thead", { role: "rowgroup" }, top),
      h("tbody", { role: "rowgroup" }, ...rows),
      h("tfoot", { role: "rowgroup" }, h("tr", { class: "sum", role: "row" }, ...foot)),
    );
    note.replaceChildren(...rich(data.is_modelled ? "ops_modelled" : "ops_counted"));
    ops.replaceChildren(wrap, note);
    ops.dataset.serial = String(step.serial);
  }

  return {
    station,
    /** `found`: {step, data, problem}, null while no step is chosen. */
    drawOps(story, index, found) {
      station.section.hidden = found === null;
      if (found === null) return;
      const { step, data } = found;
      station.showTime(data ? duration(data.run_ms) : "");
      const key = step.kind === "prefill" ? "lead_machine_prefill" : "lead_machine_decode";
      station.say(
        rich(key, {
          number: index + 1,
          tokens: step.prefill_tokens + step.decode_tokens,
          rows: step.rows,
          threads: story.run.machine.num_threads,
          kernels: story.run.machine.kernel_set,
        }),
      );
      drawOps(found);
    },
    draw(story) {
      roofline = drawRoofline({ story, words });
      picture.hidden = roofline === null;
      if (roofline === null) return;
      caption.replaceChildren(...rich("roofline_caption"));
      picture.replaceChildren(roofline.drawing, caption);
    },
    select: (index) => roofline?.choose(index),
  };
}
