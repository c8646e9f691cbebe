// Parts that questions and answers share: a copy button and the switch between a text and its tokens.

import { copyText } from "../clipboard.js";
import { h, icon } from "../dom.js";
import { createTokensView } from "./tokens_view.js";

const COPY = ["M7 7h9v9h-9z", "M4 13v-9h9"];
const TOKENS = ["M3 7h4v6h-4z", "M9 7h2v6h-2z", "M13 7h4v6h-4z"];

export function actionButton({ label, paths, onclick, ...attributes }) {
  return h("button", { type: "button", onclick, ...attributes, class: `quiet ${attributes.class ?? ""}` }, icon(...paths), h("span", {}, label));
}

/** `text()` gives what is copied. */
export function copyButton({ words, text }) {
  const button = actionButton({ label: words.t("copy"), paths: COPY });
  button.addEventListener("click", async () => {
    if (await copyText(text())) button.lastChild.textContent = words.t("copied");
  });
  return button;
}

/** {button, root}: the switch, and the tokens to be placed behind the text, which `text` (an element) is hidden for. */
export function tokensSwitch({ words, text, fetchTokens }) {
  const view = createTokensView({ words, fetchTokens });
  const button = actionButton({ label: words.t("tokens"), paths: TOKENS, "aria-pressed": "false", class: "show-tokens" });
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    text.hidden = shown;
    if (shown) return view.show();
    view.root.hidden = true;
  });
  return { button, root: view.root };
}
