// Rich: sentences whose words can be asked for their meaning. In strings, "[label|term]" is such a word, "*label*" is strong, and
// "<{count} token/tokens>" is the one or the other by the count.
//
// Owns the markup. What a term means, in this run's numbers, is terms.js.

import { h } from "../dom.js";
import { term } from "../term.js";

const MARKUP = /\[([^|\]]+)\|(\w+)\]|\*([^*]+)\*/g;
const COUNTED = /<\u0001(\d+)\u0002 ([^/>]+)\/([^>]+)>/g;

/** Returns rich(key, params): nodes, and rich.plain: their text. What a parameter says is never read as markup. */
export function createRich({ words }) {
  const plurals = new Intl.PluralRules(words.language);

  function rich(key, params = {}) {
    const names = Object.keys(params);
    const marks = Object.fromEntries(names.map((name, index) => [name, `\u0001${index}\u0002`]));
    const text = words.t(key, marks).replace(COUNTED, (_, index, one, other) => {
      return `\u0001${index}\u0002 ${plurals.select(params[names[index]]) === "one" ? one : other}`;
    });
    const shown = (index) => {
      const value = params[names[index]];
      return typeof value === "number" ? words.integer(value) : value;
    };
    const fill = (part) => part.replace(/\u0001(\d+)\u0002/g, (_, index) => shown(index));
    const nodes = [];
    let done = 0;
    for (const match of text.matchAll(MARKUP)) {
      const [whole, label, name, strong] = match;
      nodes.push(fill(text.slice(done, match.index)));
      nodes.push(name ? term(name, fill(label)) : h("strong", {}, fill(strong)));
      done = match.index + whole.length;
    }
    nodes.push(fill(text.slice(done)));
    return nodes.filter((node) => node !== "");
  }

  rich.plain = (key, params) =>
    rich(key, params)
      .map((node) => node.textContent ?? node)
      .join("");
  return rich;
}
