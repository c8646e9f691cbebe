// Words: the page's strings in the browser's language, and numbers as that language writes them.
//
// Owns the choice of language and the filling of {holes}. A missing string is our bug and throws. The strings are in
// strings.<language>.js, one file each, with the same keys.

import { STRINGS as en } from "./strings.en.js";
import { STRINGS as ko } from "./strings.ko.js";

const LANGUAGES = { en, ko };

/** The first of the preferred languages that we have; English otherwise. */
export function chooseLanguage(preferred) {
  for (const tag of preferred) {
    const language = tag.toLowerCase().split("-")[0];
    if (Object.hasOwn(LANGUAGES, language)) return language;
  }
  return "en";
}

export function createWords(language) {
  const strings = LANGUAGES[language];
  const integers = new Intl.NumberFormat(language);
  const withDigits = (digits) => new Intl.NumberFormat(language, { maximumSignificantDigits: digits });
  const three = withDigits(3);
  const two = withDigits(2);

  function t(key, params = {}) {
    const text = strings[key];
    if (text === undefined) throw new Error(`no string ${key} in ${language}`);
    return text.replace(/\{(\w+)\}/g, (hole, name) => {
      if (params[name] === undefined) throw new Error(`string ${key} has a hole ${name} that nothing fills`);
      return typeof params[name] === "number" ? integers.format(params[name]) : params[name];
    });
  }

  return {
    language,
    t,
    examples: strings.examples,
    /** 0.4 ms, 96 ms, 1.24 s, 62.1 s */
    duration(ms) {
      if (ms >= 999.5) return `${three.format(ms / 1000)} s`;
      return `${(ms < 10 ? two : three).format(ms)} ms`;
    },
    rate: (perSecond) => three.format(perSecond),
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
