// Chat: the open conversation and the one answer that may be in the making.
//
// Owns the messages in the store, from the moment a text is sent to the moment its answer is complete, stopped or failed.
// Knows nothing of the DOM. An answer's phase chases the truth as far as the page can see it: waiting (nothing heard yet),
// reading (/health says that no request waits, so ours is being read), writing (tokens arrive), done.

import { ApiError } from "../api.js";
import { messagesOf, requestBody } from "./settings.js";
import { addedTokens, tokenBytes } from "./tokens.js";

const LOAD_EVERY_MS = 500; // most first tokens come before the first look, so most answers cost no extra request

/** `now()` in milliseconds; `newId()` a fresh string. */
export function createChat({ store, api, now, newId }) {
  let active = null; // {id, controller} of the answer in the making

  const find = (id) => store.get().messages.find((message) => message.id === id);

  function patch(id, changes) {
    const messages = store.get().messages.map((message) => (message.id === id ? { ...message, ...changes } : message));
    store.update({ messages });
  }

  const before = (id) => {
    const { messages } = store.get();
    return messages.slice(0, messages.findIndex((message) => message.id === id));
  };

  function turnsOf(messages) {
    return messages
      .filter((message) => message.text !== "") // an answer that failed before its first token was never said
      .map(({ role, text }) => ({ role, content: text }));
  }

  function take(id, chunk) {
    const message = find(id);
    if (!message) return; // another conversation was opened while this chunk was on its way
    const changes = { runId: chunk.id };
    if (chunk.usage) changes.usage = chunk.usage;
    if (chunk.timings) changes.timings = chunk.timings;
    const choice = chunk.choices?.[0];
    if (choice) {
      changes.phase = "writing";
      changes.firstAt = message.firstAt ?? now();
      changes.tokenIds = [...message.tokenIds, ...(choice.token_ids ?? [])];
      changes.numTokens = changes.tokenIds.length;
      if (choice.delta.content) changes.text = message.text + choice.delta.content;
      if (choice.delta.reasoning) changes.thoughts = message.thoughts + choice.delta.reasoning;
      if (choice.finish_reason) changes.finishReason = choice.finish_reason;
    }
    patch(id, changes);
  }

  function finish(id, changes) {
    if (active?.id !== id) return; // another conversation was opened meanwhile
    active = null;
    const { sentAt, firstAt, numTokens } = find(id);
    const measured = { numTokens, ttftMs: firstAt === null ? null : firstAt - sentAt, totalMs: now() - sentAt };
    store.update({ activeId: null });
    patch(id, { ...changes, phase: "done", measured });
  }

  // How much is to be read is worth a call only once there is a wait to fill.
  async function countPrompt(id, { model, messages }) {
    try {
      const { count } = await api.render({ model, messages }, { quiet: true });
      if (find(id)?.phase !== "done") patch(id, { numPrompt: count });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error; // a key that may not ask, say: the number stays unknown
    }
  }

  async function watchLoad(id, body) {
    for (let looks = 0; ; looks++) {
      await new Promise((resolve) => setTimeout(resolve, LOAD_EVERY_MS));
      if (find(id)?.phase !== "waiting") return;
      if (looks === 0) await countPrompt(id, body);
      const load = await api.load();
      if (find(id)?.phase === "waiting" && load?.waiting === 0 && load.running > 0) patch(id, { phase: "reading" });
    }
  }

  async function answer(id) {
    const controller = new AbortController();
    const { model, settings } = store.get();
    active = { id, controller };
    store.update({ activeId: id });
    const body = requestBody({ model: model?.id, settings, turns: turnsOf(before(id)) });
    watchLoad(id, body);
    try {
      for await (const chunk of api.chat(body, controller.signal)) take(id, chunk);
      finish(id, { outcome: "completed" });
    } catch (error) {
      if (controller.signal.aborted) finish(id, { outcome: "stopped" });
      else {
        const { code = "page_fault", message, status, param, retryAfterMs, requestId } = error;
        finish(id, { outcome: "failed", error: { code, message, status, param, retryAfterMs, requestId } });
        if (!(error instanceof ApiError)) throw error; // our own mistake also belongs in the console
      }
    }
  }

  function newAnswer() {
    return {
      id: newId(),
      role: "assistant",
      text: "",
      thoughts: "",
      phase: "waiting",
      outcome: null, // completed | stopped | failed
      finishReason: null,
      error: null,
      runId: null, // the answer's id on the server
      usage: null,
      timings: null,
      measured: null, // what the page saw itself, for answers that end without usage
      tokenIds: [],
      numTokens: 0,
      numPrompt: null, // known only where one has to wait for the first token
      sentAt: now(),
      firstAt: null,
    };
  }

  function ask(messages, text) {
    const reply = newAnswer();
    const { system = null } = store.get().settings;
    store.update({ messages: [...messages, { id: newId(), role: "user", text: text.trim(), system }, reply] });
    answer(reply.id);
  }

  async function withTexts(tokens) {
    if (tokens.length === 0) return [];
    const { token_strs: texts, special_ids: special } = await api.tokenTexts(tokens.map(({ id }) => id));
    return tokens.map((token, index) => ({ ...token, bytes: tokenBytes(texts[index]), isSpecial: special.includes(token.id) }));
  }

  return {
    /** Sends a text; false if it is blank or an answer is still in the making. */
    send(text) {
      if (active || text.trim() === "") return false;
      ask(store.get().messages, text);
      return true;
    },
    /** Sends a text in the place of an earlier one; what came after that is gone. */
    edit(id, text) {
      if (active || text.trim() === "" || !find(id)) return false;
      ask(before(id), text);
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
    /** Ends the answer in the making at once, as another conversation is about to take its place. */
    end() {
      const ended = active;
      if (ended) finish(ended.id, { outcome: "stopped" }); // first, so that what the abort still brings finds nothing to finish
      ended?.controller.abort();
    },
    /** The tokens of a message: [{id, bytes, isSpecial, isTemplate}]; of a question with what the template puts around it. */
    async tokens(id) {
      const { text, role, system, tokenIds } = find(id);
      if (role === "assistant") {
        const ids = tokenIds?.length > 0 ? tokenIds : await api.tokenize(text);
        return withTexts(ids.map((tokenId) => ({ id: tokenId })));
      }
      const turns = [...turnsOf(before(id)), { role, content: text }];
      const body = { model: store.get().model?.id, messages: messagesOf(system, turns), return_token_offsets: true };
      return withTexts(addedTokens(await api.render(body)));
    },
    /** Reads the model's name, limits and defaults; a failure becomes the notice above the composer. */
    async loadModel() {
      try {
        store.update({ model: await api.model(), notice: null });
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        store.update({ notice: error });
      }
    },
  };
}
