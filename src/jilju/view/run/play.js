// Play: moves the page's moment through the run, station by station or at a true or slowed pace.
//
// Owns the clock of the replay. Where motion is unwelcome the moment jumps from one end of an interval to the next.

const STATION_MS = 1_800; // of each station, played station by station
const STEP_MS = 160; // of each step of decode, within bounds
const [DECODE_MIN_MS, DECODE_MAX_MS] = [3_000, 16_000];

export const PACES = ["stations", "true", "slow"];
const SLOW = 10;

/** `show(ms)` shows a moment, null the whole run; `changed(isPlaying)` is told; `now` and `nextFrame` are the browser's. */
export function createPlay({ story, show, changed, now, nextFrame, isCalm }) {
  let pace = PACES[0];
  let playing = null; // {legs, leg, beganAt}
  let at = null;

  /** [{beginMs, endMs, takesMs}]: stretches of the run and how long each takes to show. */
  function legs(fromMs) {
    const { stations, columns, sequence } = story();
    const all = [];
    for (const { name, beginMs, endMs, ms } of stations) {
      if (ms <= 0 || endMs <= fromMs) continue;
      const begin = Math.max(beginMs, fromMs);
      let takesMs = STATION_MS;
      if (name === "decode") takesMs = Math.min(Math.max(columns.length * STEP_MS, DECODE_MIN_MS), DECODE_MAX_MS);
      if (pace !== "stations") takesMs = (endMs - begin) * (pace === "slow" ? SLOW : 1);
      else takesMs *= (endMs - begin) / (endMs - beginMs);
      all.push({ beginMs: begin, endMs, takesMs });
    }
    return all.length > 0 ? all : [{ beginMs: 0, endMs: sequence.ledger.total_ms, takesMs: 1 }];
  }

  function calm(ms) {
    const { intervals } = story().sequence.ledger;
    const last = intervals.findLast((interval) => interval.begin_ms + interval.ms <= ms);
    return last ? last.begin_ms + last.ms : 0;
  }

  function frame() {
    if (playing === null) return;
    let spent = now() - playing.beganAt;
    while (playing.leg < playing.legs.length && spent >= playing.legs[playing.leg].takesMs) {
      spent -= playing.legs[playing.leg].takesMs;
      playing.beganAt += playing.legs[playing.leg].takesMs;
      playing.leg += 1;
    }
    if (playing.leg === playing.legs.length) {
      stop();
      at = null;
      show(null);
      return;
    }
    const { beginMs, endMs, takesMs } = playing.legs[playing.leg];
    at = beginMs + (endMs - beginMs) * (spent / takesMs);
    show(isCalm() ? calm(at) : at);
    nextFrame(frame);
  }

  function start(fromMs) {
    playing = { legs: legs(fromMs), leg: 0, beganAt: now() };
    changed(true);
    frame();
  }

  function stop() {
    if (playing === null) return;
    playing = null;
    changed(false);
  }

  return {
    toggle() {
      if (playing) stop();
      else start(at ?? 0);
    },
    stop,
    setPace(name) {
      pace = name;
      if (playing) start(at ?? 0);
    },
    /** Somebody else moved to a moment. */
    moved(ms) {
      at = ms;
      stop();
    },
  };
}
