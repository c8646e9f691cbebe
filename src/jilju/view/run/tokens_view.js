// Station 2, tokens: the prompt cut into tokens, which of them came from the cache, and why the match ended where it did.

import { h } from "../dom.js";
import { createLazyList } from "./lazy_list.js";
import { createStation, tokenText } from "./station.js";
import { Characters } from "./story.js";
import { visible } from "./units.js";

export function createTokensView({ words, units, rich }) {
  const { t } = words;
  const station = createStation({ name: "tokens", number: 2, words });
  const strip = h("div", { class: "token-strip", role: "img" });
  const stripWords = h("p", { class: "strip-words", "aria-hidden": "true" });
  const reason = h("p", { class: "reason" });
  const list = h("ol", { class: "chips" });
  const scroller = h("div", { class: "chip-scroll", role: "group", "aria-label": t("prompt_tokens") }, list);
  const detail = h("p", { class: "token-detail", role: "status" });
  station.body.append(h("figure", { class: "strip" }, strip, stripWords), reason, scroller, detail);

  let prompt = null;
  let characters = null;
  let drawnFor = null;
  let current = 0;
  const lazy = createLazyList({ scroller, list, make: chip });

  function chip(index) {
    const token = prompt.tokens[index];
    const look = prompt.cache === null ? "untouched" : token.is_cached ? "cached" : "computed";
    const button = h(
      "button",
      {
        type: "button",
        class: `chip chip-${look}${token.is_special ? " chip-special" : ""}`,
        tabindex: index === current ? "0" : "-1",
      },
      tokenText(token, units),
      h("span", { class: "token-id" }, String(token.id)),
    );
    const isEdge = index > 0 && prompt.tokens[index - 1].is_cached && !token.is_cached;
    return h("li", { class: isEdge ? "edge" : "", "data-index": index }, button);
  }

  function describe(index) {
    const token = prompt.tokens[index];
    const size = prompt.cache?.block_size;
    const parts = [
      t("token_is", { position: index + 1, id: String(token.id), text: visible(characters.slice(token.begin, token.end)) ?? "" }),
      t("token_bytes", { bytes: units.hex(token.bytes) }),
      t(prompt.cache === null ? "token_untouched" : token.is_cached ? "token_cached" : "token_computed"),
    ];
    if (size) parts.push(t("token_block", { block: Math.floor(index / size) + 1 }));
    if (token.is_special) parts.push(t("token_special"));
    if (token.logprob != null) parts.push(t("token_probability", { share: words.share(Math.exp(token.logprob)) }));
    detail.textContent = parts.join(" · ");
  }

  function choose(index, { focus = false } = {}) {
    list.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
    list.querySelector(".chip-chosen")?.classList.remove("chip-chosen");
    current = index;
    const button = lazy.reach(index).firstElementChild;
    button.setAttribute("tabindex", "0");
    button.classList.add("chip-chosen");
    if (focus) button.focus();
    describe(index);
  }

  list.addEventListener("click", (event) => {
    const item = event.target.closest("li");
    if (item) choose(Number(item.dataset.index), { focus: true });
  });
  list.addEventListener("keydown", (event) => {
    const last = prompt.tokens.length - 1;
    const moves = {
      ArrowRight: current + 1,
      ArrowDown: current + 1,
      ArrowLeft: current - 1,
      ArrowUp: current - 1,
      Home: 0,
      End: last,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    choose(Math.min(Math.max(moves[event.key], 0), last), { focus: true });
  });

  function drawStrip() {
    const { num_tokens: numTokens, cache } = prompt;
    const cached = cache?.hit_tokens ?? 0;
    if (cache === null) {
      strip.setAttribute("aria-label", t("strip_untouched", { tokens: numTokens }));
      strip.replaceChildren();
      stripWords.replaceChildren(t("strip_untouched", { tokens: numTokens }));
      return;
    }
    strip.setAttribute("aria-label", t("strip_label", { cached, computed: numTokens - cached, tokens: numTokens }));
    const part = (look, tokens) => {
      const span = h("span", { class: `look-${look}` });
      span.style.flexGrow = String(tokens);
      return span;
    };
    strip.replaceChildren(part("cached", cached), part("prefill", numTokens - cached));
    const left = h("span", {}, t("strip_cached", { tokens: cached }));
    const right = h("span", {}, t("strip_computed", { tokens: numTokens - cached }));
    stripWords.replaceChildren(...(cached > 0 ? [left, right] : [right]));
  }

  function drawReason() {
    const { cache } = prompt;
    if (cache === null) {
      reason.replaceChildren(t("cache_untouched"));
      return;
    }
    const position = (cache.first_miss_position ?? 0) + 1;
    const texts = { earlier: visible(cache.earlier_text ?? "") ?? "–", own: visible(cache.own_text ?? "") ?? "–" };
    const nodes = rich(`miss_${cache.miss_reason}`, { position, size: cache.block_size, hit: cache.hit_tokens, ...texts });
    const shown = cache.first_miss_position !== null && cache.first_miss_position < prompt.tokens.length;
    const show = h(
      "button",
      { type: "button", class: "quiet", onclick: () => showMiss(cache.first_miss_position) },
      t("show_place"),
    );
    reason.replaceChildren(...nodes, ...(shown && cache.first_miss_position > 0 ? [" ", show] : []));
  }

  function showMiss(index) {
    choose(index, { focus: true });
    const item = lazy.reach(index);
    scroller.scrollTop += item.getBoundingClientRect().top - scroller.getBoundingClientRect().top - scroller.clientHeight / 3;
  }

  return {
    station,
    draw(story) {
      const mark = JSON.stringify([
        story.prompt.num_tokens,
        story.prompt.tokens.length,
        story.prompt.cache,
        story.sequence.prompt_index,
      ]);
      if (mark === drawnFor) return; // polling brings the same prompt again
      drawnFor = mark;
      prompt = story.prompt;
      characters = new Characters(prompt.text);
      current = 0;
      detail.textContent = t("token_hint");
      station.say(rich("lead_tokens", { tokens: prompt.num_tokens, characters: characters.length }));
      drawStrip();
      drawReason();
      lazy.reset(prompt.tokens.length);
    },
  };
}
