// The conversation on the page: the list of messages, the empty state, and a scroll that follows until a person leaves it.
//
// Owns the list, the scroller and the status line for screen readers. Draws what the store says; a message is drawn anew
// only if its object is another one.

import { h } from "../dom.js";
import { createAnswerView } from "./answer_view.js";
import { createUserView } from "./user_view.js";

const TICK_MS = 250;
const NEAR_END_PX = 24; // about a line: nearer than this counts as being at the end

/** `parts`: the elements {scroller, list, empty, emptyText, examples, toLatest, status}. */
export function createConversationView({ parts, store, words, chat, now, focusComposer }) {
  const { scroller, list, empty, emptyText, examples, toLatest, status } = parts;
  const views = new Map(); // message id -> {view, message}
  let following = true;
  let lastTop = 0;
  let timer = null;

  const distance = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;

  function showLatest() {
    toLatest.hidden = following || store.get().messages.length === 0;
  }

  function follow() {
    if (following) scroller.scrollTop = scroller.scrollHeight;
    lastTop = scroller.scrollTop;
    showLatest();
  }

  scroller.addEventListener("scroll", () => {
    // Growth moves the end away without moving the top, so only a top that went up means that a person left.
    if (scroller.scrollTop < lastTop - 1 && distance() > NEAR_END_PX) following = false;
    else if (distance() <= NEAR_END_PX) following = true;
    lastTop = scroller.scrollTop;
    showLatest();
  });
  toLatest.addEventListener("click", () => {
    following = true;
    follow();
    focusComposer();
  });
  const growth = new ResizeObserver(follow); // the text grows in frames of its own
  growth.observe(scroller);
  growth.observe(list);

  for (const text of words.list("examples")) {
    const ask = () => {
      chat.send(text);
      focusComposer();
    };
    examples.append(h("li", {}, h("button", { type: "button", class: "example", onclick: ask }, text)));
  }

  function retry() {
    following = true;
    chat.retry();
    focusComposer(); // the button that was pressed is gone
  }

  function viewOf({ id, role }) {
    const tokens = () => chat.tokens(id);
    if (role === "assistant") return createAnswerView({ words, now, retry, tokens });
    function edit(text) {
      following = true;
      if (chat.edit(id, text)) focusComposer();
    }
    return createUserView({ words, edit, tokens });
  }

  function drawMessages(messages) {
    const present = new Set(messages.map((message) => message.id));
    for (const [id, { view }] of views) {
      if (present.has(id)) continue;
      view.item.remove();
      views.delete(id);
    }
    for (const message of messages) {
      const drawn = views.get(message.id);
      if (drawn?.message === message) continue;
      const view = drawn?.view ?? viewOf(message);
      view.update(message);
      if (!drawn) {
        list.append(view.item);
        if (message.role === "user") following = true; // what one has just sent is what one wants to see
      }
      views.set(message.id, { view, message });
    }
  }

  function announce(messages) {
    const last = messages.at(-1);
    const text = last?.role === "assistant" ? standing(last) : "";
    if (status.textContent !== text) status.textContent = text;
  }

  function standing({ phase, outcome, usage, numTokens }) {
    if (phase !== "done") return words.t(`phase_${phase}`);
    return words.t(`status_${outcome}`, { tokens: usage?.completion_tokens ?? numTokens });
  }

  store.subscribe(({ messages, model, activeId }) => {
    empty.hidden = messages.length > 0;
    list.hidden = messages.length === 0;
    list.classList.toggle("busy", activeId !== null); // nothing can be edited meanwhile
    emptyText.textContent = model ? words.t("empty_text", { model: model.id }) : words.t("empty_text_unnamed");
    drawMessages(messages);
    announce(messages);
    follow();
    if (activeId !== null && timer === null) timer = setInterval(() => views.get(store.get().activeId)?.view.tick(), TICK_MS);
    if (activeId === null && timer !== null) {
      clearInterval(timer);
      timer = null;
    }
  });
}
