// Story: one answer of one run, with all that the views draw derived from it once.
//
// Owns the derivations: decode columns, token groups, what was computed and what cached. Pure: no words, no DOM.

import { lookOf } from "../kinds.js";
import { balance, stations } from "./ledger.js";

const PART_LOOKS = ["decode", "others", "host", "wait", "fault"]; // from the ground up

/** `index`: of the answer. */
export function createStory(run, index) {
  const sequence = run.sequences[index];
  const prompt = run.prompts[sequence?.prompt_index ?? 0];
  if (!sequence || !prompt) return { run, prompt: prompt ?? null, sequence: null, isRunning: run.state === "running" };
  return {
    run,
    prompt,
    sequence,
    isRunning: run.state === "running",
    stations: stations(sequence),
    balance: balance(sequence.ledger),
    prefills: sequence.steps.flatMap((step, i) => (step.kind === "prefill" && !step.is_recompute ? [{ step, index: i }] : [])),
    columns: columns(sequence),
    groups: groupTokens(sequence.output),
    coverage: coverage(prompt, sequence),
  };
}

/**
 * What stands in the row of decode: the first token, which prefill gave, then a column for each step that chose a token. A column
 * covers the time since the one before it, so columns side by side leave nothing out: {stepIndex, step, tokens, beginMs, endMs,
 * ms, parts, isFirst}. Parts are the step's own figures; what was between two steps is looked up in the ledger.
 */
export function columns({ steps, output, ledger }) {
  const tokensOf = Map.groupBy(output, (token) => token.step_index);
  const first = output.find((token) => token.step_index !== null);
  if (!first) return [];
  const list = [];
  let from = endOf(steps[first.step_index]);
  const wasPrefill = steps[first.step_index].kind === "prefill"; // else the log has lost the run's beginning
  if (wasPrefill) {
    list.push({
      stepIndex: first.step_index,
      step: steps[first.step_index],
      tokens: [first],
      beginMs: from,
      endMs: from,
      ms: 0,
      parts: [],
      isFirst: true,
    });
  } else from = steps[first.step_index].begin_ms;
  const gaps = new Gaps(ledger);
  let sums = {};
  let at = from; // the end of the step before, with a column or without
  for (let stepIndex = first.step_index + (wasPrefill ? 1 : 0); stepIndex < steps.length; stepIndex++) {
    const step = steps[stepIndex];
    gaps.add(sums, at, step.begin_ms);
    const add = (look, ms) => ms > 0 && (sums[look] = (sums[look] ?? 0) + ms);
    add("host", step.schedule_ms + step.pack_ms + step.commit_ms);
    add(step.is_recompute ? "fault" : "decode", step.own_ms);
    add(step.is_recompute ? "fault" : "others", step.others_ms);
    at = endOf(step);
    const tokens = tokensOf.get(stepIndex);
    if (!tokens) continue; // computed again, say: a part of the column that waited for it
    const parts = PART_LOOKS.flatMap((look) => (sums[look] > 0 ? [{ look, ms: sums[look] }] : []));
    list.push({ stepIndex, step, tokens, beginMs: from, endMs: at, ms: at - from, parts, isFirst: false });
    from = at;
    sums = {};
  }
  return list;
}

const endOf = (step) => step.begin_ms + step.ms;

/**
 * Time between steps, as the ledger calls it. In the ledger of a very long run neighbouring intervals are joined by kind, so
 * their places are not exact.
 */
class Gaps {
  #waits; // all that is neither host nor a step
  #next = 0;

  constructor({ intervals }) {
    this.#waits = intervals.filter(({ kind }) => kind.startsWith("stall_") || kind === "restart");
  }

  add(sums, from, to) {
    let rest = to - from;
    while (this.#next < this.#waits.length && this.#waits[this.#next].begin_ms + this.#waits[this.#next].ms <= from)
      this.#next += 1;
    for (let i = this.#next; i < this.#waits.length && this.#waits[i].begin_ms < to; i++) {
      const { kind, begin_ms: beginMs, ms } = this.#waits[i];
      const inside = Math.min(Math.min(beginMs + ms, to) - Math.max(beginMs, from), rest);
      if (inside <= 0) continue;
      sums[lookOf(kind)] = (sums[lookOf(kind)] ?? 0) + inside;
      rest -= inside;
    }
    if (rest > 0) sums.host = (sums.host ?? 0) + rest;
  }
}

/** Tokens that have a part of the same character stand in one group: [{tokens, begin, end}]. */
export function groupTokens(tokens) {
  const groups = [];
  for (const token of tokens) {
    const last = groups.at(-1);
    if (last && token.begin < token.end && token.begin < last.end) {
      last.tokens.push(token);
      last.end = Math.max(last.end, token.end);
    } else groups.push({ tokens: [token], begin: token.begin, end: token.end });
  }
  return groups;
}

/** Prompt tokens: from the cache, computed, and whether both are all of them; `isDone`: the prompt was computed to its end. */
function coverage(prompt, sequence) {
  const cached = prompt.cache?.hit_tokens ?? 0;
  const computed = sequence.steps.reduce((sum, s) => sum + (s.kind === "prefill" && !s.is_recompute ? s.count : 0), 0);
  const isDone = sequence.output.length > 0 && sequence.steps[0]?.kind === "prefill"; // else the log has lost the beginning
  return { cached, computed, isDone, isBalanced: !isDone || cached + computed === prompt.num_tokens };
}

/** Characters are code points here and on the server; JavaScript's own indices are not. */
export class Characters {
  #list;
  constructor(text) {
    this.#list = Array.from(text);
  }
  get length() {
    return this.#list.length;
  }
  slice(begin, end) {
    return this.#list.slice(begin, end).join("");
  }
}

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  if (sorted.length === 0) return null;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** FLOP per byte and FLOP/s of a step, as a point under the roofs. */
export function rooflinePoint({ flops, bytes, run_ms: runMs }) {
  return bytes > 0 && runMs > 0 && flops > 0 ? { x: flops / bytes, y: flops / (runMs / 1000) } : null;
}
