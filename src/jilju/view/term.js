// Terms: words with dots under them, and the one box that says in a sentence what such a word means.
//
// Owns when the box shows (focus, a tap, the pointer) and where. What it says is the page's: `explain(name)`.

import { h } from "./dom.js";

const HIDE_MS = 160; // long enough to move the pointer from the word into the box
const GAP = 8;

/** A word with dots under it. `name` is what `explain` below is asked for. Not a button of HTML, which would not break over lines. */
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
