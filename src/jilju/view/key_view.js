// The key: one field, shown only when the server asks for a key.
//
// Owns the dialog and one entry of sessionStorage. After a key that works, the question that was refused is asked again.

const STORAGE_KEY = "jilju.key";

export const readKey = () => sessionStorage.getItem(STORAGE_KEY);

/** `parts`: the elements {dialog, form, input, error, cancel}. */
export function createKeyView({ parts, store, words, chat }) {
  const { dialog, form, input, error, cancel } = parts;

  function say(key) {
    error.textContent = key === null ? "" : words.t(key);
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
    sessionStorage.setItem(STORAGE_KEY, key);
    store.update({ keyWanted: false });
    await chat.loadModel();
    const { keyWanted, messages } = store.get();
    if (keyWanted) {
      say("key_refused");
      input.focus();
      return;
    }
    dialog.close();
    if (messages.at(-1)?.error?.code === "invalid_api_key") chat.retry();
  });
  cancel.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    if (store.get().keyWanted) store.update({ keyWanted: false });
  });
  store.subscribe(({ keyWanted }) => {
    if (!keyWanted || dialog.open) return;
    input.value = "";
    say(readKey() === null ? null : "key_refused");
    dialog.showModal();
  });
}
