// Station 1, text: the prompt as the model is given it, with what the template wrote in grey.

import { h } from "../dom.js";
import { Characters } from "./story.js";
import { createStation } from "./station.js";

export function createTextView({ words, rich }) {
  const { t, integer } = words;
  const station = createStation({ name: "text", number: 1, words });
  let drawn = null;

  // a line's end that the template wrote is part of what it wrote, so it is shown
  const template = (text) => h("span", { class: "by-template" }, text.replace(/\n/g, "↵\n"));

  return {
    station,
    draw({ prompt }) {
      if (prompt === drawn) return;
      drawn = prompt;
      const characters = new Characters(prompt.text);
      const own = prompt.spans.reduce((sum, span) => sum + (span.role === null ? span.end - span.begin : 0), 0);
      const messages = new Set(prompt.spans.flatMap((span) => (span.role === null ? [] : [span.message_index]))).size;
      const key = own > 0 ? "lead_text" : "lead_text_plain";
      station.say(rich(key, { messages, own, characters: characters.length }));
      const parts = prompt.spans.map(({ begin, end, role, message_index: message }) => {
        const text = characters.slice(begin, end);
        if (role === null) return template(text);
        const says = message === null ? null : h("span", { class: "visually-hidden" }, `${t("role_says", { role })} `);
        return h("span", { class: "by-role" }, says, text);
      });
      const notes = [];
      if (prompt.is_cut)
        notes.push(
          h("p", { class: "note" }, t("prompt_cut", { kept: integer(prompt.tokens.length), tokens: integer(prompt.num_tokens) })),
        );
      if (prompt.num_truncated > 0)
        notes.push(h("p", { class: "note" }, t("prompt_truncated", { tokens: prompt.num_truncated })));
      const text = h("div", { class: "prompt-text", tabindex: "0", role: "region", "aria-label": t("prompt_text") }, ...parts);
      station.body.replaceChildren(text, ...notes);
    },
  };
}
