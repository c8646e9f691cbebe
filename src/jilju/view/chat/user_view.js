// One question on the page: its text, and the field in which it can be put otherwise.
//
// Owns one list item. Knows nothing of requests.

import { h } from "../dom.js";
import { isComposing } from "./composer_view.js";
import { actionButton, copyButton, tokensSwitch } from "./message_parts.js";

const PENCIL = ["M4 16l1 -4l8 -8l3 3l-8 8z"];

/** `edit(text)` sends another text in the place of this one and says whether it did; `tokens()` fetches this one's. */
export function createUserView({ words, edit, tokens }) {
  const { t } = words;
  const text = h("div", { class: "text" });
  let shown = "";
  const switched = tokensSwitch({ words, text, fetchTokens: tokens });
  const editButton = actionButton({ label: t("edit"), paths: PENCIL, onclick: beginEdit, class: "edit" });
  const actions = h("div", { class: "message-actions" }, editButton, copyButton({ words, text: () => shown }), switched.button);
  const body = h("div", { class: "body" }, text, switched.root, actions);
  const item = h("li", { class: "message user" }, h("span", { class: "visually-hidden" }, t("you")), body);

  function beginEdit() {
    const field = h("textarea", { class: "edit-text", rows: "3", "aria-label": t("edit_label") });
    field.value = shown;
    const form = h(
      "form",
      { class: "edit-form", novalidate: true },
      field,
      h("p", { class: "edit-hint" }, t("edit_hint")),
      h(
        "div",
        { class: "edit-foot" },
        h("button", { type: "button", class: "button", onclick: endEdit }, t("cancel")),
        h("button", { type: "submit", class: "button primary" }, t("send")),
      ),
    );
    function endEdit() {
      form.replaceWith(body);
      editButton.focus();
    }
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim() === shown) endEdit();
      else edit(field.value);
    });
    field.addEventListener("keydown", (event) => {
      if (isComposing(event)) return;
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        form.requestSubmit();
      } else if (event.key === "Escape") {
        event.stopPropagation(); // it would also stop an answer
        endEdit();
      }
    });
    body.replaceWith(form);
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  return {
    item,
    tick() {},
    update(message) {
      shown = message.text;
      text.textContent = message.text;
    },
  };
}
