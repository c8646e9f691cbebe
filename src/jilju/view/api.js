// The API as this page uses it: models, health and the chat stream, and one kind of error for all that can go wrong.
//
// Owns the key header, the reading of refusals and the rule that a stream without finish_reason and [DONE] is incomplete.
// Knows nothing of the page. Aborting is not an error here: an AbortError goes up as it is.

import { EventTooLong, readEvents } from "./sse.js";

/** `code` is the server's, or one of ours: network, connection_lost, incomplete_stream, not_an_answer. */
export class ApiError extends Error {
  constructor(code, message, { status = null, param = null, retryAfterMs = null, requestId = null } = {}) {
    super(message);
    Object.assign(this, { code, status, param, retryAfterMs, requestId });
  }
}

function isAbort(error) {
  return error instanceof DOMException && error.name === "AbortError";
}

function retryAfterMs(headers) {
  const exact = Number.parseFloat(headers.get("retry-after-ms") ?? "");
  if (Number.isFinite(exact)) return exact;
  const seconds = Number.parseFloat(headers.get("retry-after") ?? "");
  return Number.isFinite(seconds) ? seconds * 1000 : null;
}

async function refusal(response) {
  const details = {
    status: response.status,
    retryAfterMs: retryAfterMs(response.headers),
    requestId: response.headers.get("x-request-id"),
  };
  const text = await response.text();
  let error = null;
  try {
    error = JSON.parse(text).error;
  } catch (problem) {
    if (!(problem instanceof SyntaxError)) throw problem; // a proxy's page, say: the status has to do
  }
  const code = error?.code ?? (response.status === 401 ? "invalid_api_key" : `http_${response.status}`);
  return new ApiError(code, error?.message ?? `${response.status} ${response.statusText}`, {
    ...details,
    param: error?.param ?? null,
  });
}

/** `key()` gives the key to send, or null. */
export function createApi({ key }) {
  async function call(path, { method = "GET", body, signal } = {}) {
    const headers = {};
    if (body !== undefined) headers["content-type"] = "application/json";
    if (key()) headers.authorization = `Bearer ${key()}`;
    let response;
    try {
      response = await fetch(path, { method, headers, signal, cache: "no-store", body: body && JSON.stringify(body) });
    } catch (error) {
      if (isAbort(error)) throw error;
      throw new ApiError("network", String(error.message ?? error));
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }

  return {
    /** The first model served: its id, its context length and the sampling defaults in force. */
    async model() {
      const answer = await (await call("/v1/models")).json();
      const model = answer.data?.[0];
      if (!model) throw new ApiError("not_an_answer", "GET /v1/models names no model");
      return { id: model.id, maxModelLen: model.max_model_len ?? null, defaults: model.jilju?.defaults ?? {} };
    },

    /** How many requests wait and run, or null when the server does not say. */
    async load(signal) {
      try {
        const { running, waiting } = await (await call("/health", { signal })).json();
        return { running, waiting };
      } catch (error) {
        if (isAbort(error) || error instanceof ApiError) return null;
        throw error;
      }
    },

    /** The chunks of one streamed answer; ends after [DONE], throws on everything else. */
    async *chat(body, signal) {
      const response = await call("/v1/chat/completions", { method: "POST", body, signal });
      const requestId = response.headers.get("x-request-id");
      let finished = false;
      try {
        for await (const data of readEvents(response.body)) {
          if (data === "[DONE]") {
            if (!finished) break;
            return;
          }
          const chunk = JSON.parse(data);
          if (chunk.error) {
            throw new ApiError(chunk.error.code, chunk.error.message, { param: chunk.error.param, requestId });
          }
          finished ||= chunk.choices?.[0]?.finish_reason != null;
          yield chunk;
        }
      } catch (error) {
        if (isAbort(error) || error instanceof ApiError) throw error;
        if (error instanceof SyntaxError || error instanceof EventTooLong) {
          throw new ApiError("not_an_answer", error.message, { requestId });
        }
        if (error instanceof TypeError) throw new ApiError("connection_lost", error.message, { requestId });
        throw error;
      }
      throw new ApiError("incomplete_stream", "the stream ended without finish_reason and [DONE]", { requestId });
    },
  };
}
