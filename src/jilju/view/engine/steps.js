// Steps: what the timeline draws, the columns of the last minute's steps and the marks among them.
//
// Owns which steps are kept and how one is found by its time or its serial. Knows nothing of drawing. Times are ms of the
// log's clock.

export const WINDOW_MS = 60_000;

const last = (list) => list[list.length - 1];

/** Holds one window: `replace` starts it anew, `append` moves it on by what a later frame brought. */
export function createSteps() {
  let columns = { serial: [], begin_ms: [], ms: [] };
  let marks = [];
  let endMs = 0;

  /** The first index whose step begins after `ms`. */
  function firstAfter(ms) {
    let low = 0;
    let high = columns.begin_ms.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (columns.begin_ms[middle] > ms) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  function drop(beforeMs) {
    const { begin_ms: begins, ms } = columns;
    let count = 0;
    while (count < begins.length && begins[count] + ms[count] <= beforeMs) count++;
    if (count > 0) for (const column of Object.values(columns)) column.splice(0, count);
    marks = marks.filter((mark) => mark.at_ms > beforeMs);
  }

  return {
    replace(frame) {
      columns = Object.fromEntries(Object.entries(frame.steps).map(([name, values]) => [name, [...values]]));
      marks = [...frame.marks];
      endMs = frame.end_ms;
    },
    append(frame) {
      const known = last(columns.serial) ?? -Infinity;
      const from = frame.steps.serial.findIndex((serial) => serial > known);
      if (from >= 0) for (const [name, values] of Object.entries(frame.steps)) columns[name].push(...values.slice(from));
      marks.push(...frame.marks);
      endMs = frame.end_ms;
      drop(endMs - WINDOW_MS);
    },
    get length() {
      return columns.serial.length;
    },
    get marks() {
      return marks;
    },
    get endMs() {
      return endMs;
    },
    column: (name) => columns[name],
    /** One step as an object with the names of the columns. */
    at: (index) => Object.fromEntries(Object.entries(columns).map(([name, values]) => [name, values[index]])),
    indexOf: (serial) => columns.serial.indexOf(serial),
    firstAfter,
    /** The step that runs at `ms`, or the nearest one; -1 if there is none. */
    nearest(ms) {
      const before = firstAfter(ms) - 1;
      const after = before + 1;
      if (after >= columns.serial.length) return before;
      if (before < 0) return after;
      const gapBefore = ms - (columns.begin_ms[before] + columns.ms[before]);
      return gapBefore <= columns.begin_ms[after] - ms ? before : after;
    },
  };
}
