// Kinds: the intervals that a run's time is made of, and the colour of each. Their names are the strings kind_<kind>.
//
// Owns this table. Knows nothing of drawing.

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
