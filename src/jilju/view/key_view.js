// The key: one field, shown only when the server asks for a key.
//
// Owns the dialog and one entry of sessionStorage. Knows nothing of what the key is wanted for: whoever asks waits.

import { h } from "./dom.js";

const STORAGE_KEY = "jilju.key";

export const readKey = () => sessionStorage.getItem(STORAGE_KEY);

/** `accepted()` resolves to whether the server takes the key that is kept now. Returns {ask}. */
export function createKeyView({ words, accepted }) {
  const { t } = words;
  const input = h("input", { id: "key-input", type: "password", autocomplete: "off", spellcheck: "false", "aria-describedby": "key-error" });
  const problem = h("p", { class: "field-error", id: "key-error", role: "alert" });
  const cancel = h("button", { type: "button", class: "button" }, t("cancel"));
  const field = h("div", { class: "field" }, h("label", { for: "key-input" }, t("key_label")), input, problem);
  const foot = h("footer", { class: "card-foot" }, cancel, h("button", { type: "submit", class: "button primary" }, t("key_submit")));
  const title = h("h2", { id: "key-title" }, t("key_title"));
  const form = h("form", { id: "key-form", novalidate: true }, title, h("p", {}, t("key_text")), field, foot);
  const dialog = h("dialog", { class: "card", id: "key-dialog", "aria-labelledby": "key-title" }, form);
  document.body.append(dialog);

  let asked = null; // {promise, resolve, found} while the dialog is open: all who ask share one answer

  function say(key) {
    problem.textContent = key === null ? "" : t(key);
    input.setAttribute("aria-invalid", String(key !== null));
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const key = input.value.trim();
    if (key === "") {
      say("key_missing");
      input.focus();
      return;
    }
    const pending = asked;
    sessionStorage.setItem(STORAGE_KEY, key);
    const found = await accepted();
    if (asked !== pending) return; // it was closed meanwhile
    if (!found) {
      say("key_refused");
      input.focus();
      return;
    }
    asked.found = true;
    dialog.close();
  });
  cancel.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    const { resolve, found } = asked;
    asked = null;
    resolve(found);
  });

  return {
    /** True once the server has taken a key, false if the person would rather not give one. */
    ask() {
      if (asked === null) {
        asked = { found: false };
        asked.promise = new Promise((resolve) => (asked.resolve = resolve));
        input.value = "";
        say(readKey() === null ? null : "key_refused");
        dialog.showModal();
      }
      return asked.promise;
    },
  };
}
