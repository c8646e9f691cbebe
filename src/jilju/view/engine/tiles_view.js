// Tiles: the figures that say at a glance how the engine does, each with what it is measured against.
//
// Owns their order and how each reads. A figure of which there is nothing to say is a dash.

import { h } from "../dom.js";
import { term } from "../term.js";
import { setText } from "./rows.js";

const NONE = "–";

export function createTilesView({ root, words }) {
  const { t, duration, rate, integer, share, signedShare } = words;

  // [name, figure(frame), what stands under it(frame), share of a meter(frame) or null]
  const TILES = [
    ["streams", ({ tiles }) => integer(tiles.streams), ({ tiles }) => t("tile_streams_sub", { waiting: tiles.waiting })],
    [
      "output",
      ({ tiles }) => t("per_second", { rate: rate(tiles.output_tokens_per_s) }),
      ({ tiles }) => t("tile_output_sub", { prompt: rate(tiles.prompt_tokens_per_s) }),
    ],
    ["ttft", ({ tiles }) => half(tiles.ttft_ms), ({ tiles }) => most(tiles.ttft_ms, tiles.slo_ttft_ms)],
    ["gap", ({ tiles }) => half(tiles.gap_ms), ({ tiles }) => most(tiles.gap_ms, tiles.slo_gap_ms)],
    ["goodput", ({ tiles }) => t("per_second", { rate: rate(tiles.goodput_per_s) }), () => t("tile_goodput_sub")],
    [
      "memory_roof",
      ({ tiles }) => orNone(tiles.memory_roof_share, share),
      ({ tiles }) => t("tile_memory_roof_sub", { share: orNone(tiles.compute_roof_share, share) }),
      ({ tiles }) => tiles.memory_roof_share ?? 0,
    ],
    [
      "kv",
      ({ tiles }) => share(tiles.kv_used_share),
      ({ blocks }) => t("tile_kv_sub", { held: blocks.held, total: blocks.total }),
      ({ tiles }) => tiles.kv_used_share,
    ],
    [
      "prediction",
      ({ tiles }) => orNone(tiles.prediction_error, (error) => `±${share(error)}`),
      ({ tiles }) => t("tile_prediction_sub", { bias: orNone(tiles.prediction_bias, signedShare) }),
    ],
  ];

  const orNone = (value, write) => (value === null ? NONE : write(value));
  const half = (percentiles) => orNone(percentiles, ({ p50 }) => duration(p50));
  const most = (percentiles, limit) => [
    t("tile_p99", { p99: orNone(percentiles, ({ p99 }) => duration(p99)) }),
    t("tile_limit", { limit: duration(limit) }),
  ];

  const updates = TILES.map(([name, figure, under, filled]) => {
    const value = h("p", { class: "tile-value" });
    const sub = h("p", { class: "tile-sub" });
    const fill = filled ? h("span", { class: `meter-fill meter-${name}` }) : null;
    const meter = fill && h("span", { class: "meter", "aria-hidden": "true" }, fill);
    root.append(h("li", { class: "tile", id: `tile-${name}` }, term(name, t(`tile_${name}`)), value, meter, sub));
    return (frame) => {
      setText(value, figure(frame));
      const lines = [under(frame)].flat();
      if (sub.children.length !== lines.length) sub.replaceChildren(...lines.map(() => h("span", {})));
      lines.forEach((line, place) => setText(sub.children[place], line));
      if (fill) fill.style.width = `${Math.min(1, filled(frame)) * 100}%`;
    };
  });

  return (frame) => updates.forEach((update) => update(frame));
}
