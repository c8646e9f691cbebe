// Roofline: each step as a point, by the arithmetic it does for a byte and the arithmetic it did in a second, under the two roofs.
//
// Owns the drawing. Both axes are logarithmic, so both roofs are straight.

import { svg } from "../dom.js";
import { rooflinePoint } from "./story.js";

const [WIDTH, HEIGHT] = [440, 264];
const [LEFT, RIGHT, TOP, BOTTOM] = [56, 16, 28, 44];
const DOT = 3.5;

/** {drawing, choose(index)}; null if the machine's roofs are not known or no step can be placed. */
export function drawRoofline({ story, words }) {
  const { t } = words;
  const { read_bytes_per_s: bandwidth, flops_per_s: peak } = story.run.machine;
  const points = story.sequence.steps.flatMap((step, index) => {
    const point = rooflinePoint(step);
    return point ? [{ ...point, step, index }] : [];
  });
  if (!bandwidth || !peak || points.length === 0) return null;
  const ridge = peak / bandwidth;
  const xs = [ridge, ...points.map((point) => point.x)];
  const ys = [peak, ...points.map((point) => point.y)];
  const low = { x: Math.log10(Math.min(...xs) / 3), y: Math.log10(Math.min(...ys) / 3) };
  const high = { x: Math.log10(Math.max(...xs) * 3), y: Math.log10(Math.max(...ys) * 2) };
  const x = (value) => LEFT + ((Math.log10(value) - low.x) / (high.x - low.x)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((Math.log10(value) - low.y) / (high.y - low.y)) * (HEIGHT - TOP - BOTTOM);

  const text = (className, px, py, words_, anchor = "start") =>
    svg("text", { class: className, x: px.toFixed(1), y: py.toFixed(1), "text-anchor": anchor }, words_);
  const edge = Math.max(10 ** low.x, 10 ** low.y / bandwidth); // where the memory roof comes in from the left or from below
  const roof = svg("path", {
    class: "roof-line",
    d: `M${x(edge)} ${y(bandwidth * edge)}L${x(ridge)} ${y(peak)}H${WIDTH - RIGHT}`,
  });
  const angle = (-Math.atan2(y(bandwidth * edge) - y(peak), x(ridge) - x(edge)) * 180) / Math.PI;
  // its end is at the ridge, for points lie further down
  const place = `translate(${(x(ridge) - 8).toFixed(1)} ${(y(peak) - 3).toFixed(1)}) rotate(${angle.toFixed(1)})`;
  const memory = svg(
    "text",
    { class: "roof-name", transform: place, "text-anchor": "end" },
    t("memory_roof_name", { rate: `${words.bytes(bandwidth)}/s` }),
  );
  const compute = text(
    "roof-name",
    WIDTH - RIGHT,
    y(peak) - 8,
    t("compute_roof_name", { rate: words.flopRate(peak) }),
    "end",
  );

  const dots = (kind) => {
    const d = points
      .filter((point) => point.step.kind === kind)
      .map(
        (point) =>
          `M${(x(point.x) - DOT).toFixed(1)} ${y(point.y).toFixed(1)}a${DOT} ${DOT} 0 1 0 ${2 * DOT} 0a${DOT} ${DOT} 0 1 0 ${-2 * DOT} 0`,
      );
    return svg("path", { class: `look-${kind} dots`, d: d.join("") });
  };
  const ring = svg("circle", { class: "dot-chosen", r: 8, visibility: "hidden" });
  const axisY = HEIGHT - BOTTOM;
  const ticks = [];
  for (let power = Math.ceil(low.x); power <= high.x; power++) {
    ticks.push(
      svg("path", { class: "tick", d: `M${x(10 ** power)} ${axisY}v4` }),
      text("tick-text", x(10 ** power), axisY + 17, words.number(10 ** power), "middle"),
    );
  }
  for (let power = Math.ceil(low.y); power <= high.y; power++) {
    ticks.push(
      svg("path", { class: "tick", d: `M${LEFT} ${y(10 ** power)}h-4` }),
      text("tick-text", LEFT - 7, y(10 ** power) + 4, words.flops(10 ** power).replace("FLOP", ""), "end"),
    );
  }
  const frame = svg("path", { class: "axis", d: `M${LEFT} ${TOP}V${axisY}H${WIDTH - RIGHT}` });
  const names = [text("tick-text", WIDTH - RIGHT, HEIGHT - 8, t("roofline_x"), "end"), text("tick-text", 4, 14, t("roofline_y"))];
  const label = t("roofline_label", {
    ridge: words.number(ridge, 2),
    compute: words.flopRate(peak),
    memory: `${words.bytes(bandwidth)}/s`,
  });
  const parts = [frame, ...ticks, ...names, roof, memory, compute, dots("decode"), dots("prefill"), ring];
  return {
    drawing: svg("svg", { class: "roofline", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, ...parts),
    choose(index) {
      const here = points.find((point) => point.index === index);
      ring.setAttribute("visibility", here ? "visible" : "hidden");
      if (!here) return;
      ring.setAttribute("cx", x(here.x).toFixed(1));
      ring.setAttribute("cy", y(here.y).toFixed(1));
    },
  };
}
