// Chat: a conversation and the one answer that may be in the making.
//
// Owns the messages in the store, from the moment a text is sent to the moment its answer is complete, stopped or failed.
// Knows nothing of the DOM. An answer's phase chases the truth as far as the page can see it: waiting (nothing heard yet),
// reading (/health says that no request waits, so ours is being read), writing (tokens arrive), done.

import { ApiError } from "./api.js";
import { requestBody } from "./settings.js";

const LOAD_EVERY_MS = 500; // most first tokens come before the first look, so most answers cost no extra request

/** `now()` in milliseconds; `newId()` a fresh string. */
export function createChat({ store, api, now, newId }) {
  let active = null; // {id, controller} of the answer in the making

  const find = (id) => store.get().messages.find((message) => message.id === id);

  function patch(id, changes) {
    const messages = store.get().messages.map((message) => (message.id === id ? { ...message, ...changes } : message));
    store.update({ messages });
  }

  function turnsBefore(id) {
    const { messages } = store.get();
    return messages
      .slice(0, messages.findIndex((message) => message.id === id))
      .filter((message) => message.text !== "") // an answer that failed before its first token was never said
      .map(({ role, text }) => ({ role, content: text }));
  }

  function take(id, chunk) {
    const message = find(id);
    if (!message) return; // cleared while this chunk was on its way
    const changes = {};
    if (chunk.usage) changes.usage = chunk.usage;
    if (chunk.timings) changes.timings = chunk.timings;
    const choice = chunk.choices?.[0];
    if (choice) {
      changes.phase = "writing";
      changes.firstAt = message.firstAt ?? now();
      if (choice.delta.role === undefined) changes.numTokens = message.numTokens + 1; // one chunk a token, besides the role's
      if (choice.delta.content) changes.text = message.text + choice.delta.content;
      if (choice.finish_reason) changes.finishReason = choice.finish_reason;
    }
    patch(id, changes);
  }

  function finish(id, changes) {
    if (active?.id !== id) return; // the conversation was cleared meanwhile
    active = null;
    const { sentAt, firstAt, numTokens } = find(id);
    const measured = { numTokens, ttftMs: firstAt === null ? null : firstAt - sentAt, totalMs: now() - sentAt };
    store.update({ activeId: null });
    patch(id, { ...changes, phase: "done", measured });
  }

  async function watchLoad(id) {
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, LOAD_EVERY_MS));
      if (find(id)?.phase !== "waiting") return;
      const load = await api.load();
      if (find(id)?.phase === "waiting" && load?.waiting === 0 && load.running > 0) patch(id, { phase: "reading" });
    }
  }

  async function answer(id) {
    const controller = new AbortController();
    const { model, settings } = store.get();
    active = { id, controller };
    store.update({ activeId: id });
    watchLoad(id);
    try {
      const body = requestBody({ model: model?.id, settings, turns: turnsBefore(id) });
      for await (const chunk of api.chat(body, controller.signal)) take(id, chunk);
      finish(id, { outcome: "completed" });
    } catch (error) {
      if (controller.signal.aborted) finish(id, { outcome: "stopped" });
      else {
        const { code = "page_fault", message, status, param, retryAfterMs, requestId } = error;
        finish(id, { outcome: "failed", error: { code, message, status, param, retryAfterMs, requestId } });
        if (code === "invalid_api_key") store.update({ keyWanted: true });
        if (!(error instanceof ApiError)) throw error; // our own mistake also belongs in the console
      }
    }
  }

  function newAnswer() {
    return {
      id: newId(),
      role: "assistant",
      text: "",
      phase: "waiting",
      outcome: null, // completed | stopped | failed
      finishReason: null,
      error: null,
      usage: null,
      timings: null,
      measured: null, // what the page saw itself, for answers that end without usage
      numTokens: 0,
      sentAt: now(),
      firstAt: null,
    };
  }

  return {
    /** Sends a text; false if it is blank or an answer is still in the making. */
    send(text) {
      if (active || text.trim() === "") return false;
      const reply = newAnswer();
      const messages = [...store.get().messages, { id: newId(), role: "user", text: text.trim() }, reply];
      store.update({ messages });
      answer(reply.id);
      return true;
    },
    /** Ends the answer in the making; what has arrived stays. */
    stop() {
      active?.controller.abort();
    },
    /** Asks once more for the last answer. */
    retry() {
      const { messages } = store.get();
      if (active || messages.at(-1)?.role !== "assistant") return;
      const reply = newAnswer();
      store.update({ messages: [...messages.slice(0, -1), reply] });
      answer(reply.id);
    },
    reset() {
      const ended = active;
      active = null; // first, so that what the abort still brings finds no answer to finish
      ended?.controller.abort();
      store.update({ messages: [], activeId: null });
    },
    /** Reads the model's name, limits and defaults; a failure becomes the notice above the composer. */
    async loadModel() {
      try {
        store.update({ model: await api.model(), notice: null, keyWanted: false });
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        if (error.code === "invalid_api_key") store.update({ keyWanted: true });
        else store.update({ notice: error });
      }
    },
  };
}
