// Rich: sentences whose words can be asked for their meaning. In strings, "[label|term]" is such a word, "*label*" is strong, and
// "<{count} token/tokens>" is the one or the other by the count.
//
// Owns the markup and the one box that shows an explanation. What a term means, in this run's numbers, is terms.js.

import { h } from "../dom.js";

const MARKUP = /\[([^|\]]+)\|(\w+)\]|\*([^*]+)\*/g;
const COUNTED = /<\u0001(\d+)\u0002 ([^/>]+)\/([^>]+)>/g;
const HIDE_MS = 160; // long enough to move the pointer from the word into the box
const GAP = 8;

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

/** A word with dots under it. `name` is one of terms.js. Not a button of HTML, which would not break over lines. */
export const term = (name, label) => h("span", { class: "term", "data-term": name, role: "button", tabindex: "0" }, label);

/** Shows what `explain(name)` says of a word that has the focus, is tapped or lies under the pointer. */
export function watchTerms({ explain }) {
  const box = h("div", { class: "term-box", id: "term-box", role: "tooltip", hidden: true });
  document.body.append(box);
  let shown = null;
  let timer = null;

  function hide() {
    clearTimeout(timer);
    shown?.removeAttribute("aria-describedby");
    shown = null;
    box.hidden = true;
  }

  function show(word) {
    clearTimeout(timer);
    if (word === shown) return;
    hide();
    shown = word;
    box.textContent = explain(word.dataset.term);
    word.setAttribute("aria-describedby", box.id);
    box.hidden = false;
    place();
  }

  function place() {
    if (shown === null) return;
    if (!shown.isConnected) {
      hide(); // the page was drawn anew
      return;
    }
    const at = shown.getBoundingClientRect();
    const size = box.getBoundingClientRect();
    const left = Math.min(Math.max(GAP, at.left), document.documentElement.clientWidth - size.width - GAP);
    const fitsBelow = at.bottom + GAP + size.height <= document.documentElement.clientHeight;
    box.style.left = `${left}px`;
    box.style.top = `${fitsBelow ? at.bottom + GAP : Math.max(GAP, at.top - GAP - size.height)}px`;
  }

  const wordOf = (event) => (event.target instanceof Element ? event.target.closest(".term") : null);
  document.addEventListener("focusin", (event) => (wordOf(event) ? show(wordOf(event)) : hide()));
  document.addEventListener("focusout", (event) => wordOf(event) === shown && hide());
  document.addEventListener("click", (event) => {
    if (wordOf(event))
      show(wordOf(event)); // a tap does not focus a button everywhere
    else if (!box.contains(event.target)) hide();
  });
  document.addEventListener("pointerover", (event) => {
    if (event.pointerType !== "mouse") return;
    if (wordOf(event)) show(wordOf(event));
    else if (box.contains(event.target)) clearTimeout(timer);
  });
  const leave = (event) => {
    if (event.pointerType !== "mouse" || (!wordOf(event) && !box.contains(event.target))) return;
    clearTimeout(timer);
    timer = setTimeout(() => shown !== document.activeElement && hide(), HIDE_MS);
  };
  document.addEventListener("pointerout", leave);
  document.addEventListener("keydown", (event) => {
    if (wordOf(event) && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      show(wordOf(event));
    }
    if (event.key !== "Escape" || shown === null) return;
    hide();
    event.stopImmediatePropagation(); // this Escape is spent
  });
  addEventListener("scroll", place, { capture: true, passive: true });
  addEventListener("resize", place);
}
