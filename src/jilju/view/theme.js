// Theme: the system's, unless a person chose the other one here.
//
// Owns data-theme on the root element and one entry of localStorage. Colours are in style.css.

const STORAGE_KEY = "jilju.theme";

export function createTheme({ root, button, words }) {
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const system = () => (systemDark.matches ? "dark" : "light");
  const inForce = () => root.dataset.theme ?? system();

  function label() {
    const text = words.t(inForce() === "dark" ? "theme_to_light" : "theme_to_dark");
    button.setAttribute("aria-label", text);
    button.title = text;
  }

  function choose(theme) {
    if (theme === system()) {
      delete root.dataset.theme; // back in step with the system, so it follows it again
      localStorage.removeItem(STORAGE_KEY);
    } else {
      root.dataset.theme = theme;
      localStorage.setItem(STORAGE_KEY, theme);
    }
    label();
  }

  const kept = localStorage.getItem(STORAGE_KEY);
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  label();
  button.addEventListener("click", () => choose(inForce() === "dark" ? "light" : "dark"));
  systemDark.addEventListener("change", label);
}
