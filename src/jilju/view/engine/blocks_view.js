// Blocks: the whole pool of KV blocks as cells, and the streams that hold some of them.
//
// Owns the map's layout: held by one stream each, shared, cached, free, in this order, so that the areas add up to the pool.
// Pointing at a cell lights its stream in the list and the other way round. Which block lies where in memory is not told.

import { h, svg } from "../dom.js";
import { term } from "../term.js";
import { bar } from "./bar.js";
import { createRows, setText } from "./rows.js";

const CELLS_MAX = 1200; // of a bigger pool, a cell stands for several blocks
const SHAPE = 3; // cells across for one down

/** [{kind, holder, blocks}] that sum to the pool. Blocks found in the cache may be shared, so they stand apart, counted once. */
export function segments({ total, held, cached, free, holders }) {
  const own = holders.map((holder) => Math.max(0, holder.blocks - holder.cached));
  const sum = own.reduce((a, b) => a + b, 0);
  const fit = sum > held ? held / sum : 1; // the counts are of one moment, but whoever shares without the cache counts twice
  const parts = own.map((blocks, place) => ({ kind: "own", holder: place, blocks: blocks * fit }));
  parts.push({ kind: "shared", holder: null, blocks: held - sum * fit });
  parts.push({ kind: "cached", holder: null, blocks: cached });
  parts.push({ kind: "free", holder: null, blocks: free });
  return { total, parts: parts.filter(({ blocks }) => blocks > 0) };
}

/** The rectangles of a segment that runs from `begin` to `end`, in cells, along rows of `across` cells: [{x, y, width}]. */
export function stripes(begin, end, across) {
  const rects = [];
  for (let row = Math.floor(begin / across); row * across < end; row++) {
    const from = Math.max(begin, row * across);
    const to = Math.min(end, (row + 1) * across);
    if (to > from) rects.push({ x: from - row * across, y: row, width: to - from });
  }
  return rects;
}

export function createBlocksView({ map, sum, list, words, linkRun }) {
  const { t, bytes, duration, integer } = words;
  let frame = null;
  let lit = null; // the place of the stream pointed at
  let drawn = "";
  const tip = h("p", { class: "tip blocks-tip", hidden: true });
  const picture = svg("svg", { class: "blocks-picture", role: "img" });
  map.append(picture, tip);

  // The list has a line for each sequence that runs, the map a stretch for each run. Those of other keys have no name; they are
  // told apart by their number of blocks.
  function lines({ running, blocks: { holders } }) {
    const unnamed = new Set([...holders.keys()].filter((place) => holders[place].run === null));
    return running.map((row) => {
      let place = row.run === null ? -1 : holders.findIndex((holder) => holder.run === row.run);
      if (row.run === null) place = [...unnamed].find((each) => holders[each].blocks === row.blocks) ?? -1;
      unnamed.delete(place);
      return { row, place };
    });
  }

  /** The phase of each holder: "prefill" while one of its sequences reads its prompt, "kept" if none runs. */
  function phases(found) {
    return frame.blocks.holders.map((_, place) => {
      const its = found.filter((line) => line.place === place).map(({ row }) => row.phase);
      return its.includes("prefill") ? "prefill" : (its[0] ?? "kept");
    });
  }

  function look(kind, place, known) {
    if (kind !== "own") return `cell-${kind}`;
    return `cell-${known[place]}${place % 2 ? " cell-odd" : ""}`;
  }

  function draw(found) {
    const known = phases(found);
    const key = JSON.stringify([frame.blocks, known]);
    if (key === drawn) return;
    drawn = key;
    const { total, parts } = segments(frame.blocks);
    const perCell = Math.max(1, Math.ceil(total / CELLS_MAX));
    const cells = Math.ceil(total / perCell);
    const across = Math.max(8, Math.ceil(Math.sqrt(cells * SHAPE)));
    const rows = Math.max(1, Math.ceil(cells / across));
    let at = 0;
    const rects = parts.flatMap(({ kind, holder, blocks }) => {
      const begin = at / perCell;
      at += blocks;
      return stripes(begin, at / perCell, across).map((box) =>
        svg("rect", { ...box, height: 1, class: `cell ${look(kind, holder, known)}`, "data-kind": kind, "data-holder": holder ?? "" }),
      );
    });
    const grid = svg(
      "pattern",
      { id: "cell-grid", width: 1, height: 1, patternUnits: "userSpaceOnUse" },
      svg("path", { class: "cell-grid", d: "M0 0H1M0 0V1" }),
    );
    const hatch = (id) =>
      svg(
        "pattern",
        { id, width: 0.4, height: 0.4, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
        svg("rect", { class: `${id}-ground`, width: 0.4, height: 0.4 }),
        svg("rect", { class: "hatch-line", width: 0.2, height: 0.4 }),
      );
    picture.setAttribute("viewBox", `0 0 ${across} ${rows}`);
    picture.replaceChildren(
      svg("defs", {}, grid, hatch("hatch-shared"), hatch("hatch-cached")),
      ...rects,
      svg("rect", { class: "cell-lines", width: across, height: rows, fill: "url(#cell-grid)" }),
    );
    picture.setAttribute("aria-label", t("blocks_label", { ...frame.blocks }));
    drawSum(perCell);
    light(lit);
  }

  const sumFigures = {};
  function sumPart(name) {
    sumFigures[name] = h("b", {});
    const swatch = h("span", { class: `swatch swatch-${name}`, "aria-hidden": "true" });
    return h("span", { class: "sum-part" }, swatch, sumFigures[name], " ", term(name, t(`blocks_${name}`)));
  }
  const isTrue = h("span", { class: "sum-true" });
  const scaleNote = h("p", { class: "quiet-text" });
  sumFigures.total = h("b", {});
  const whole = [sumFigures.total, " ", term("block", t("blocks_total")), " ", isTrue];
  const equation = h("p", { class: "sum" }, sumPart("held"), " + ", sumPart("cached"), " + ", sumPart("free"), " = ", ...whole);
  sum.append(equation, scaleNote);

  function drawSum(perCell) {
    const { total, held, cached, free, block_size: size, bytes_per_block: each } = frame.blocks;
    equation.hidden = total === 0; // a new engine tells of its blocks with its first step
    if (total === 0) {
      setText(scaleNote, t("blocks_none"));
      return;
    }
    for (const [name, value] of Object.entries({ total, held, cached, free })) setText(sumFigures[name], integer(value));
    setText(isTrue, held + cached + free === total ? "✓" : "≠");
    isTrue.classList.toggle("fault-text", held + cached + free !== total);
    const params = { blocks: perCell, tokens: size * perCell, bytes: bytes(each * perCell) };
    setText(scaleNote, t(perCell === 1 ? "blocks_scale_one" : "blocks_scale", params));
  }

  // Pointing

  function light(place) {
    lit = place;
    picture.classList.toggle("is-lit", place !== null);
    for (const each of [...picture.querySelectorAll(".cell"), ...list.children]) {
      each.classList.toggle("lit", place !== null && each.dataset.holder === String(place));
    }
  }

  function tipOf(kind, place) {
    if (kind !== "own") {
      const part = segments(frame.blocks).parts.find((each) => each.kind === kind);
      return t(`blocks_tip_${kind}`, { blocks: Math.round(part?.blocks ?? 0) });
    }
    const holder = frame.blocks.holders[place];
    return t("blocks_tip_own", {
      run: holder.run ?? t("run_of_other"),
      blocks: holder.blocks,
      cached: holder.cached,
      bytes: bytes(holder.blocks * frame.blocks.bytes_per_block),
    });
  }

  picture.addEventListener("pointermove", (event) => {
    const { kind, holder } = event.target.dataset;
    if (kind === undefined) return;
    const place = holder === "" ? null : Number(holder);
    if (place !== lit) light(place);
    tip.textContent = tipOf(kind, place);
    tip.hidden = false;
    const box = map.getBoundingClientRect();
    const left = Math.min(event.clientX - box.left + 12, box.width - tip.offsetWidth);
    tip.style.transform = `translate(${Math.max(0, left)}px, ${event.clientY - box.top + 16}px)`;
  });
  picture.addEventListener("pointerleave", () => {
    tip.hidden = true;
    light(null);
  });

  // The list

  const show = createRows(list, () => {
    const name = h("span", { class: "stream-run" });
    const phase = h("span", { class: "stream-phase" });
    const shape = h("span", { class: "stream-bar" });
    const tokens = h("span", { class: "stream-tokens" });
    const held = h("span", { class: "stream-blocks" });
    const element = h("li", { class: "stream" }, name, phase, shape, tokens, held);
    element.addEventListener("pointerenter", () => light(Number(element.dataset.holder)));
    element.addEventListener("pointerleave", () => light(null));
    element.addEventListener("focusin", () => light(Number(element.dataset.holder)));
    element.addEventListener("focusout", () => light(null));
    let run; // of the link that stands there
    return {
      element,
      update({ row, place }) {
        if (run !== row.run) name.replaceChildren(linkRun(row.run));
        run = row.run;
        element.dataset.holder = place;
        element.dataset.phase = row.phase;
        setText(phase, t(`phase_${row.phase}`));
        shape.replaceChildren(tokenBar(row, place));
        setText(tokens, tokenText(row));
        setText(held, t("stream_blocks", { blocks: row.blocks }));
      },
    };
  });

  // Tokens of all streams on one scale: found in the cache, read, not read yet, written.
  function tokenBar(row, place) {
    const { holders, block_size: size } = frame.blocks;
    const sequences = frame.running.filter((each) => each.run !== null && each.run === row.run).length || 1;
    const found = ((holders[place]?.cached ?? 0) / sequences) * size; // a holder's blocks are those of all its sequences
    const cached = Math.min(found, row.prompt_tokens, row.computed_tokens);
    const read = Math.max(0, Math.min(row.computed_tokens, row.prompt_tokens) - cached);
    const parts = { cached, prefill: read, unread: row.prompt_tokens - cached - read, decode: row.output_tokens };
    const longest = Math.max(...frame.running.map((each) => each.prompt_tokens + each.output_tokens));
    return bar(Object.entries(parts).map(([look, value]) => ({ look, value })), longest, 0);
  }

  function tokenText(row) {
    const age = duration(Math.max(0, frame.end_ms - row.since_ms));
    if (row.phase === "prefill") return t("stream_prefill", { computed: row.computed_tokens, prompt: row.prompt_tokens, age });
    return t("stream_decode", { prompt: row.prompt_tokens, output: row.output_tokens, age });
  }

  return function update(next) {
    frame = next;
    const found = lines(frame);
    show(found, ({ row, place }) => row.run ?? `other ${place}`);
    draw(found);
  };
}
