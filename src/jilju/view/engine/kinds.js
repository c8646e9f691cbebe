// Kinds: the parts of a call's ledger: which colour each has, and whether all of them make the whole.
//
// Owns these rules. Knows nothing of drawing.

const LOOKS = {
  prefill_own: "prefill",
  decode_own: "decode",
  prefill_others: "others",
  decode_others: "others",
  recompute: "fault",
  restart: "fault",
  queue_restart: "fault",
  client: "wait",
  in_flight: "wait",
};
/** The colour of a kind: host, wait, others, prefill, decode or fault. */
export const lookOf = (kind) => LOOKS[kind] ?? (/^(queue|stall)_/.test(kind) ? "wait" : "host");

const ROUNDING_MS = 0.05; // a few dozen parts, each rounded to a µs: far below this

export function isBalanced({ parts, total_ms: totalMs }) {
  return Math.abs(parts.reduce((sum, { ms }) => sum + ms, 0) - totalMs) <= ROUNDING_MS;
}
