// Terms: what each word means, in one sentence with the numbers of the run on the page.
//
// Owns which figures a sentence holds. A term whose figures a run does not have has a second sentence, "<term>_bare", without.

import { Characters, median } from "./story.js";

/** explain(name) for the story that `story()` gives, or null while there is none. */
export function createTerms({ words, rich, story }) {
  const { duration, bytes } = words;

  /** The holes of a term's sentence; null: there is nothing to fill them with. */
  const HOLES = {
    token: ({ prompt }) => ({ tokens: prompt.num_tokens, characters: new Characters(prompt.text).length }),
    special: ({ prompt }) => ({ count: prompt.tokens.filter((token) => token.is_special).length }),
    template: ({ prompt }) => {
      const own = prompt.spans.reduce((sum, s) => sum + (s.role === null ? s.end - s.begin : 0), 0);
      return { own, characters: new Characters(prompt.text).length };
    },
    cache: ({ prompt }) => prompt.cache && { hit: prompt.cache.hit_tokens, tokens: prompt.num_tokens },
    block: ({ prompt, run }) =>
      prompt.cache && {
        size: prompt.cache.block_size,
        bytes: bytes(prompt.cache.block_size * run.machine.kv_bytes_per_token),
      },
    kv: ({ sequence, run }) => {
      const last = sequence?.steps.at(-1);
      const tokens = last && last.start + last.count;
      return (
        last && { tokens, bytes: bytes(tokens * run.machine.kv_bytes_per_token), each: bytes(run.machine.kv_bytes_per_token) }
      );
    },
    wait: ({ stations }) => stations && { duration: duration(stations[2].ms) },
    others: ({ sequence }) => {
      const sum = (kinds) => kinds.reduce((ms, kind) => ms + (sequence?.ledger.by_kind[kind] ?? 0), 0);
      return sequence && { duration: duration(sum(["prefill_others", "decode_others"])) };
    },
    step: ({ sequence }) => sequence?.steps.length && { steps: sequence.steps.length },
    batch: ({ sequence }) => sequence?.steps.length && { rows: Math.max(...sequence.steps.map((step) => step.rows)) },
    prefill: ({ coverage, stations }) => coverage?.computed && { tokens: coverage.computed, duration: duration(stations[3].ms) },
    chunk: ({ prefills }) => prefills?.length && { chunks: prefills.length },
    decode: ({ columns, sequence }) =>
      sequence?.tpot_ms && { steps: columns.filter((column) => !column.isFirst).length, duration: duration(sequence.tpot_ms) },
    flop: ({ sequence }) => {
      const decode = sequence?.steps.find((step) => step.kind === "decode" && step.rows === 1);
      return decode && { flops: words.flops(decode.flops) };
    },
    moved: ({ run, columns }) => {
      const moved = median((columns ?? []).filter((column) => !column.isFirst).map((column) => column.step.bytes));
      return moved && { bytes: bytes(moved), weights: bytes(run.machine.weight_bytes) };
    },
    memory_roof: ({ run: { machine } }) => machine.read_bytes_per_s && { rate: `${bytes(machine.read_bytes_per_s)}/s` },
    compute_roof: ({ run: { machine } }) => machine.flops_per_s && { rate: words.flopRate(machine.flops_per_s) },
    intensity: ({ run: { machine } }) =>
      machine.flops_per_s &&
      machine.read_bytes_per_s && { ridge: words.number(machine.flops_per_s / machine.read_bytes_per_s, 2) },
    detokenize: ({ groups }) => {
      const joined = (groups ?? []).filter((group) => group.tokens.length > 1).length;
      return joined && { groups: joined };
    },
    ttft: ({ sequence }) => sequence?.ttft_ms && { duration: duration(sequence.ttft_ms) },
    tpot: ({ sequence }) =>
      sequence?.tpot_ms && { duration: duration(sequence.tpot_ms), rate: words.rate(1000 / sequence.tpot_ms) },
    ledger: ({ sequence }) =>
      sequence && { intervals: sequence.ledger.intervals.length, duration: duration(sequence.ledger.total_ms) },
    cost: ({ run: { cost } }) =>
      cost && !cost.is_default && { price: words.money(cost.price_per_hour, cost.currency), time: duration(cost.machine_ms) },
    op: ({ run: { machine } }) => machine.num_layers && { layers: machine.num_layers },
    kernels: ({ run: { machine } }) => ({ kernels: machine.kernel_set, threads: machine.num_threads }),
    probability: () => ({}),
    sampling: () => ({}),
    predicted: () => ({}),
    host: ({ sequence }) => sequence && { duration: duration(sequence.ledger.by_kind.host ?? 0) },
    recompute: ({ sequence }) => sequence?.preemptions && { count: sequence.preemptions },
  };

  return (name) => {
    const current = story();
    const holes = current && HOLES[name](current);
    return holes ? rich.plain(`term_${name}`, holes) : words.t(`term_${name}_bare`);
  };
}
