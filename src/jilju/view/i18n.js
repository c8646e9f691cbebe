// Words: the pages' strings in the browser's language, and numbers as that language writes them.
//
// Owns the choice of language and the filling of {holes}. A missing string is our bug and throws. The strings are in
// strings.<language>.js, one file each with the same keys: those of all pages beside this file, a page's own in its folder.

const LANGUAGES = ["en", "ko"];
const BYTE_UNITS = ["B", "kB", "MB", "GB", "TB"];

/** The first of the preferred languages that we have; English otherwise. */
export function chooseLanguage(preferred) {
  for (const tag of preferred) {
    const language = tag.toLowerCase().split("-")[0];
    if (LANGUAGES.includes(language)) return language;
  }
  return "en";
}

/** `tables`: [{en, ko}, ...]; no key stands in two of them. */
export function createWords(language, tables) {
  const strings = new Map();
  for (const [key, value] of tables.flatMap((table) => Object.entries(table[language]))) {
    if (strings.has(key)) throw new Error(`the string ${key} is there twice in ${language}`);
    strings.set(key, value);
  }
  const integers = new Intl.NumberFormat(language);
  const digits = new Map(); // number of significant digits -> format

  function number(value, numDigits = 3) {
    if (!digits.has(numDigits)) digits.set(numDigits, new Intl.NumberFormat(language, { maximumSignificantDigits: numDigits }));
    return digits.get(numDigits).format(value);
  }

  function look(key) {
    if (!strings.has(key)) throw new Error(`no string ${key} in ${language}`);
    return strings.get(key);
  }

  function t(key, params = {}) {
    return look(key).replace(/\{(\w+)\}/g, (hole, name) => {
      if (params[name] === undefined) throw new Error(`string ${key} has a hole ${name} that nothing fills`);
      return typeof params[name] === "number" ? integers.format(params[name]) : params[name];
    });
  }

  return {
    language,
    t,
    /** A list of strings. */
    list: look,
    number,
    integer: (value) => integers.format(value),
    /** 0.4 ms, 96 ms, 1.24 s, 62.1 s */
    duration(ms) {
      if (ms >= 999.5) return `${number(ms / 1000)} s`;
      return `${number(ms, ms < 10 ? 2 : 3)} ms`;
    },
    /** 512 B, 4.92 MB: decimal units */
    bytes(count) {
      let unit = 0;
      for (; count >= 999.5 && unit < BYTE_UNITS.length - 1; unit++) count /= 1000;
      return `${number(count)} ${BYTE_UNITS[unit]}`;
    },
    rate: (perSecond) => number(perSecond),
    /** Fills every element under `root` that names its words in data-text, data-label, data-title, data-placeholder. */
    fill(root) {
      const each = (name, put) => {
        for (const element of root.querySelectorAll(`[data-${name}]`)) put(element, t(element.dataset[name]));
      };
      each("text", (element, text) => (element.textContent = text));
      each("label", (element, text) => element.setAttribute("aria-label", text));
      each("title", (element, text) => (element.title = text));
      each("placeholder", (element, text) => (element.placeholder = text));
    },
  };
}
