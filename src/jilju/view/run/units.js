// Units: figures of a run beyond those of all pages (numbers.js): sums, bytes of tokens, texts of tokens.
//
// Owns rounding. Parts of a sum are rounded together, so that what is printed sums up too.

export function createUnits(words) {
  const formats = new Map();
  function fixed(value, digits) {
    if (!formats.has(digits)) {
      const options = { minimumFractionDigits: digits, maximumFractionDigits: digits };
      formats.set(digits, new Intl.NumberFormat(words.language, options));
    }
    return formats.get(digits).format(value);
  }

  /** [texts of the parts, text of the total]: largest remainders are rounded up until the parts make the total. */
  function sum(partsMs, totalMs) {
    const [divisor, unit] = totalMs >= 10_000 ? [1000, words.seconds("").trim()] : [1, "ms"];
    const shown = totalMs / divisor;
    const digits = divisor === 1 ? (shown < 10 ? 3 : shown < 100 ? 2 : 1) : shown < 1000 ? 3 : 1;
    const scale = 10 ** digits;
    const wanted = partsMs.map((ms) => (ms / divisor) * scale);
    const whole = wanted.map(Math.floor);
    const total = Math.round((totalMs / divisor) * scale);
    const order = [...wanted.keys()].sort((a, b) => wanted[b] - whole[b] - (wanted[a] - whole[a]));
    const missing = total - whole.reduce((a, b) => a + b, 0);
    for (const index of order.slice(0, Math.max(0, missing))) whole[index] += 1;
    const text = (value) => `${fixed(value / scale, digits)} ${unit}`;
    return [whole.map(text), text(total)];
  }

  return {
    sum,
    fixed,
    /** "ec 84 9c" */
    hex: (bytes) => bytes.replace(/(..)(?=.)/g, "$1 "),
  };
}

/** The text of a token's bytes; null if they are none, or only a part of a character. */
export function textOfBytes(hex) {
  const bytes = Uint8Array.from(hex.match(/../g) ?? [], (pair) => Number.parseInt(pair, 16));
  try {
    return bytes.length > 0 ? new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes) : null;
  } catch (error) {
    if (error instanceof TypeError) return null; // that is how a fatal decoder says it
    throw error;
  }
}

/** A token's text so that blanks are seen: a space is a middle dot, a line's end an arrow. null: it has no text of its own. */
export function visible(text) {
  if (text === "") return null;
  return text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "→").replace(/\r/g, "␍");
}
