// The chat page, put together: the only module that names every other one.

import { createApi } from "./api.js";
import { createChat } from "./chat.js";
import { createComposerView } from "./composer_view.js";
import { createConversationView } from "./conversation_view.js";
import { byId, h } from "./dom.js";
import { explain } from "./faults.js";
import { keepMessages, loadMessages } from "./history.js";
import { chooseLanguage, createWords } from "./i18n.js";
import { createKeyView, readKey } from "./key_view.js";
import { loadSettings } from "./settings.js";
import { createSettingsView } from "./settings_view.js";
import { createStore } from "./store.js";
import { createTheme } from "./theme.js";

const now = () => performance.now();

const words = createWords(chooseLanguage(navigator.languages));
document.documentElement.lang = words.language;
words.fill(document);
createTheme({ root: document.documentElement, button: byId("toggle-theme"), words });

const store = createStore({
  model: null, // {id, maxModelLen, defaults}
  settings: loadSettings(),
  messages: loadMessages(),
  activeId: null, // of the answer in the making
  notice: null, // why the model's name is not known
  noRoom: false, // the browser could not keep the conversation
  keyWanted: false,
});
const api = createApi({ key: readKey });
// crypto.randomUUID exists in secure contexts only; this works on any address
const newId = () => crypto.getRandomValues(new Uint32Array(2)).join("-");
const chat = createChat({ store, api, now, newId });

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
createKeyView({
  parts: {
    dialog: byId("key-dialog"),
    form: byId("key-form"),
    input: byId("key-input"),
    error: byId("key-error"),
    cancel: byId("key-cancel"),
  },
  store,
  words,
  chat,
});

byId("new-chat").addEventListener("click", () => {
  chat.reset();
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

// Kept when an answer begins or ends and when the page goes, not at every token.
const keep = () => {
  const noRoom = !keepMessages(store.get().messages);
  if (noRoom !== store.get().noRoom) store.update({ noRoom });
};
let keptFor;
store.subscribe(({ activeId, messages }) => {
  const mark = `${activeId}/${messages.length}`;
  if (mark === keptFor) return;
  keptFor = mark;
  queueMicrotask(keep); // after this update has reached every listener
});
addEventListener("pagehide", keep);

composer.focus();
await chat.loadModel();
