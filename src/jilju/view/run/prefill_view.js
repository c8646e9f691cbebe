// Station 4, prefill: blocks as wide as their tokens and as high as the time a token took, so that an area is time.
//
// Owns the picture and the list of chunks. What came from the cache has a width and no height. Beside it, at the same scale,
// stands one step of decode.

import { h } from "../dom.js";
import { createStation, meter } from "./station.js";
import { median } from "./story.js";

const MOST_OVER = 8; // a decode step this many times as high as the blocks is cut off, or they would be flat
const LEAST_LABELLED = 0.25; // of the width: what is narrower has no room for words
const ROOM = 0.86; // of the picture's height: above it stand labels

export function createPrefillView({ words, rich, select }) {
  const { t, duration, integer } = words;
  const station = createStation({ name: "prefill", number: 4, words });
  const picture = h("div", { class: "prefill-picture", role: "img" });
  const axis = h("p", { class: "picture-axis" });
  const list = h("ol", { class: "chunks" });
  const sum = h("p", { class: "note" });
  station.body.append(h("figure", {}, picture, axis), list, sum);
  let marks = []; // [{element, index, endMs}]

  const perToken = ({ step }) => step.ms / step.count;

  /** Of the step in the middle; null before there is one. */
  const decodeStepMs = ({ columns }) => median(columns.filter((column) => !column.isFirst).map((column) => column.step.ms));

  function partsOf(step) {
    const host = step.ms - step.own_ms - step.others_ms;
    return [
      ["prefill", step.own_ms],
      ["others", step.others_ms],
      ["host", host],
    ].filter(([, ms]) => ms > 0);
  }

  function block({ step, index }, scale, width) {
    const stack = h("span", { class: "stack" });
    for (const [look, ms] of partsOf(step)) {
      const part = h("span", { class: `look-${look}` });
      part.style.flexGrow = String(ms);
      stack.append(part);
    }
    stack.style.height = `${scale * perToken({ step }) * 100}%`;
    const predicted = h("span", { class: "predicted" });
    predicted.style.bottom = `${((scale * step.predicted_ms) / step.count) * 100}%`;
    const label = h("span", { class: "block-label" }, duration(step.ms));
    label.style.bottom = `${((scale * Math.max(step.ms, step.predicted_ms)) / step.count) * 100}%`;
    const button = h(
      "button",
      { type: "button", class: "prefill-block", onclick: () => select(index), "aria-label": chunkLabel({ step, index }) },
      stack,
      predicted,
      label,
    );
    button.style.width = `${width * 100}%`;
    return button;
  }

  const chunkLabel = ({ step }) => rich.plain("chunk_label", { tokens: step.count, duration: duration(step.ms) });

  function reference(story, scale, width) {
    const ms = decodeStepMs(story);
    if (ms === null) return null;
    const height = scale * ms;
    const bar = h("span", { class: "look-decode reference-bar" });
    bar.style.height = `${Math.min(height, 1) * 100}%`;
    bar.style.width = `max(2px, ${width * 100}%)`;
    const label = h("span", { class: "reference-label" }, t("one_decode_step", { duration: duration(ms) }));
    return h("div", { class: height > 1 ? "reference cut" : "reference" }, bar, label);
  }

  function drawPicture(story) {
    const { prefills, prompt, coverage } = story;
    const total = Math.max(prompt.num_tokens, coverage.cached + coverage.computed, 1);
    const highest = Math.max(...prefills.map(({ step }) => Math.max(step.ms, step.predicted_ms) / step.count));
    const top = Math.max(highest, Math.min(decodeStepMs(story) ?? 0, highest * MOST_OVER));
    const scale = ROOM / top;
    const cached = h("span", { class: "prefill-cached" });
    cached.style.width = `${(coverage.cached / total) * 100}%`;
    const blocks = prefills.map((each) => block(each, scale, each.step.count / total));
    marks = prefills.map((each, i) => ({ element: blocks[i], index: each.index, endMs: each.step.begin_ms + each.step.ms }));
    const ground = h("div", { class: "prefill-ground" }, coverage.cached > 0 ? cached : null, ...blocks);
    const shares = prefills.map((each) => chunkLabel(each)).join("; ");
    picture.setAttribute("aria-label", t("prefill_label", { cached: coverage.cached, chunks: shares }));
    if (coverage.cached / total >= LEAST_LABELLED) {
      const label = h("span", { class: "cached-label" }, t("cached_no_time", { tokens: coverage.cached }));
      label.style.width = `${(coverage.cached / total) * 100}%`;
      ground.append(label);
    }
    picture.replaceChildren(...[ground, reference(story, scale, 1 / total)].filter(Boolean));
    picture.removeAttribute("role"); // its blocks are buttons with their own names
    axis.replaceChildren(...rich("prefill_axis"));
  }

  function drawList({ prefills }) {
    const rows = prefills.map(({ step, index }) => {
      const isAlone = step.rows === 1;
      const pace = t("tokens_per_second", { rate: words.rate(step.count / (step.ms / 1000)) });
      const figures = [
        rich.plain("chunk_tokens", { tokens: step.count }),
        duration(step.ms),
        ...(isAlone ? [pace, words.flops(step.flops)] : [t("own_share", { duration: duration(step.own_ms) })]),
      ];
      const roof = step.compute_roof_share;
      const said = t(isAlone ? "of_compute_roof" : "of_whole_step", { share: words.share(roof ?? 0), flops: words.flops(step.flops) });
      const share = roof === null ? null : [meter(roof, "prefill"), h("span", {}, said)];
      const error = (step.predicted_ms - step.ms) / step.ms;
      const predicted = h(
        "span",
        { class: "quiet-text" },
        t("predicted_was", { duration: duration(step.predicted_ms), error: words.signedShare(error) }),
      );
      const button = h(
        "button",
        { type: "button", class: "chunk", onclick: () => select(index), "data-step": index },
        h("span", { class: "chunk-figures" }, figures.join(" · ")),
        h("span", { class: "chunk-roof" }, ...(share ?? []), predicted),
      );
      return h("li", {}, button);
    });
    list.replaceChildren(...rows);
  }

  return {
    station,
    draw(story) {
      const { prefills, coverage, prompt } = story;
      const figure = station.body.querySelector("figure");
      figure.hidden = list.hidden = prefills.length === 0;
      sum.hidden = !coverage.isDone;
      if (prefills.length === 0) {
        station.say(rich("lead_no_prefill"));
        return;
      }
      const ms = prefills.reduce((total, { step }) => total + step.ms, 0);
      const each = duration(ms / coverage.computed);
      const key = prefills.length > 1 ? "lead_prefill_chunks" : "lead_prefill";
      const nodes = rich(key, { tokens: coverage.computed, chunks: prefills.length, duration: duration(ms), each });
      const decodeMs = decodeStepMs(story);
      if (prefills.some(({ step }) => step.rows > 1)) {
        const own = prefills.reduce((total, { step }) => total + step.own_ms, 0);
        nodes.push(" ", ...rich("lead_prefill_shared", { own: duration(own) }));
      }
      if (decodeMs !== null) nodes.push(" ", ...rich("lead_prefill_beside", { each: duration(decodeMs) }));
      station.say(nodes);
      drawPicture(story);
      drawList(story);
      const said = { cached: coverage.cached, computed: coverage.computed, tokens: prompt.num_tokens };
      sum.classList.toggle("fault-text", !coverage.isBalanced);
      sum.textContent = t(coverage.isBalanced ? "tokens_balance" : "tokens_unbalanced", said);
    },
    select(index) {
      for (const mark of marks) mark.element.classList.toggle("chosen", mark.index === index);
      for (const row of list.querySelectorAll(".chunk")) row.classList.toggle("chosen", Number(row.dataset.step) === index);
    },
    at(ms) {
      for (const mark of marks) mark.element.classList.toggle("future", ms !== null && mark.endMs > ms);
    },
  };
}
