// Server-sent events: bytes in, the data of each event out.
//
// Owns line ends, comments, events cut anywhere by the network, and the bound on one event. Knows nothing of JSON or chat.

const MAX_EVENT_CHARS = 1 << 20; // a chunk is a few hundred characters; a reader of bigger events says so

export class EventTooLong extends Error {}

/** Collects the lines of a `text/event-stream`; `push` returns the data of every event completed by this text. */
export class SseParser {
  #maxChars;
  #rest = ""; // the unfinished line
  #data = []; // data lines of the unfinished event

  constructor(maxChars = MAX_EVENT_CHARS) {
    this.#maxChars = maxChars;
  }

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
    if (numChars > this.#maxChars) throw new EventTooLong(`an event of more than ${this.#maxChars} characters`);
    return events;
  }
}

/** The data of each event of a response body, in order; one of more than `maxChars` is not our server's. */
export async function* readEvents(body, maxChars) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  const parser = new SseParser(maxChars);
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
