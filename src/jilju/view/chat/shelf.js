// The shelf: which conversation is open, and that it is kept.
//
// Owns conversationId, conversations, removed and noRoom of the store. A conversation is kept when an answer begins or ends and
// when the page goes, not at every token. Knows nothing of the DOM.

import { NoRoom } from "./conversations.js";

export function createShelf({ store, conversations, chat, newId }) {
  let kept = null; // the messages that storage has
  let mark = null; // of the state that was looked at last

  function orNoRoom(act) {
    try {
      act();
      store.update({ noRoom: false });
    } catch (error) {
      if (!(error instanceof NoRoom)) throw error;
      store.update({ noRoom: true });
    }
  }

  const relist = () => store.update({ conversations: conversations.list() });

  function keep() {
    const { conversationId, messages } = store.get();
    if (messages === kept || messages.length === 0) return;
    kept = messages;
    orNoRoom(() => conversations.keep(conversationId, messages));
    relist();
  }

  function show(id, messages) {
    chat.end();
    keep();
    kept = messages;
    conversations.open(id);
    store.update({ conversationId: id, messages });
  }

  orNoRoom(() => conversations.adopt());
  const id = conversations.opened() ?? newId();
  const messages = conversations.load(id) ?? [];
  kept = messages;
  conversations.open(id);
  store.update({ conversationId: id, messages });
  relist();

  store.subscribe(({ activeId, messages }) => {
    const newMark = `${activeId}/${messages.length}`;
    if (newMark === mark) return;
    mark = newMark;
    queueMicrotask(keep); // after this update has reached every listener
  });

  return {
    /** The page goes: what has arrived is kept. */
    leave() {
      chat.end();
      keep();
    },
    open(id) {
      if (id === store.get().conversationId) return;
      show(id, conversations.load(id) ?? []);
    },
    startNew() {
      show(newId(), []);
    },
    remove(id) {
      const { title } = store.get().conversations.find((entry) => entry.id === id);
      if (id === store.get().conversationId) this.startNew();
      store.update({ removed: { id, title, restore: conversations.remove(id) } });
      if (store.get().noRoom) kept = null; // there may be room now
      keep();
      relist();
    },
    /** Brings the last removed one back and opens it. */
    undo() {
      const { id, restore } = store.get().removed;
      orNoRoom(restore);
      store.update({ removed: null });
      relist();
      this.open(id);
    },
    /** Another tab has changed what is kept. */
    changedElsewhere(key) {
      if (!conversations.isOurs(key)) return;
      relist();
      const { activeId, conversationId } = store.get();
      const messages = conversations.load(conversationId);
      if (activeId !== null || messages === null) return;
      kept = messages;
      store.update({ messages });
    },
  };
}
