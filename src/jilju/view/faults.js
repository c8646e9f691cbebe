// Faults: which words say what went wrong and what to do, for each error code.
//
// Owns the table. Knows nothing of the page; the words themselves are in the strings files.

const BY_CODE = {
  network: "network",
  connection_lost: "broken_off",
  incomplete_stream: "broken_off",
  invalid_api_key: "key",
  forbidden: "forbidden",
  overloaded: "busy",
  rate_limit_exceeded: "busy",
  not_ready: "not_ready",
  engine_unavailable: "engine_gone",
  context_length_exceeded: "too_long",
  kv_capacity_exceeded: "too_long",
  deadline_exceeded: "too_slow",
  model_not_found: "model_gone",
};

/** {title, advice}: keys of strings, and the params they take. */
export function explain(error) {
  const seconds = Math.max(1, Math.ceil((error.retryAfterMs ?? 1000) / 1000));
  const refused = error.status >= 400 && error.status < 500;
  const name = BY_CODE[error.code] ?? (refused ? "refused" : "internal");
  return {
    title: `fault_${name}`,
    advice: `fault_${name}_advice`,
    params: { seconds, host: location.host, requestId: error.requestId ?? "–" },
  };
}
