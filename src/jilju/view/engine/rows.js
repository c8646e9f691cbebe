// Rows: a list on the page kept in step with a list of data, by key, so that what has focus or hover keeps it.

/** `make()` gives {element, update(item)}. Returns show(items, keyOf). */
export function createRows(parent, make) {
  let rows = new Map();

  return function show(items, keyOf) {
    const kept = new Map();
    for (const item of items) {
      let key = String(keyOf(item));
      while (kept.has(key)) key += "+"; // several sequences of one run, or runs that may not be named
      const row = rows.get(key) ?? make();
      row.update(item);
      kept.set(key, row);
    }
    for (const [key, { element }] of rows) if (!kept.has(key)) element.remove();
    let place = parent.firstChild;
    for (const { element } of kept.values()) {
      if (element === place) place = place.nextSibling;
      else parent.insertBefore(element, place);
    }
    rows = kept;
  };
}

/** Shows the first `few` of a list, and all of it once the button is pressed; `label(count, isOpen)` is the button's text. */
export function createFew({ few, button, label, show }) {
  let items = [];
  let isOpen = false;
  function draw() {
    show(isOpen ? items : items.slice(0, few));
    button.hidden = items.length <= few;
    button.setAttribute("aria-expanded", String(isOpen));
    setText(button, label(items.length, isOpen));
  }
  button.addEventListener("click", () => {
    isOpen = !isOpen;
    draw();
  });
  return (next) => {
    items = next;
    draw();
  };
}

/** Writes only what changed: a text that is the same costs no layout and breaks no selection. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
