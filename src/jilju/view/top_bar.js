// The top bar, the same on every page: the brand, the way to the other pages, the page's own actions, the theme.
//
// Owns the inside of one header element. Knows nothing of the pages but their names and addresses.

import { h, icon, svg } from "./dom.js";
import { createTheme } from "./theme.js";

const PAGES = [
  { name: "chat", href: "/" },
  { name: "run", href: "/runs" },
  { name: "engine", href: "/engine" },
];

function brandMark() {
  const bar = (kind, x, width) => svg("rect", { class: `look-${kind}`, x, y: 0, width, height: 14, rx: width > 2 ? 2 : 1 });
  return svg(
    "svg",
    { class: "brand-mark", viewBox: "0 0 22 14", "aria-hidden": "true" },
    bar("prefill", 0, 10),
    ...[12, 16, 20].map((x) => bar("decode", x, 2)), // one wide pass, then one token a step
  );
}

/** A button of the bar; narrow screens keep its icon only. */
export function barButton({ id, label, paths, onclick, iconOnly = false, ...attributes }) {
  return h(
    "button",
    { type: "button", id, class: iconOnly ? "bar-button icon-only" : "bar-button", title: label, "aria-label": label, onclick, ...attributes },
    icon(...paths),
    iconOnly ? null : h("span", {}, label),
  );
}

/** `page`: "chat", "engine" or "run". `before` stands left of the brand, `subject` (a text or an element) names what the page shows. */
export function createTopBar({ root, words, page, before = [], subject = null, actions = [] }) {
  const { t } = words;
  const theme = barButton({
    id: "toggle-theme",
    label: "",
    iconOnly: true,
    paths: ["M10 3.5a6.5 6.5 0 1 0 0 13a6.5 6.5 0 1 0 0 -13", "M10 3.5a6.5 6.5 0 0 1 0 13"],
  });
  theme.querySelector("path:last-child").classList.add("solid");
  const link = ({ name, href }) =>
    h("li", {}, h("a", { class: "bar-link", href, "aria-current": name === page ? "page" : null }, t(`page_${name}`)));
  root.append(
    ...before,
    h("a", { class: "brand", href: "/", "aria-label": t("brand_label") }, brandMark(), h("span", {}, "jilju")),
    h("nav", { "aria-label": t("pages") }, h("ul", { class: "bar-links" }, ...PAGES.map(link))),
    h("div", { class: "bar-subject" }, subject),
    h("div", { class: "bar-actions", role: "group", "aria-label": t("page_actions") }, ...actions, theme),
  );
  createTheme({ root: document.documentElement, button: theme, words });
}
