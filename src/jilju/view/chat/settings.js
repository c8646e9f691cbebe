// Settings: what a person may set for every request, how it is checked, and where it is kept.
//
// Owns the fields, their ranges and localStorage. A field that is not set is not sent, so the server's default holds.
// Knows nothing of the page.

const STORAGE_KEY = "jilju.settings";
const INTEGER = /^[+-]?\d+$/;
const DECIMAL = /^[+-]?(\d+\.?\d*|\.\d+)$/;
const MAX_SYSTEM_CHARS = 100_000; // far below the body limit of 8 MiB, far above what fits a context

// `read` gives {value} or {problem: key of a string, params}; `limits` is {maxModelLen}.
function number(pattern, wrong, min, maxOf) {
  return (text, limits) => {
    const max = maxOf(limits);
    const value = Number(text);
    if (!pattern.test(text)) return { problem: wrong, params: { given: text } };
    if (value < min || (max !== null && value > max)) {
      return max === null
        ? { problem: "problem_below", params: { given: text, min } }
        : { problem: "problem_range", params: { given: text, min, max } };
    }
    return { value };
  };
}

/** name: key here and in storage. wire: field of the request (null: it becomes the system message). */
export const FIELDS = [
  {
    name: "temperature",
    wire: "temperature",
    kind: "decimal",
    read: number(DECIMAL, "problem_number", 0, () => 2),
  },
  {
    name: "seed",
    wire: "seed",
    kind: "integer",
    // int64 on the server; a JavaScript number is exact to 2^53 - 1 only
    read: number(INTEGER, "problem_integer", Number.MIN_SAFE_INTEGER, () => Number.MAX_SAFE_INTEGER),
  },
  {
    name: "maxTokens",
    wire: "max_tokens",
    kind: "integer",
    read: number(INTEGER, "problem_integer", 1, (limits) => limits.maxModelLen),
  },
  {
    name: "system",
    wire: null,
    kind: "text",
    read: (text) =>
      text.length > MAX_SYSTEM_CHARS
        ? { problem: "problem_long", params: { given: text.length, max: MAX_SYSTEM_CHARS } }
        : { value: text },
  },
];

/** Texts of the form to {values, problems}: an empty text is an unset field. */
export function readSettings(texts, limits) {
  const values = {};
  const problems = {};
  for (const field of FIELDS) {
    const text = (texts[field.name] ?? "").trim();
    if (text === "") continue;
    const { value, problem, params } = field.read(text, limits);
    if (problem) problems[field.name] = { problem, params };
    else values[field.name] = value;
  }
  return { values, problems };
}

/** What is kept, checked as if it were typed: storage may hold anything. */
export function loadSettings(storage = localStorage) {
  let kept = null;
  try {
    kept = JSON.parse(storage.getItem(STORAGE_KEY) ?? "{}");
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error; // not ours, or cut short: the defaults hold
  }
  const texts = {};
  for (const [name, value] of Object.entries(kept ?? {})) texts[name] = String(value);
  return readSettings(texts, { maxModelLen: null }).values;
}

export function keepSettings(values, storage = localStorage) {
  storage.setItem(STORAGE_KEY, JSON.stringify(values));
}

/** A conversation as the API takes it: turns [{role, content}], under the system prompt if there is one. */
export function messagesOf(system, turns) {
  return system ? [{ role: "system", content: system }, ...turns] : turns;
}

/** The request of a conversation under the settings. */
export function requestBody({ model, settings, turns }) {
  const body = {
    messages: messagesOf(settings.system, turns),
    stream: true,
    stream_options: { include_usage: true },
    timings: true,
    return_token_ids: true,
  };
  if (model) body.model = model;
  for (const { name, wire } of FIELDS) {
    if (wire && settings[name] !== undefined) body[wire] = settings[name];
  }
  return body;
}
