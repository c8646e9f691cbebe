// Server-sent events: bytes in, the data of each event out.
//
// Owns line ends, comments, events cut anywhere by the network, and the bound on one event. Knows nothing of JSON or chat.

const MAX_EVENT_CHARS = 1 << 20; // a chunk is a few hundred characters; whatever grows past 1 Mi is not our server

export class EventTooLong extends Error {}

/** Collects the lines of a `text/event-stream`; `push` returns the data of every event completed by this text. */
export class SseParser {
  #rest = ""; // the unfinished line
  #data = []; // data lines of the unfinished event

  push(text) {
    this.#rest += text;
    const events = [];
    // A "\r" at the very end may be the first half of "\r\n": it waits for the next text.
    const lines = this.#rest.split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length > 0) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      } // comments (": wait") and the fields event, id, retry carry nothing here
    }
    const numChars = this.#data.reduce((sum, line) => sum + line.length, this.#rest.length);
    if (numChars > MAX_EVENT_CHARS) throw new EventTooLong(`an event of more than ${MAX_EVENT_CHARS} characters`);
    return events;
  }
}

/** The data of each event of a response body, in order. */
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  const parser = new SseParser();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    await reader.cancel(); // a reader that leaves early closes the connection, so the server stops working for it
  }
}
