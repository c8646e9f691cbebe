// Tokens: from ids and their bytes to groups that are whole characters.
//
// Owns the joining: where several tokens make one character, they stand together under it. Knows nothing of the page.

const BYTES = /^bytes:((?:\\x[0-9a-f]{2})+)$/; // how the server writes a token that is no whole characters

/** The bytes of a token from its text as the server writes it. */
export function tokenBytes(text) {
  const found = BYTES.exec(text);
  if (!found) return new TextEncoder().encode(text);
  return Uint8Array.from(found[1].split("\\x").slice(1), (hex) => Number.parseInt(hex, 16));
}

export const hexOf = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(" ");

/**
 * Tokens [{id, bytes, ...}] to groups [{text, tokens}] in order: the fewest tokens that are whole characters together. `text` is
 * null for bytes that are none.
 */
export function joined(tokens) {
  const groups = [];
  let tokensOfGroup = [];
  let bytes = [];
  for (const token of tokens) {
    tokensOfGroup.push(token);
    bytes.push(...token.bytes);
    const text = decoded(bytes);
    if (text === undefined) continue;
    groups.push({ text, tokens: tokensOfGroup });
    tokensOfGroup = [];
    bytes = [];
  }
  if (tokensOfGroup.length > 0) groups.push({ text: null, tokens: tokensOfGroup });
  return groups;
}

// The text, null if it can never become one, undefined while its last character is not whole.
function decoded(bytes) {
  const data = Uint8Array.from(bytes);
  try {
    const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
    const text = decoder.decode(data, { stream: true });
    return new TextEncoder().encode(text).length === data.length ? text : undefined;
  } catch (error) {
    if (error instanceof TypeError) return null;
    throw error;
  }
}

/**
 * The tokens that a user's message adds to the prompt, with what the template wrote around it: from the end of the answer
 * before to the end of the prompt. `rendered` is the answer of the render route; `isTemplate` says whose a token is.
 */
export function addedTokens({ token_ids: ids, token_offsets: offsets, messages }) {
  const answers = messages.filter(({ role, content_span: span }) => role === "assistant" && span);
  const start = answers.at(-1)?.content_span[1] ?? 0;
  const spans = messages.map(({ content_span: span }) => span).filter(Boolean);
  return ids
    .map((id, index) => ({ id, begin: offsets[index][0], end: offsets[index][1] }))
    .filter(({ begin }) => begin >= start)
    .map(({ id, begin, end }) => ({ id, isTemplate: !spans.some(([from, to]) => begin < to && from < end) }));
}
