// Timeline drawing: one canvas of lanes that share one scale of time.
//
// Owns what stands where and in which colour. Measured is filled, predicted is a thin line; prefill goes up from its base
// line, decode down from the same one. Knows nothing of events or of frames.

import { pixelColumns, roundUp, tickMs } from "./pixels.js";

// In CSS pixels from the top. `title` is where the words of a lane stand, which are HTML.
export const LANES = {
  marks: { top: 4, height: 16 },
  prefill: { title: 24, top: 46, height: 80 },
  decode: { top: 126, height: 48, title: 178 },
  time: { title: 212, top: 234, height: 80 },
  waiting: { title: 328, top: 350, height: 24 },
  axis: { top: 374, height: 20 },
  height: 396,
};
const FONT = "12px system-ui, sans-serif";
const TICK_PX = 96; // room for one label of the axis
const MARK_PX = 14; // marks nearer to each other than this are drawn as one with a number
const FAULTS = ["refused", "shed", "deadline", "failed", "restart"];

/** Marks of a view, those that would lie on each other joined: [{x, marks}]. */
export function markClusters(marks, view, width) {
  const clusters = [];
  for (const mark of marks) {
    const x = ((mark.at_ms - view.beginMs) / (view.endMs - view.beginMs)) * width;
    if (x < 0 || x > width) continue;
    const before = clusters[clusters.length - 1];
    if (before && x - before.x < MARK_PX) before.marks.push(mark);
    else clusters.push({ x, marks: [mark] });
  }
  return clusters;
}

/** The tops of the lanes' scales for what is in view. */
function scales(columns) {
  const top = (of) => roundUp(Math.max(0, ...columns.map(of)));
  return {
    prefill: top((column) => column.prefill),
    decode: top((column) => column.decode),
    time: top((column) => Math.max(column.ms, column.predictedMs)),
    waiting: top((column) => column.waiting),
  };
}

/**
 * Draws the view; returns the tops of the scales and whether there is no step in it. `scene`: {ctx, width, scale, steps, view,
 * colours, toUnix(ms), clock(ms), clockMs(ms), markName(kind), selected, hover, momentMs}; `selected` and `hover` are indexes of
 * steps or -1, `momentMs` is null for the present.
 */
export function drawTimeline(scene) {
  const { ctx, width, scale, steps, view } = scene;
  const columns = pixelColumns(steps, view, width, scale);
  const tops = scales(columns);
  ctx.setTransform(scale, 0, 0, scale, 0, 0);
  ctx.clearRect(0, 0, width, LANES.height);
  ctx.font = FONT;
  ctx.textBaseline = "alphabetic";
  drawGround(scene);
  drawSpan(scene, scene.selected, true);
  drawTokens(scene, columns, tops);
  drawTimes(scene, columns, tops);
  drawWaiting(scene, columns, tops);
  drawSpan(scene, scene.hover, false);
  drawMarks(scene);
  drawMoment(scene);
  return { tops, isEmpty: columns.length === 0 };
}

const toX = ({ view, width }, ms) => ((ms - view.beginMs) / (view.endMs - view.beginMs)) * width;

function drawGround(scene) {
  const { ctx, width, view, colours } = scene;
  const every = tickMs(view.endMs - view.beginMs, Math.max(1, Math.floor(width / TICK_PX)));
  ctx.lineWidth = 1;
  // ticks at round times of the wall clock, which is what their labels say
  const offset = scene.toUnix(0) % every;
  const first = Math.ceil((view.beginMs + offset) / every) * every - offset;
  for (let at = first; at <= view.endMs; at += every) {
    const x = Math.round(toX(scene, at)) + 0.5;
    ctx.strokeStyle = colours.line;
    line(ctx, x, LANES.prefill.top, x, LANES.axis.top);
    ctx.fillStyle = colours["ink-quiet"];
    const label = every < 1000 ? scene.clockMs(at) : scene.clock(at);
    const labelWidth = ctx.measureText(label).width;
    if (x + 4 + labelWidth <= width) ctx.fillText(label, x + 4, LANES.axis.top + 14);
  }
  ctx.strokeStyle = colours["line-strong"];
  for (const y of [LANES.decode.top, LANES.time.top + LANES.time.height, LANES.axis.top]) line(ctx, 0, y + 0.5, width, y + 0.5);
}

function drawTokens({ ctx, colours }, columns, tops) {
  const base = LANES.decode.top;
  ctx.fillStyle = colours.prefill;
  for (const { x0, x1, prefill } of columns) {
    if (prefill === 0) continue;
    const height = Math.max(1, (prefill / tops.prefill) * LANES.prefill.height);
    ctx.fillRect(x0, base - height, x1 - x0, height);
  }
  ctx.fillStyle = colours.decode;
  for (const { x0, x1, decode } of columns) {
    if (decode > 0) ctx.fillRect(x0, base + 1, x1 - x0, (decode / tops.decode) * LANES.decode.height);
  }
}

function drawTimes({ ctx, scale, colours }, columns, tops) {
  const base = LANES.time.top + LANES.time.height;
  const toHeight = (ms) => (ms / tops.time) * LANES.time.height;
  for (const { x0, x1, ms, hostMs, prefill } of columns) {
    ctx.fillStyle = prefill > 0 ? colours.prefill : colours.decode;
    ctx.fillRect(x0, base - toHeight(ms), x1 - x0, toHeight(ms));
    ctx.fillStyle = colours.host;
    ctx.fillRect(x0, base - toHeight(hostMs), x1 - x0, toHeight(hostMs));
  }
  // a line for each step, not through them: between steps nothing was predicted
  ctx.fillStyle = colours.ink;
  for (const { x0, x1, predictedMs } of columns) {
    const y = Math.round((base - toHeight(predictedMs)) * scale) / scale; // on whole pixels, or it is a blur
    ctx.fillRect(x0, y, x1 - x0, 1);
  }
}

function drawWaiting({ ctx, colours }, columns, tops) {
  ctx.fillStyle = colours.wait;
  for (const { x0, x1, waiting } of columns) {
    const height = (waiting / tops.waiting) * LANES.waiting.height;
    if (waiting > 0) ctx.fillRect(x0, LANES.axis.top - height, x1 - x0, height);
  }
}

/** A step over all lanes: a band that is at least as wide as a finger's line. */
function drawSpan(scene, index, isSelected) {
  if (index < 0 || index >= scene.steps.length) return;
  const { ctx, colours } = scene;
  const { begin_ms: beginMs, ms } = scene.steps.at(index);
  const x0 = toX(scene, beginMs);
  const x1 = Math.max(toX(scene, beginMs + ms), x0 + 1);
  ctx.globalAlpha = isSelected ? 0.16 : 1;
  ctx.fillStyle = colours.accent;
  ctx.strokeStyle = isSelected ? colours.accent : colours["ink-quiet"];
  const [top, bottom] = [LANES.prefill.top - 4, LANES.axis.top];
  if (isSelected) ctx.fillRect(x0 - 2, top, x1 - x0 + 4, bottom - top);
  ctx.globalAlpha = 1;
  ctx.lineWidth = 1;
  if (isSelected) ctx.strokeRect(Math.round(x0) - 2.5, top + 0.5, Math.round(x1 - x0) + 5, bottom - top - 1);
  else line(ctx, (x0 + x1) / 2, top, (x0 + x1) / 2, bottom);
}

function drawMarks(scene) {
  const { ctx, width, steps, view, colours, markName } = scene;
  const clusters = markClusters(steps.marks, view, width);
  const y = LANES.marks.top + LANES.marks.height / 2;
  clusters.forEach(({ x, marks }, place) => {
    const { kind } = marks.find((mark) => FAULTS.includes(mark.kind)) ?? marks[0];
    const colour = FAULTS.includes(kind) ? colours.fault : colours.wait;
    ctx.strokeStyle = ctx.fillStyle = colour;
    ctx.lineWidth = 1.5;
    if (marks.some((mark) => mark.kind === "restart")) {
      ctx.setLineDash([3, 3]);
      line(ctx, x, y + 8, x, LANES.axis.top);
      ctx.setLineDash([]);
    }
    const at = Math.min(Math.max(x, 6), width - 6);
    drawShape(ctx, kind, at, y);
    const alike = marks.filter((mark) => mark.kind === kind).length;
    const label = `${markName(kind)}${alike > 1 ? ` ×${alike}` : ""}${alike < marks.length ? ` +${marks.length - alike}` : ""}`;
    const room = (clusters[place + 1]?.x ?? width) - at - 16;
    ctx.fillStyle = colours["ink-quiet"];
    if (ctx.measureText(label).width <= room) ctx.fillText(label, at + 9, y + 4);
    else if (marks.length > 1 && room > 16) ctx.fillText(`×${marks.length}`, at + 9, y + 4);
  });
}

function drawShape(ctx, kind, x, y) {
  ctx.beginPath();
  if (kind === "refused" || kind === "shed" || kind === "failed") {
    ctx.moveTo(x - 4, y - 4);
    ctx.lineTo(x + 4, y + 4);
    ctx.moveTo(x + 4, y - 4);
    ctx.lineTo(x - 4, y + 4);
  } else if (kind === "restart") {
    ctx.arc(x, y, 4, 0.4, 1.75 * Math.PI);
    ctx.moveTo(x + 1, y - 6.5);
    ctx.lineTo(x + 3, y - 3.5);
    ctx.lineTo(x - 0.5, y - 2);
  } else if (kind === "preempted") {
    ctx.moveTo(x, y - 5);
    ctx.lineTo(x + 5, y);
    ctx.lineTo(x, y + 5);
    ctx.lineTo(x - 5, y);
    ctx.closePath();
  } else {
    ctx.arc(x, y, 4, 0, 2 * Math.PI);
    if (kind === "deadline") {
      ctx.moveTo(x, y - 2.5);
      ctx.lineTo(x, y);
      ctx.lineTo(x + 2, y);
    }
  }
  ctx.stroke();
}

function drawMoment(scene) {
  const { ctx, width, colours, momentMs } = scene;
  if (momentMs === null) return;
  const x = toX(scene, momentMs);
  if (x < 0 || x > width + 1) return;
  ctx.strokeStyle = colours.accent;
  ctx.lineWidth = 2;
  line(ctx, Math.min(x, width - 1), LANES.prefill.top - 4, Math.min(x, width - 1), LANES.axis.top);
}

function line(ctx, x0, y0, x1, y1) {
  ctx.beginPath();
  ctx.moveTo(x0, y0);
  ctx.lineTo(x1, y1);
  ctx.stroke();
}
