// Pixels: the steps of a view as columns of a canvas, joined where more than one falls on the same pixel.
//
// Owns the joining: a column shows the largest of each, and the prediction of its slowest step, so that no peak is lost and
// measured stands beside its own prediction. Knows nothing of colours or lanes.

const GAP_MIN_WIDTH = 4; // a step of fewer pixels than this gets no gap to its neighbour

/** `scale`: pixels per CSS pixel. Returns [{x0, x1, index, prefill, decode, ms, hostMs, predictedMs, waiting}], x in CSS pixels. */
export function pixelColumns(steps, { beginMs, endMs }, width, scale) {
  const toPixels = (width * scale) / (endMs - beginMs);
  const [begins, sizes] = [steps.column("begin_ms"), steps.column("ms")];
  const columns = [];
  // one step earlier, since it may reach into the view
  for (let index = Math.max(0, steps.firstAfter(beginMs) - 1); index < steps.length && begins[index] < endMs; index++) {
    const x0 = Math.round((begins[index] - beginMs) * toPixels);
    let x1 = Math.round((begins[index] + sizes[index] - beginMs) * toPixels);
    if (x1 <= 0) continue;
    if (x1 - x0 >= GAP_MIN_WIDTH) x1 -= 1;
    const before = columns[columns.length - 1];
    if (before && x0 < before.x1 && x1 <= Math.max(before.x1, x0 + 1)) join(before, steps, index);
    else columns.push(column(steps, index, before ? Math.max(x0, before.x1) : x0, Math.max(x1, x0 + 1)));
  }
  for (const each of columns) {
    each.x0 /= scale;
    each.x1 /= scale;
  }
  return columns;
}

function column(steps, index, x0, x1) {
  return {
    x0,
    x1,
    index, // of its slowest step
    prefill: steps.column("prefill_tokens")[index],
    decode: steps.column("decode_tokens")[index],
    ms: steps.column("ms")[index],
    hostMs: steps.column("host_ms")[index],
    predictedMs: steps.column("predicted_ms")[index],
    waiting: steps.column("waiting")[index],
  };
}

function join(into, steps, index) {
  const next = column(steps, index, into.x0, into.x1);
  const slowest = next.ms > into.ms ? next : { ...into };
  Object.assign(into, slowest, {
    prefill: Math.max(into.prefill, next.prefill),
    decode: Math.max(into.decode, next.decode),
    waiting: Math.max(into.waiting, next.waiting),
  });
}

const TOPS = [1, 2, 3, 4, 5, 6, 8, 10];

/** The least round number that is not below `value`: the top of an axis. */
export function roundUp(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return TOPS.map((factor) => factor * power).find((top) => top >= value * 0.9999);
}

/** A round distance between ticks, so that some `count` of them fit into `spanMs`. */
export function tickMs(spanMs, count) {
  const steps = [50, 100, 200, 500, 1000, 2000, 5000, 10_000, 15_000, 30_000];
  return steps.find((step) => spanMs / step <= count) ?? steps[steps.length - 1];
}
