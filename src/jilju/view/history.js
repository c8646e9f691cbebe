// History: the conversation outlives a reload of its tab, and nothing else.
//
// Owns one entry of sessionStorage. An answer in the making is kept as what has arrived of it. Knows nothing of the page.

const STORAGE_KEY = "jilju.conversation";
const VERSION = 1;

export function loadMessages(storage = sessionStorage) {
  let kept = null;
  try {
    kept = JSON.parse(storage.getItem(STORAGE_KEY) ?? "null");
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error; // cut short: an empty conversation
  }
  return kept?.version === VERSION ? kept.messages : [];
}

/** False when the browser has no room for it. */
export function keepMessages(messages, storage = sessionStorage) {
  const settled = messages.map((message) =>
    message.role === "assistant" && message.phase !== "done" ? { ...message, phase: "done", outcome: "stopped", measured: { numTokens: 0 } } : message,
  );
  try {
    storage.setItem(STORAGE_KEY, JSON.stringify({ version: VERSION, messages: settled }));
    return true;
  } catch (error) {
    if (error instanceof DOMException && error.name === "QuotaExceededError") return false;
    throw error;
  }
}
