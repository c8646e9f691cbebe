// Markdown: the text of a model as a tree of harmless elements.
//
// Owns what of Markdown is shown and how. Two walls stand before a hostile text: HTML in it is shown as text, and what the
// renderer made is sanitized down to a short list of elements. Images are named, never loaded; links wait for a click.

import { copyText } from "../clipboard.js";
import { h } from "../dom.js";
import { getDefaults, Lexer, Parser, Renderer } from "../vendor/marked.esm.js";
import DOMPurify from "../vendor/purify.es.mjs";

const MAX_INLINE_CHARS = 4096; // of one paragraph: emphasis is found in time quadratic in it, 0.2 s at this length
const OPTIONS = { ...getDefaults(), gfm: true, breaks: true };
const LINE_BREAK = /^<br\s*\/?>$/i; // the one tag that models write for want of Markdown: in the cells of a table
const LANGUAGE = /^language-([\w+#.-]{1,24})$/;
const ADDRESS = /^(?:https?:\/\/|mailto:)/i;

const ALLOWED = {
  ALLOWED_TAGS: "a blockquote br code del em h3 h4 h5 h6 hr li ol p pre strong table tbody td th thead tr ul".split(" "),
  ALLOWED_ATTR: ["align", "class", "href", "start"],
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOWED_URI_REGEXP: ADDRESS,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escape = (text) => text.replace(/[&<>"']/g, (char) => ENTITIES[char]);

class TextRenderer extends Renderer {
  heading({ tokens, depth }) {
    const level = Math.min(depth + 2, 6); // h1 and h2 are the page's
    return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
  }
  html({ text, block }) {
    if (LINE_BREAK.test(text)) return "<br>";
    return block ? `<p>${escape(text.trimEnd())}</p>` : escape(text);
  }
  image({ href, text }) {
    const address = escape(href);
    return `${escape(text || "…")} (<a href="${address}">${address}</a>)`;
  }
  checkbox({ checked }) {
    return checked ? "☑ " : "☐ ";
  }
}

/** The blocks of a text, each with its `raw` text; one block where the text is nested too deep to be read (the stack ends). */
export function lex(source) {
  return orIfTooDeep(
    () => {
      const lexer = new Lexer(OPTIONS);
      lexer.blockTokens(source, lexer.tokens);
      for (const { src, tokens } of lexer.inlineQueue) { // which may grow meanwhile
        if (src.length > MAX_INLINE_CHARS) tokens.push({ type: "text", raw: src, text: src });
        else lexer.inlineTokens(src, tokens);
      }
      return lexer.tokens;
    },
    () => [{ type: "text", raw: source, text: source }],
  );
}

/** One block as a fragment. */
export function render(block, words) {
  const html = orIfTooDeep(
    () => new Parser({ ...OPTIONS, renderer: new TextRenderer(OPTIONS) }).parse([block]),
    () => `<p>${escape(block.raw)}</p>`,
  );
  return sanitize(html, words);
}

function orIfTooDeep(act, otherwise) {
  try {
    return act();
  } catch (error) {
    if (error instanceof RangeError) return otherwise();
    throw error;
  }
}

/** HTML of any origin to a fragment of what is allowed. */
export function sanitize(html, words) {
  const fragment = DOMPurify.sanitize(html, ALLOWED) ?? document.createDocumentFragment(); // null: nothing was left
  for (const node of [...fragment.childNodes]) if (isBlankText(node)) node.remove(); // line ends between blocks
  for (const link of fragment.querySelectorAll("a")) finishLink(link);
  for (const element of fragment.querySelectorAll("[class]")) {
    if (element.tagName !== "CODE" || !LANGUAGE.test(element.className)) element.removeAttribute("class");
  }
  for (const code of fragment.querySelectorAll("pre > code")) code.parentElement.replaceWith(codeBlock(code, words));
  for (const table of fragment.querySelectorAll("table")) {
    const frame = h("div", { class: "table-frame", tabindex: "0", role: "region", "aria-label": words.t("table") });
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

const isBlankText = (node) => node.nodeType === Node.TEXT_NODE && node.data.trim() === "";

// An address that is none of the web's, or a path on this very server, is no link: its words stay.
function finishLink(link) {
  const href = link.getAttribute("href") ?? "";
  if (!ADDRESS.test(href) || !URL.canParse(href)) {
    link.replaceWith(...link.childNodes);
    return;
  }
  link.title = href;
  link.target = "_blank";
  link.rel = "noopener noreferrer nofollow";
}

function codeBlock(code, words) {
  const { t } = words;
  const [, language] = LANGUAGE.exec(code.className) ?? [];
  code.removeAttribute("class");
  const copy = h("button", { type: "button", class: "quiet copy-code" }, t("copy"));
  copy.addEventListener("click", async () => {
    if (await copyText(code.textContent)) copy.textContent = t("copied");
  });
  const head = h("figcaption", { class: "code-head" }, h("span", { class: "code-language" }, language ?? t("code")), copy);
  const frame = h("pre", { tabindex: "0", "aria-label": t("code") }, code);
  return h("figure", { class: "code" }, head, frame);
}
