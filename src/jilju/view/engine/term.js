// Terms: words with a dotted underline; a press says in a sentence what one means, with the numbers of the frame shown.
//
// Owns the one popover of the page. Knows nothing of the sentences: about.js fills them.

import { h } from "../dom.js";

const MARGIN_PX = 8;

/** `explain(key)` gives the sentence. Returns term(key, text) -> a button that reads like the words around it. */
export function createTerms({ explain, closeLabel }) {
  const text = h("p", { role: "status" });
  const close = h("button", { type: "button", class: "quiet", popovertarget: "about", popovertargetaction: "hide" }, closeLabel);
  const popover = h("div", { class: "about", id: "about", popover: "auto" }, text, close);
  document.body.append(popover);
  let opener = null;

  function place() {
    const box = opener.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = popover;
    const fitsBelow = box.bottom + MARGIN_PX + height <= innerHeight - MARGIN_PX;
    const left = Math.max(MARGIN_PX, Math.min(box.left, innerWidth - width - MARGIN_PX));
    const top = fitsBelow ? box.bottom + MARGIN_PX : Math.max(MARGIN_PX, box.top - MARGIN_PX - height);
    Object.assign(popover.style, { left: `${left}px`, top: `${top}px` });
  }

  popover.addEventListener("toggle", ({ newState }) => {
    if (newState === "open") return;
    opener?.setAttribute("aria-expanded", "false");
    opener = null;
  });
  addEventListener("scroll", () => opener && popover.hidePopover(), { passive: true });

  return function term(key, words) {
    const button = h("button", { type: "button", class: "term", "aria-expanded": "false" }, words);
    button.addEventListener("click", () => {
      if (opener === button) return; // the press outside has just closed it
      opener = button;
      popover.showPopover({ source: button });
      text.textContent = explain(key); // once shown, so that it is read out
      place();
      button.setAttribute("aria-expanded", "true");
    });
    return button;
  };
}
