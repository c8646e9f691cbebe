// About: the numbers in the sentence that explains a term, out of the frame that is shown.
//
// Owns which sentence and which numbers; the sentences are in the strings files, "about_<term>". Where there is nothing to
// count yet, the sentence is "about_<term>_none". Knows nothing of the page.

const sum = (list) => list.reduce((total, value) => total + value, 0);

/** `shown()` gives {frame, steps}: the frame and the steps of the timeline. */
export function createAbout({ words, format, shown }) {
  const { duration, rate, bytes, share, signedShare, t } = words;

  const span = (tiles) => ({ span: duration(tiles.seconds * 1000) });
  const percentiles = ({ p50, p99 }) => ({ p50: duration(p50), p99: duration(p99) });
  const machineTime = (frame, name) => ({
    time: format.long(frame.cost.machine_s[name]),
    share: share(frame.cost.machine_s.total > 0 ? frame.cost.machine_s[name] / frame.cost.machine_s.total : 0),
  });
  const owned = (frame, wanted) => sum(frame.memory.filter(wanted).map((each) => each.bytes));

  // Each gives the params of its sentence, or null where "_none" says it.
  const PARAMS = {
    streams: ({ tiles }) => ({ streams: tiles.streams, waiting: tiles.waiting }),
    output: ({ tiles }) => ({ output: rate(tiles.output_tokens_per_s), prompt: rate(tiles.prompt_tokens_per_s), ...span(tiles) }),
    ttft: ({ tiles }) => tiles.ttft_ms && { ...percentiles(tiles.ttft_ms), limit: duration(tiles.slo_ttft_ms), ...span(tiles) },
    gap: ({ tiles }) => tiles.gap_ms && { ...percentiles(tiles.gap_ms), limit: duration(tiles.slo_gap_ms), ...span(tiles) },
    goodput: ({ tiles }) => ({
      goodput: rate(tiles.goodput_per_s),
      ttft: duration(tiles.slo_ttft_ms),
      gap: duration(tiles.slo_gap_ms),
      ...span(tiles),
    }),
    memory_roof: ({ tiles, read_bytes_per_s: roof }) =>
      tiles.memory_roof_share !== null && roof !== null
        ? { share: share(tiles.memory_roof_share), roof: bytes(roof), moved: bytes(roof * tiles.memory_roof_share) }
        : null,
    compute_roof: ({ tiles, flops_per_s: roof }) =>
      tiles.compute_roof_share !== null && roof !== null
        ? { share: share(tiles.compute_roof_share), roof: words.flopRate(roof) }
        : null,
    kv: ({ blocks }) => ({
      held: blocks.held,
      total: blocks.total,
      size: blocks.block_size,
      bytes: bytes(blocks.held * blocks.bytes_per_block),
    }),
    prediction: ({ tiles }) =>
      tiles.prediction_error !== null
        ? { error: share(tiles.prediction_error), bias: signedShare(tiles.prediction_bias ?? 0), ...span(tiles) }
        : null,
    balance: ({ tiles, blocks, counts }) => ({ imbalance: tiles.imbalance, accepted: counts.accepted, total: blocks.total }),
    step: (frame, { steps }) =>
      steps.length > 0 ? { steps: steps.length, rows: rate(sum(steps.column("rows")) / steps.length) } : null,
    prefill: (frame, { steps }) => (steps.length > 0 ? { tokens: sum(steps.column("prefill_tokens")) } : null),
    decode: (frame, { steps }) => (steps.length > 0 ? { tokens: sum(steps.column("decode_tokens")) } : null),
    step_time: (frame, { steps }) => {
      if (steps.length === 0) return null;
      const ms = sum(steps.column("ms"));
      return { mean: duration(ms / steps.length), host: share(sum(steps.column("host_ms")) / ms) };
    },
    queue_length: ({ tiles }) => ({ waiting: tiles.waiting }),
    block: ({ blocks }) => ({ size: blocks.block_size, bytes: bytes(blocks.bytes_per_block), total: blocks.total }),
    held: ({ blocks }) => ({ held: blocks.held, total: blocks.total }),
    cached: ({ blocks }) => ({ cached: blocks.cached, tokens: blocks.cached * blocks.block_size }),
    free: ({ blocks }) => ({ free: blocks.free, tokens: blocks.free * blocks.block_size }),
    waterfall: ({ slowest }) => (slowest.length > 0 ? { total: duration(slowest[0].total_ms) } : null),
    unattributed: ({ memory }) => ({ bytes: bytes(owned({ memory }, (each) => each.owner === "unattributed")) }),
    not_resident: ({ memory }) => ({ bytes: bytes(-owned({ memory }, (each) => each.owner === "not_resident")) }),
    file_pages: ({ memory }) => ({ bytes: bytes(owned({ memory }, (each) => each.is_file)) }),
    cost_requests: (frame) => machineTime(frame, "requests"),
    cost_idle: (frame) => machineTime(frame, "idle"),
    cost_load: (frame) => machineTime(frame, "load"),
    cost_failed: (frame) => machineTime(frame, "failed"),
    cost_recompute: (frame) => machineTime(frame, "recompute"),
    cost_host: (frame) => machineTime(frame, "host"),
    energy: ({ energy }) => ({ joules: words.joules(energy.joules), source: energy.source }),
    refused: ({ counts }) => ({ refused: counts.refused }),
    restarts: ({ counts }) => ({ restarts: counts.restarts }),
  };

  /** The sentence of a term. Terms without numbers of their own have none to fill in. */
  return function explain(key) {
    const { frame, steps } = shown();
    if (!(key in PARAMS)) return t(`about_${key}`);
    const params = PARAMS[key](frame, { steps });
    return params ? t(`about_${key}`, params) : t(`about_${key}_none`);
  };
}
