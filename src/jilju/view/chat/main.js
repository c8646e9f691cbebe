// The chat page, put together: the only module that names every other one.

import { byId, h } from "../dom.js";
import { explain } from "../faults.js";
import { openPage } from "../page.js";
import { createStore } from "../store.js";
import { barButton } from "../top_bar.js";
import { createChat } from "./chat.js";
import { createChatApi } from "./chat_api.js";
import { createComposerView } from "./composer_view.js";
import { createConversationView } from "./conversation_view.js";
import { createConversations } from "./conversations.js";
import { createListView } from "./list_view.js";
import { loadSettings } from "./settings.js";
import { createSettingsView } from "./settings_view.js";
import { createShelf } from "./shelf.js";
import { STRINGS as en } from "./strings.en.js";
import { STRINGS as ko } from "./strings.ko.js";

const now = () => performance.now();
// crypto.randomUUID exists in secure contexts only; this works on any address
const newId = () => crypto.getRandomValues(new Uint32Array(2)).join("-");

const { words, api } = openPage({
  page: "chat",
  strings: { en, ko },
  bar: ({ t }) => ({
    before: [
      barButton({
        id: "toggle-list",
        label: t("conversations"),
        iconOnly: true,
        paths: ["M3.5 4h13v12h-13z", "M8 4v12"],
      }),
    ],
    subject: h("p", { class: "model-name", id: "model-name" }),
    actions: [
      barButton({ id: "new-chat", label: t("new_chat"), paths: ["M10 4v12M4 10h12"] }),
      barButton({
        id: "open-settings",
        label: t("settings"),
        paths: ["M3 6h8M15 6h2M3 14h2M9 14h8", "M11 6a2 2 0 1 0 4 0a2 2 0 1 0 -4 0", "M5 14a2 2 0 1 0 4 0a2 2 0 1 0 -4 0"],
        "aria-haspopup": "dialog",
      }),
    ],
  }),
});

const store = createStore({
  model: null, // {id, maxModelLen, defaults}
  settings: loadSettings(),
  conversationId: null,
  messages: [],
  activeId: null, // of the answer in the making
  conversations: [], // [{id, title, changedAt}]
  removed: null, // {id, title, restore} of the conversation removed last
  notice: null, // why the model's name is not known
  noRoom: false, // the browser could not keep the conversation
});
const chat = createChat({ store, api: createChatApi(api), now, newId });
const conversations = createConversations({ now: () => Date.now(), newId });
const shelf = createShelf({ store, conversations, chat, newId });

const composer = createComposerView({
  parts: { form: byId("composer"), text: byId("composer-text"), send: byId("send"), stop: byId("stop") },
  store,
  chat,
});
createConversationView({
  parts: {
    scroller: byId("scroller"),
    list: byId("messages"),
    empty: byId("empty"),
    emptyText: byId("empty-text"),
    examples: byId("examples"),
    toLatest: byId("to-latest"),
    status: byId("status"),
  },
  store,
  words,
  chat,
  now,
  focusComposer: composer.focus,
});
createListView({
  parts: { aside: byId("list-aside"), dialog: byId("list-dialog"), toggle: byId("toggle-list") },
  store,
  words,
  shelf,
  onOpened: composer.focus,
});
createSettingsView({
  parts: {
    dialog: byId("settings"),
    form: byId("settings-form"),
    fields: byId("settings-fields"),
    open: byId("open-settings"),
    close: byId("close-settings"),
    clear: byId("clear-settings"),
    inForce: byId("in-force"),
    inForceList: byId("in-force-list"),
    inForceSource: byId("in-force-source"),
  },
  store,
  words,
});

byId("new-chat").addEventListener("click", () => {
  shelf.startNew();
  composer.focus();
});

function drawNotice({ notice, noRoom }) {
  const area = byId("notice");
  area.hidden = notice === null && !noRoom;
  if (notice) {
    const { title, advice, params } = explain(notice);
    const again = h("button", { type: "button", class: "button", onclick: () => chat.loadModel() }, words.t("try_again"));
    area.replaceChildren(h("p", {}, h("strong", {}, words.t(title)), ` ${words.t(advice, params)}`), again);
  } else {
    area.replaceChildren(...(noRoom ? [h("p", {}, words.t("no_room"))] : []));
  }
}

let drawn = {}; // the parts of the state as the subscriber below last saw them
store.subscribe((state) => {
  if (state.model !== drawn.model) {
    byId("model-name").textContent = state.model?.id ?? "";
    byId("model-name").title = state.model?.id ?? "";
    document.title = state.model ? `${state.model.id} · jilju` : "jilju";
  }
  if (state.notice !== drawn.notice || state.noRoom !== drawn.noRoom) drawNotice(state);
  drawn = state;
});

addEventListener("pagehide", shelf.leave);
addEventListener("storage", ({ key, storageArea }) => {
  if (storageArea === localStorage) shelf.changedElsewhere(key);
});

composer.focus();
await chat.loadModel();
