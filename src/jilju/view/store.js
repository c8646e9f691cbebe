// Store: the page's whole state in one frozen object, replaced and never changed.
//
// Owns who is told and when. Knows nothing of what the state means. Views compare parts by identity, so an update costs
// what it changes.

export function createStore(initial) {
  let state = Object.freeze({ ...initial });
  const listeners = new Set();
  return {
    get: () => state,
    update(patch) {
      state = Object.freeze({ ...state, ...patch });
      for (const listener of listeners) listener(state);
    },
    /** Calls `listener` now and after every update. */
    subscribe(listener) {
      listeners.add(listener);
      listener(state);
    },
  };
}
