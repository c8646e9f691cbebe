// Words: the pages' strings in the browser's language, with numbers (numbers.js) as that language writes them.
//
// Owns the choice of language and the filling of {holes}. A missing string is our bug and throws. The strings are in
// strings.<language>.js, one file each with the same keys: those of all pages beside this file, a page's own in its folder.

import { createNumbers } from "./numbers.js";

const LANGUAGES = ["en", "ko"];

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
  const numbers = createNumbers(language);

  function look(key) {
    if (!strings.has(key)) throw new Error(`no string ${key} in ${language}`);
    return strings.get(key);
  }

  function t(key, params = {}) {
    return look(key).replace(/\{(\w+)\}/g, (hole, name) => {
      if (params[name] === undefined) throw new Error(`string ${key} has a hole ${name} that nothing fills`);
      return typeof params[name] === "number" ? numbers.integer(params[name]) : params[name];
    });
  }

  return {
    language,
    t,
    /** A list of strings. */
    list: look,
    ...numbers,
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
