// Ledger: which station of the page each interval of a run's time belongs to, and whether all sum up.
//
// Owns this table and the sums. Pure: knows nothing of words or of the DOM. Times are ms from the request's beginning.

import { lookOf } from "../kinds.js";

export const STATIONS = ["text", "tokens", "wait", "prefill", "decode", "again"];
const [TEXT, TOKENS, WAIT, PREFILL, DECODE, AGAIN] = STATIONS.keys();

// Kinds that are not here (host, recompute, restart, stalls) belong to the station that they happen in.
const HOME = {
  receive: TEXT,
  parse: TEXT,
  render: TEXT,
  tokenize: TOKENS,
  grammar: TOKENS,
  admit: WAIT,
  link_in: WAIT,
  queue_step: WAIT,
  queue_rows: WAIT,
  queue_tokens: WAIT,
  queue_blocks: WAIT,
  queue_order: WAIT,
  queue_restart: WAIT,
  prefill_own: PREFILL,
  prefill_others: PREFILL,
  decode_own: DECODE,
  decode_others: DECODE,
  link_out: AGAIN,
  text: AGAIN,
  write: AGAIN,
  client: AGAIN,
};

export const STATION_LOOKS = { text: "host", tokens: "host", wait: "wait", prefill: "prefill", decode: "decode", again: "host" };

const TOLERANCE_MS = 0.01; // floats of integer ns: each is off by far less, thousands of them by less than this

/** [{name, beginMs, endMs, ms}] of all six, in order. Each is one stretch of time, so they touch as the intervals do. */
export function stations(sequence) {
  const { intervals } = sequence.ledger;
  const firstStepMs = sequence.steps[0]?.begin_ms ?? Infinity;
  const firstTokenMs = sequence.output.find((token) => token.step_index !== null)?.at_ms ?? Infinity;
  const found = STATIONS.map((name) => ({ name, beginMs: null, endMs: null, ms: 0 }));
  let at = TEXT;
  for (const { kind, begin_ms: beginMs, ms } of intervals) {
    const middle = beginMs + ms / 2;
    const here = middle < firstStepMs ? at : middle < firstTokenMs ? PREFILL : DECODE;
    at = Math.max(at, HOME[kind] ?? here);
    const station = found[at];
    station.beginMs ??= beginMs;
    station.endMs = beginMs + ms;
    station.ms += ms;
  }
  let end = 0;
  for (const station of found) {
    station.beginMs ??= end; // one that took no time stands between its neighbours
    station.endMs ??= station.beginMs;
    end = station.endMs;
  }
  return found;
}

/** {sumMs, totalMs, isBalanced}: the server's word and our own sum have to agree with the total. */
export function balance({ total_ms: totalMs, is_balanced: isBalanced, intervals }) {
  const sumMs = intervals.reduce((sum, { ms }) => sum + ms, 0);
  const ends = intervals.every(
    ({ begin_ms: beginMs }, i) => i === 0 || Math.abs(intervals[i - 1].begin_ms + intervals[i - 1].ms - beginMs) <= TOLERANCE_MS,
  );
  return { sumMs, totalMs, isBalanced: isBalanced && ends && Math.abs(sumMs - totalMs) <= TOLERANCE_MS };
}

/** The index of the interval at a moment; the last one from its end on. */
export function intervalAt(intervals, atMs) {
  let low = 0;
  let high = intervals.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (intervals[middle].begin_ms <= atMs) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** {look: path of rectangles, one unit high} in ms; neighbours of one look are one rectangle. */
export function barPaths(intervals) {
  const paths = {};
  let run = null;
  const close = () => {
    if (run) paths[run.look] = `${paths[run.look] ?? ""}M${run.begin} 0H${run.end}V1H${run.begin}Z`;
  };
  for (const { kind, begin_ms: beginMs, ms } of intervals) {
    const look = lookOf(kind);
    const end = +(beginMs + ms).toFixed(4);
    if (run?.look === look) run.end = end;
    else {
      close();
      run = { look, begin: +beginMs.toFixed(4), end };
    }
  }
  close();
  return paths;
}

/** Blame of all intervals of some kinds, joined by who it was: [{run, isSelf, ms}], the largest first. */
export function blameOf(intervals, kinds) {
  const byOwner = new Map();
  for (const { kind, blame } of intervals) {
    if (!kinds.includes(kind)) continue;
    for (const { run, is_self: isSelf = false, ms } of blame ?? []) {
      const key = isSelf ? "self" : (run ?? "");
      const owner = byOwner.get(key) ?? { run, isSelf, ms: 0 };
      owner.ms += ms;
      byOwner.set(key, owner);
    }
  }
  return [...byOwner.values()].sort((a, b) => b.ms - a.ms);
}
