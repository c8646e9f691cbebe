// The API as the pages use it: JSON and event streams, and one kind of error for all that can go wrong.
//
// Owns the key header, the reading of refusals and what a call does when the server asks for a key. Knows nothing of any
// page. Aborting is not an error here: an AbortError goes up as it is.

import { EventTooLong, readEvents } from "./sse.js";

/** `code` is the server's, or one of ours: network, connection_lost, incomplete_stream, not_an_answer. */
export class ApiError extends Error {
  constructor(code, message, { status = null, param = null, retryAfterMs = null, requestId = null } = {}) {
    super(message);
    Object.assign(this, { code, status, param, retryAfterMs, requestId });
  }
}

export function isAbort(error) {
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

/**
 * `key()` gives the key to send, or null. `wantKey()` asks a person for one and resolves to whether there is one now; a call
 * that the server refuses for its key is then made again. A call with `quiet: true` asks nobody.
 */
export function createApi({ key, wantKey }) {
  async function send(path, { method = "GET", body, signal }) {
    const headers = {};
    if (body !== undefined) headers["content-type"] = "application/json";
    if (key()) headers.authorization = `Bearer ${key()}`;
    try {
      return await fetch(path, { method, headers, signal, cache: "no-store", body: body && JSON.stringify(body) });
    } catch (error) {
      if (isAbort(error)) throw error;
      throw new ApiError("network", String(error.message ?? error));
    }
  }

  /** The response of a call that went well. */
  async function call(path, { quiet = false, ...options } = {}) {
    let response = await send(path, options);
    while (response.status === 401 && !quiet && (await wantKey())) response = await send(path, options);
    if (!response.ok) throw await refusal(response);
    return response;
  }

  return {
    call,

    async json(path, options) {
      const response = await call(path, options);
      try {
        return await response.json();
      } catch (error) {
        if (error instanceof SyntaxError) throw new ApiError("not_an_answer", `${path}: ${error.message}`);
        throw isAbort(error) ? error : new ApiError("connection_lost", error.message);
      }
    },

    /** {data, requestId} of each event of a stream. It ends where the connection does; what a whole stream is, its reader knows. */
    async *events(path, { maxChars, ...options } = {}) {
      const response = await call(path, options);
      const requestId = response.headers.get("x-request-id");
      try {
        for await (const data of readEvents(response.body, maxChars)) yield { data, requestId };
      } catch (error) {
        if (error instanceof EventTooLong) throw new ApiError("not_an_answer", error.message, { requestId });
        if (error instanceof TypeError) throw new ApiError("connection_lost", error.message, { requestId });
        throw error;
      }
    },
  };
}
