// The calls of the chat page: the model, the load, tokens, the chat stream.
//
// Owns what is read of each answer, and the rule that a stream without finish_reason and [DONE] is incomplete. Knows nothing
// of the page; how a call is made and fails is in api.js.

import { ApiError } from "../api.js";

/** `api`: createApi's. */
export function createChatApi(api) {
  return {
    /** The first model served: its id, its context length and the sampling defaults in force. */
    async model() {
      const answer = await api.json("/v1/models");
      const model = answer.data?.[0];
      if (!model) throw new ApiError("not_an_answer", "GET /v1/models names no model");
      return { id: model.id, maxModelLen: model.max_model_len ?? null, defaults: model.jilju?.defaults ?? {} };
    },

    /** How many requests wait and run, or null when the server does not say. */
    async load() {
      try {
        const { running, waiting } = await api.json("/health", { quiet: true });
        return { running, waiting };
      } catch (error) {
        if (error instanceof ApiError) return null;
        throw error;
      }
    },

    /** What a conversation becomes: {prompt_text, token_ids, token_offsets, count, messages}. Nothing is run. */
    render: (body, options) => api.json("/v1/chat/completions/render", { method: "POST", body, ...options }),

    /** The ids of a text by itself. */
    tokenize: async (prompt) =>
      (await api.json("/tokenize", { method: "POST", body: { prompt, add_special_tokens: false } })).tokens,

    /** {token_strs, special_ids}: what each of the tokens is. */
    tokenTexts: (tokens) => api.json("/detokenize", { method: "POST", body: { tokens, return_token_strs: true } }),

    /** The chunks of one streamed answer; ends after [DONE], throws on everything else. */
    async *chat(body, signal) {
      let finished = false;
      let requestId = null;
      for await (const event of api.events("/v1/chat/completions", { method: "POST", body, signal })) {
        requestId = event.requestId;
        if (event.data === "[DONE]") {
          if (!finished) break;
          return;
        }
        const chunk = read(event);
        finished ||= chunk.choices?.[0]?.finish_reason != null;
        yield chunk;
      }
      throw new ApiError("incomplete_stream", "the stream ended without finish_reason and [DONE]", { requestId });
    },
  };
}

function read({ data, requestId }) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch (error) {
    if (error instanceof SyntaxError) throw new ApiError("not_an_answer", error.message, { requestId });
    throw error;
  }
  const { error } = chunk;
  if (error) throw new ApiError(error.code, error.message, { param: error.param, requestId });
  return chunk;
}
