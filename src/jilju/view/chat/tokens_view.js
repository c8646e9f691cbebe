// The tokens of one message: a chip each, with its id below, in place of the text.
//
// Owns one element, drawn when a person first asks for it. Blanks and line ends are visible; tokens that are parts of one
// character stand together under it, with their bytes. Knows nothing of where the tokens come from.

import { h } from "../dom.js";
import { explain } from "../faults.js";
import { hexOf, joined } from "./tokens.js";

const PAGE = 400; // chips shown at once, and with every "more"
const VISIBLE = { " ": "·", "\t": "→", "\n": "⏎", "\r": "␍" };

const visible = (text) => text.replace(/[ \t\n\r]/g, (char) => VISIBLE[char]);

/** `fetchTokens()` resolves to [{id, bytes, isSpecial, isTemplate}]. Returns {root, show}. */
export function createTokensView({ words, fetchTokens }) {
  const { t } = words;
  const root = h("div", { class: "tokens", hidden: true });
  let groups = null;

  function chip({ text, tokens }, index) {
    const [first] = tokens;
    const classes = ["token", `tint-${index % 2}`];
    if (first.isSpecial) classes.push("special");
    else if (first.isTemplate) classes.push("template");
    const whole = text === null ? `⟨${tokens.map(({ bytes }) => hexOf(bytes)).join(" ")}⟩` : visible(text);
    const word = h("span", { class: "token-text" }, whole === "" ? "∅" : whole);
    const isSplit = tokens.length > 1;
    const parts = tokens.map(({ id, bytes }) =>
      h(
        "span",
        { class: "token-part", title: t("token_title", { id: String(id), bytes: hexOf(bytes) }) },
        isSplit ? h("span", { class: "token-bytes" }, hexOf(bytes)) : null,
        h("span", { class: "token-id" }, String(id)),
      ),
    );
    if (isSplit) classes.push("joined");
    return h("li", { class: classes.join(" ") }, word, h("span", { class: "token-parts" }, ...parts));
  }

  function draw() {
    const tokens = groups.flatMap((group) => group.tokens);
    const numTemplate = tokens.filter(({ isTemplate }) => isTemplate).length;
    const count = h(
      "p",
      { class: "tokens-count" },
      numTemplate > 0 ? t("tokens_count_template", { tokens: tokens.length, template: numTemplate }) : t("tokens_count", { tokens: tokens.length }),
    );
    const list = h("ol", { class: "token-list", "aria-label": t("tokens") });
    const more = h("button", { type: "button", class: "quiet" });
    let numShown = 0;
    const showMore = () => {
      for (const group of groups.slice(numShown, numShown + PAGE)) {
        list.append(chip(group, numShown++));
        if (group.text?.endsWith("\n")) list.append(h("li", { class: "token-break", "aria-hidden": "true" }));
      }
      more.hidden = numShown >= groups.length;
      more.textContent = t("tokens_more", { tokens: groups.slice(numShown).reduce((sum, group) => sum + group.tokens.length, 0) });
    };
    more.addEventListener("click", showMore);
    showMore();
    root.replaceChildren(count, list, more);
  }

  function drawFault(error) {
    const { title, advice, params } = explain(error);
    root.replaceChildren(h("p", { class: "note fault-text", role: "alert" }, `${t(title)} ${t(advice, params)}`));
  }

  return {
    root,
    async show() {
      root.hidden = false;
      if (groups !== null) return;
      root.replaceChildren(h("p", { class: "tokens-count", role: "status" }, t("tokens_wait")));
      try {
        groups = joined(await fetchTokens());
      } catch (error) {
        drawFault(error);
        if (error.code === undefined) throw error; // our own mistake also belongs in the console
        return;
      }
      draw();
    },
  };
}
