// Conversations: kept in this browser and nowhere else, one entry of localStorage each.
//
// Owns the entries, their titles and the bound on all of them together. An answer in the making is kept as what has arrived of
// it. Which conversation is open is the tab's own matter. Knows nothing of the page.

const PREFIX = "jilju.chat.";
const OPEN = "jilju.open";
const VERSION = 2;
const MAX_CHARS = 4_000_000; // of all entries: browsers give about five million
const MAX_TITLE_CHARS = 80;
const FORMER = "jilju.conversation"; // of a tab's only conversation, version 1

export class NoRoom extends Error {}

function parsed(raw) {
  try {
    const entry = JSON.parse(raw ?? "null");
    return entry?.version === VERSION && Array.isArray(entry.messages) ? entry : null;
  } catch (error) {
    if (error instanceof SyntaxError) return null; // cut short, or not ours
    throw error;
  }
}

function titleOf(messages) {
  const said = messages.find(({ role }) => role === "user")?.text ?? "";
  return said.trim().replace(/\s+/g, " ").slice(0, MAX_TITLE_CHARS);
}

function settled(message) {
  if (message.role !== "assistant" || message.phase === "done") return message;
  return { ...message, phase: "done", outcome: "stopped", measured: { numTokens: message.numTokens } };
}

/** `storage` outlives the tab, `session` does not; `now()` in milliseconds since 1970. */
export function createConversations({ storage = localStorage, session = sessionStorage, now, newId }) {
  const keys = () => Object.keys(storage).filter((key) => key.startsWith(PREFIX));

  function write(key, raw) {
    const numChars = keys().reduce((sum, other) => sum + (other === key ? 0 : storage.getItem(other).length), raw.length);
    if (numChars > MAX_CHARS) throw new NoRoom(`more than ${MAX_CHARS} characters`);
    try {
      storage.setItem(key, raw);
    } catch (error) {
      if (error instanceof DOMException && error.name === "QuotaExceededError") throw new NoRoom(error.message);
      throw error;
    }
  }

  return {
    /** [{id, title, changedAt}], the last changed first. */
    list() {
      return keys()
        .map((key) => ({ id: key.slice(PREFIX.length), entry: parsed(storage.getItem(key)) }))
        .filter(({ entry }) => entry !== null)
        .map(({ id, entry }) => ({ id, title: entry.title, changedAt: entry.changedAt }))
        .sort((a, b) => b.changedAt - a.changedAt);
    },
    /** Its messages, or null if there is none. */
    load: (id) => parsed(storage.getItem(PREFIX + id))?.messages ?? null,
    /** Throws NoRoom; what was kept before stays then. */
    keep(id, messages) {
      const raw = { version: VERSION, title: titleOf(messages), changedAt: now(), messages: messages.map(settled) };
      write(PREFIX + id, JSON.stringify(raw));
    },
    /** What brings it back: a function without arguments. */
    remove(id) {
      const raw = storage.getItem(PREFIX + id);
      storage.removeItem(PREFIX + id);
      return () => write(PREFIX + id, raw);
    },
    isOurs: (key) => key === null || key.startsWith(PREFIX), // null: all was cleared
    /** The id of the conversation that this tab has open: a reload finds it again, a new tab begins anew. */
    opened: () => session.getItem(OPEN),
    open: (id) => session.setItem(OPEN, id),
    /** What this tab's page kept before there were several conversations becomes one of them. */
    adopt() {
      const raw = session.getItem(FORMER);
      session.removeItem(FORMER);
      let former = null;
      try {
        former = JSON.parse(raw ?? "null");
      } catch (error) {
        if (!(error instanceof SyntaxError)) throw error;
      }
      if (former?.version !== 1 || !Array.isArray(former.messages) || former.messages.length === 0) return;
      const id = newId();
      this.keep(id, former.messages);
      this.open(id);
    },
  };
}
