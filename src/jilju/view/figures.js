// Figures: what an answer cost, from its `usage` and `timings`, as a short list and as a ledger that sums to the total.
//
// Owns which figure is shown and how the ledger's parts are grouped. Knows nothing of words or of the DOM.

// Every interval of `timings` stands in exactly one group, so the groups sum to total_ms as the intervals do.
const GROUPS = [
  ["host", ["parse_ms", "render_ms", "tokenize_ms", "grammar_ms"]],
  ["wait", ["queue_ms"]],
  ["prefill", ["prefill_ms"]],
  ["wait", ["stalled_ms"]], // others' prefill went first
  ["decode", ["decode_ms"]],
  ["resume", ["resume_ms"]],
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

/** Tokens, pace and the whole: [{key, params, kind}]. key names a string, params are numbers; what is not known is left out. */
export function tokenFigures({ usage, timings, measured }) {
  const list = [];
  const add = (key, params, kind = null) => list.push({ key, params, kind });
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    if (cached > 0) add("figure_in_cached", { tokens: usage.prompt_tokens, cached }, "cached");
    else add("figure_in", { tokens: usage.prompt_tokens });
    add("figure_out", { tokens: usage.completion_tokens });
  } else {
    add("figure_out", { tokens: measured.numTokens });
  }
  const ttftMs = timings?.ttft_ms ?? measured.ttftMs;
  if (ttftMs != null) add("figure_ttft", { ms: ttftMs });
  const tokensPerSecond = rate({ timings, measured });
  if (tokensPerSecond !== null) add("figure_rate", { rate: tokensPerSecond });
  add("figure_total", { ms: timings?.total_ms ?? measured.totalMs });
  return list;
}

/** The parts that make up the total, same form, in the order of the way. */
export function timeFigures(timings) {
  const hostMs = ledger(timings).parts.reduce((sum, { kind, ms }) => sum + (kind === "host" ? ms : 0), 0);
  const always = (key, ms, kind) => ({ key, params: { ms }, kind });
  const ifAny = (key, ms, kind) => (ms > 0 ? [always(key, ms, kind)] : []);
  return [
    always("figure_queue", timings.queue_ms, "wait"),
    always("figure_prefill", timings.prefill_ms, "prefill"),
    ...ifAny("figure_stalled", timings.stalled_ms, "wait"),
    always("figure_decode", timings.decode_ms, "decode"),
    ...ifAny("figure_resume", timings.resume_ms, "resume"),
    always("figure_host", hostMs, "host"),
  ];
}

// The pace of decode: gaps between tokens, so the first token's wait is not in it.
function rate({ timings, measured }) {
  if (timings) return timings.tpot_ms > 0 ? 1000 / timings.tpot_ms : null;
  if (measured.numTokens < 2) return null;
  return ((measured.numTokens - 1) * 1000) / Math.max(measured.totalMs - measured.ttftMs, 1);
}
