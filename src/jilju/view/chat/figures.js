// Figures: what an answer cost, from its `usage` and `timings`, as one short line and as a ledger that sums to the total.
//
// Owns which figure is shown and how the ledger's parts are grouped. Knows nothing of words or of the DOM.

// Every interval of `timings` stands in exactly one group, so the groups sum to total_ms as the intervals do.
const GROUPS = [
  ["host", ["parse_ms", "render_ms", "tokenize_ms", "grammar_ms"]],
  ["wait", ["queue_ms"]],
  ["prefill", ["prefill_ms"]],
  ["wait", ["stalled_ms"]], // others' prefill went first
  ["decode", ["decode_ms"]],
  ["fault", ["resume_ms"]],
  ["host", ["write_ms", "client_ms", "other_ms"]],
];
const ROUNDING_MS = 0.5; // twelve intervals, each rounded to microseconds or so: far below this

/** [{kind, ms}] in the order of time, and whether they sum to the total. */
export function ledger(timings) {
  const parts = GROUPS.map(([kind, fields]) => ({
    kind,
    ms: fields.reduce((sum, field) => sum + (timings[field] ?? 0), 0),
  })).filter((part) => part.ms > 0);
  const sum = parts.reduce((total, part) => total + part.ms, 0);
  return { parts, totalMs: timings.total_ms, balanced: Math.abs(sum - timings.total_ms) <= ROUNDING_MS };
}

/** What is said of an answer: [{key, params, kind}]. key names a string, params are numbers; what is not known is left out. */
export function answerFigures({ usage, timings, measured }) {
  const list = [];
  const add = (key, params, kind = null) => list.push({ key, params, kind });
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    add("figure_in", { tokens: usage.prompt_tokens });
    if (cached > 0) add("figure_cached", { tokens: cached }, "cached");
    add("figure_out", { tokens: usage.completion_tokens });
  } else {
    add("figure_out", { tokens: measured.numTokens });
  }
  const ttftMs = timings?.ttft_ms ?? measured.ttftMs;
  if (ttftMs != null) add("figure_ttft", { ms: ttftMs });
  const gapMs = msPerToken({ timings, measured });
  if (gapMs !== null) add("figure_gap", { ms: gapMs });
  add("figure_total", { ms: timings?.total_ms ?? measured.totalMs });
  return list;
}

// The pace of decode: gaps between tokens, so the first token's wait is not in it.
function msPerToken({ timings, measured }) {
  if (timings) return timings.tpot_ms > 0 ? timings.tpot_ms : null;
  if (measured.numTokens < 2) return null;
  return Math.max(measured.totalMs - measured.ttftMs, 1) / (measured.numTokens - 1);
}
