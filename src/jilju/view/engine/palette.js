// Palette: the colours of base.css as a canvas takes them, for the theme in force.
//
// Owns the reading and when it is stale. Knows nothing of what is drawn.

const NAMES = ["line", "line-strong", "ink", "ink-quiet", "accent", "wait", "prefill", "decode", "host", "fault"];

/** `changed()` is called when the theme has. Returns a function that gives {ink, prefill, ...}. */
export function createPalette(changed) {
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  let colours = null;

  // a custom property of light-dark() comes back as it was written; a colour comes back resolved
  const read = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const stale = () => {
    colours = null;
    changed();
  };
  new MutationObserver(stale).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", stale);

  return () => (colours ??= Object.fromEntries(NAMES.map((name) => [name, read(name)])));
}
