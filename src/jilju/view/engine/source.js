// Source: where frames come from: the live stream, moments of the past, a recorded file.
//
// Owns the one connection, when it is made again, and that of many moments asked for in a row only the last is fetched. Knows
// nothing of what a frame says. A page that nobody sees has no connection.

import { ApiError, isAbort } from "../api.js";

const FIRST_RETRY_MS = 1000;
const RETRY_MS_MAX = 15_000;
const SILENCE_MS = 8000; // a frame is due each second; a connection may die without a word
const FRAME_CHARS_MAX = 1 << 24; // a minute of 16,384 steps is some 2 MB
const FORGOTTEN_MS = 1000; // how much more the ring may forget between two calls
const HOPELESS = [401, 403]; // trying again changes nothing until a person does something

/**
 * `take(frame, how)`: how is "first", "next", "moment", or "passing" while a later moment is wanted already.
 * `tell({state, error, retryMs})`: state is "connecting", "live", "lost",
 * "past", "file". `retryMs` is null where a person has to try again. Returns {live, moment, retry, hide, show}.
 */
export function createSource({ api, take, tell }) {
  let isFile = false;
  let isHidden = false;
  let isLive = true; // what the page wants to see; false: a moment
  let connection = null; // the controller of the open stream
  let retryTimer = 0;
  let retryMs = FIRST_RETRY_MS;
  let wanted; // the moment to fetch next, while another one is on its way
  let asked = null; // the moment that was asked for last
  let isFetching = false;
  let isQuiet = false; // only the first call asks for a key by itself; a dialog that comes back by itself is a nuisance

  function close() {
    clearTimeout(retryTimer);
    connection?.abort();
    connection = null;
  }

  function lose(error) {
    const isHopeless = HOPELESS.includes(error.status);
    tell({ state: "lost", error, retryMs: isHopeless ? null : retryMs });
    if (isHopeless) return;
    retryTimer = setTimeout(open, retryMs);
    retryMs = Math.min(retryMs * 2, RETRY_MS_MAX);
  }

  async function listen(controller) {
    let silence = 0;
    const rearm = () => {
      clearTimeout(silence);
      silence = setTimeout(() => controller.abort(new ApiError("connection_lost", "no frame for 8 s")), SILENCE_MS);
    };
    let how = "first";
    try {
      rearm();
      const options = { signal: controller.signal, quiet: isQuiet, maxChars: FRAME_CHARS_MAX };
      for await (const { data } of api.events("/v1/jilju/events?seconds=60", options)) {
        rearm();
        retryMs = FIRST_RETRY_MS;
        if (how === "first") tell({ state: "live" });
        take(JSON.parse(data), how);
        how = "next";
      }
      throw new ApiError("connection_lost", "the stream ended");
    } finally {
      clearTimeout(silence);
    }
  }

  async function open() {
    close();
    if (isHidden) return;
    const controller = new AbortController();
    connection = controller;
    tell({ state: "connecting" });
    try {
      await listen(controller);
    } catch (error) {
      isQuiet = true;
      if (connection !== controller) return; // closed on purpose
      connection = null;
      const problem = isAbort(error) ? controller.signal.reason : error;
      if (!(problem instanceof ApiError)) throw problem;
      if (problem.status === 404) {
        isFile = true;
        moment(null);
      } else {
        lose(problem);
      }
    }
  }

  const windowPath = (endMs) => `/v1/jilju/window?seconds=60${endMs === null ? "" : `&end_ms=${endMs}`}`;

  /** The ring forgets while a page stands still: a moment that is not there any more becomes the nearest one that is. */
  async function fetchWindow(endMs) {
    try {
      return await api.json(windowPath(endMs));
    } catch (error) {
      if (error.status !== 400 || endMs === null) throw error;
      const newest = await api.json(windowPath(null));
      return endMs >= newest.end_ms ? newest : api.json(windowPath(newest.first_ms + FORGOTTEN_MS));
    }
  }

  async function fetchMoments() {
    if (isFetching) return;
    isFetching = true;
    while (wanted !== undefined) {
      const endMs = wanted;
      wanted = undefined;
      try {
        const frame = await fetchWindow(endMs);
        if (isLive) break;
        tell({ state: isFile ? "file" : "past" });
        take(frame, wanted === undefined ? "moment" : "passing");
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        if (!isLive) tell({ state: "lost", error, retryMs: null });
      }
    }
    isFetching = false;
  }

  /** Shows the moment `endMs`; null: the end of what there is. */
  function moment(endMs) {
    isLive = false;
    wanted = endMs;
    asked = endMs;
    close();
    fetchMoments();
  }

  function live() {
    isLive = true;
    wanted = undefined;
    retryMs = FIRST_RETRY_MS;
    open();
  }

  return {
    live,
    moment,
    retry: () => (isLive ? live() : moment(asked)),
    hide() {
      isHidden = true;
      if (isLive) close();
    },
    show() {
      isHidden = false;
      if (isLive && connection === null) open();
    },
  };
}
