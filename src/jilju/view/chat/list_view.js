// The list of conversations: beside the open one where there is room, else in a sheet over it.
//
// Owns the list, its two places and whether it is shown. Knows nothing of how conversations are kept.

import { h, icon } from "../dom.js";

const STORAGE_KEY = "jilju.list"; // "closed" where a person wants the room for the conversation
const ROOM = "(min-width: 1100px)";
const BIN = ["M4 6h12", "M8 6v-2h4v2", "M5.5 6l1 10h7l1 -10"];

/** `parts`: the elements {aside, dialog, toggle}. `onOpened()` is called once a conversation was chosen. */
export function createListView({ parts, store, words, shelf, onOpened }) {
  const { aside, dialog, toggle } = parts;
  const { t } = words;
  const wide = matchMedia(ROOM);
  const list = h("ul", { class: "conversations" });
  const none = h("p", { class: "list-note" }, t("conversations_none"));
  const undo = h("button", { type: "button", class: "quiet undo" }, t("undo"));
  const removedText = h("span", {});
  const removed = h("p", { class: "list-removed", role: "status" }, removedText);
  const removedRow = h("div", { class: "list-undo", hidden: true }, removed, undo);
  const close = h("button", { type: "button", class: "bar-button icon-only", "aria-label": t("close") }, icon("M5 5l10 10M15 5L5 15"));
  const head = h("div", { class: "list-head" }, h("h2", { id: "list-title" }, t("conversations")), close);
  const kept = h("p", { class: "list-note" }, t("conversations_kept"));
  const nav = h("nav", { class: "list", "aria-labelledby": "list-title" }, head, none, list, removedRow, kept);

  function isShown() {
    return wide.matches ? !aside.hidden : dialog.open;
  }

  function label() {
    toggle.setAttribute("aria-expanded", String(isShown()));
  }

  function place() {
    if (dialog.open) dialog.close();
    aside.hidden = !wide.matches || localStorage.getItem(STORAGE_KEY) === "closed";
    (wide.matches ? aside : dialog).append(nav);
    close.hidden = wide.matches;
    label();
  }

  toggle.addEventListener("click", () => {
    if (!wide.matches) dialog.showModal();
    else {
      aside.hidden = !aside.hidden;
      if (aside.hidden) localStorage.setItem(STORAGE_KEY, "closed");
      else localStorage.removeItem(STORAGE_KEY);
    }
    label();
  });
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", label);
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // the backdrop
  });
  undo.addEventListener("click", () => {
    shelf.undo();
    list.querySelector("[aria-current]")?.focus(); // the button that was pressed is gone
  });
  wide.addEventListener("change", place);
  place();

  function choose(id) {
    shelf.open(id);
    if (dialog.open) dialog.close();
    onOpened();
  }

  function row({ id, title }, conversationId) {
    const name = title || t("untitled");
    const current = id === conversationId ? "true" : null;
    const remove = h("button", { type: "button", class: "remove", "aria-label": t("remove", { title: name }), title: t("remove_short") }, icon(...BIN));
    remove.addEventListener("click", () => {
      shelf.remove(id);
      undo.focus();
    });
    const open = h("button", { type: "button", class: "conversation", "aria-current": current, title: name, onclick: () => choose(id) }, name);
    return h("li", {}, open, remove);
  }

  let drawn = {};
  store.subscribe((state) => {
    const { conversations, conversationId, removed: gone } = state;
    if (conversations !== drawn.conversations || conversationId !== drawn.conversationId) {
      list.replaceChildren(...conversations.map((entry) => row(entry, conversationId)));
      none.hidden = conversations.length > 0;
    }
    if (gone !== drawn.removed) {
      removedRow.hidden = gone === null;
      removedText.textContent = gone === null ? "" : t("removed", { title: gone.title || t("untitled") });
    }
    drawn = state;
  });
}
