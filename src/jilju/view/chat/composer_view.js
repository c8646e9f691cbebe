// The composer: the field one writes in, and the button that sends or stops.
//
// Owns the keys: Enter sends, Shift+Enter starts a line, Esc stops. While an input method composes (Korean, Japanese,
// Chinese), Enter and Esc belong to it. Knows nothing of what is sent.

const IME_KEY_CODE = 229; // what keydown carries during composition where isComposing is not (yet) true

export const isComposing = (event) => event.isComposing || event.keyCode === IME_KEY_CODE;

/** `parts`: the elements {form, text, send, stop}. Returns {focus}. */
export function createComposerView({ parts, store, chat }) {
  const { form, text, send, stop } = parts;

  function fitHeight() {
    text.style.height = "auto"; // CSSOM, which the policy allows; style.css bounds it
    text.style.height = `${text.scrollHeight}px`;
  }

  function submit() {
    if (!chat.send(text.value)) return;
    text.value = "";
    fitHeight();
    drawButtons();
    text.focus();
  }

  function drawButtons() {
    const busy = store.get().activeId !== null;
    const hadFocus = document.activeElement === send || document.activeElement === stop;
    send.hidden = busy;
    stop.hidden = !busy;
    send.disabled = text.value.trim() === "";
    if (hadFocus && (document.activeElement?.hidden || document.activeElement === document.body)) text.focus();
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || isComposing(event)) return;
    event.preventDefault();
    submit();
  });
  text.addEventListener("input", () => {
    fitHeight();
    drawButtons();
  });
  stop.addEventListener("click", () => chat.stop());
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || isComposing(event) || document.querySelector("dialog[open]")) return;
    chat.stop();
  });
  store.subscribe(drawButtons);

  return { focus: () => text.focus() };
}
