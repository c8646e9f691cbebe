// Station 6, text again: tokens become bytes, bytes become characters; tokens that share a character stand together above it.

import { h } from "../dom.js";
import { createLazyList } from "./lazy_list.js";
import { createStation, tokenText } from "./station.js";
import { Characters } from "./story.js";
import { visible } from "./units.js";

/** What the caller was given: the token that ended the answer is none of it, though its text is kept. */
function answerOf({ output, text }) {
  const last = output.at(-1);
  return last?.is_special && last.text !== "" && text.endsWith(last.text) ? text.slice(0, -last.text.length) : text;
}

export function createOutputView({ words, units, rich, select }) {
  const { t } = words;
  const station = createStation({ name: "again", number: 6, words });
  const answer = h("p", { class: "answer-text", tabindex: "0", role: "region", "aria-label": t("answer_text") });
  const list = h("ol", { class: "joins" });
  const scroller = h("div", { class: "join-scroll" }, list);
  const note = h("p", { class: "note" });
  station.body.append(answer, scroller, note);

  let story = null;
  let characters = null;
  let drawn = null; // the sequence's output as last drawn
  let chosen = null;
  let at = null;
  const lazy = createLazyList({ scroller, list, make });

  function make(index) {
    const group = story.groups[index];
    const chips = group.tokens.map((token) => {
      const classes = [
        "join-token",
        token.is_special && "chip-special",
        token.step_index === chosen && "chosen",
        at !== null && token.at_ms > at && "future",
      ];
      const hex = units.hex(token.bytes);
      const label = t("join_label", { number: token.index + 1, id: String(token.id), bytes: hex, text: token.text });
      return h(
        "button",
        {
          type: "button",
          class: classes.filter(Boolean).join(" "),
          "data-index": token.index,
          disabled: token.step_index === null,
        },
        h("span", { class: "visually-hidden" }, label),
        h("span", { class: "token-id", "aria-hidden": "true" }, String(token.id)),
        h("span", { class: "join-bytes", "aria-hidden": "true" }, hex),
      );
    });
    const own = characters.slice(group.begin, group.end);
    const shown = group.tokens[0].is_special ? null : visible(own);
    const text =
      shown === null
        ? h("span", { class: "join-none" }, group.tokens[0].is_special ? tokenText(group.tokens[0], units) : "–")
        : shown;
    const classes = ["join", group.tokens.length > 1 && "joined", shown === null && "no-text"];
    return h(
      "li",
      { class: classes.filter(Boolean).join(" ") },
      h("span", { class: "join-tokens" }, ...chips),
      h("span", { class: "join-text" }, text),
    );
  }

  list.addEventListener("click", (event) => {
    const button = event.target.closest(".join-token");
    if (button) select(story.sequence.output[Number(button.dataset.index)].step_index);
  });

  function tokens() {
    return [...list.querySelectorAll(".join-token")].map((element) => [
      element,
      story.sequence.output[Number(element.dataset.index)],
    ]);
  }

  function showAnswer() {
    const { output } = story.sequence;
    const next = at === null ? -1 : output.findIndex((token) => token.at_ms > at);
    const until =
      next < 0
        ? answerOf(story.sequence)
        : output
            .slice(0, next)
            .map((token) => (token.is_special ? "" : token.text))
            .join("");
    if (answer.textContent !== until) answer.textContent = until;
    answer.classList.toggle("unfinished", next >= 0);
  }

  return {
    station,
    draw(next) {
      const { sequence, groups } = next;
      const same = drawn?.index === sequence.index && drawn.output.length <= sequence.output.length;
      const kept = same ? Math.max(0, story.groups.length - 1) : 0; // the last group may have grown
      story = next;
      if (same && drawn.output.length === sequence.output.length && drawn.text === sequence.text) return;
      drawn = sequence;
      characters = new Characters(sequence.text);
      const joined = groups.filter((group) => group.tokens.length > 1).length;
      const key = sequence.output.length === 0 ? "lead_no_output" : joined > 0 ? "lead_again_joined" : "lead_again";
      station.say(rich(key, { tokens: sequence.output.length, characters: new Characters(answerOf(sequence)).length, joined }));
      scroller.hidden = answer.hidden = sequence.output.length === 0;
      note.hidden = sequence.output.length === 0;
      note.textContent = t("join_axis");
      showAnswer();
      lazy.reset(groups.length, kept);
    },
    select(stepIndex) {
      chosen = stepIndex;
      for (const [element, token] of tokens()) element.classList.toggle("chosen", token.step_index === stepIndex);
      if (at === null) return;
      const group = story.groups.findIndex(({ tokens: own }) => own.some((token) => token.step_index === stepIndex));
      if (group < 0) return;
      const item = lazy.reach(group); // a moment is shown: what it made comes into sight
      scroller.scrollTop += item.getBoundingClientRect().top - scroller.getBoundingClientRect().top - scroller.clientHeight / 2;
    },
    at(ms) {
      at = ms;
      if (!story) return;
      for (const [element, token] of tokens()) element.classList.toggle("future", ms !== null && token.at_ms > ms);
      showAnswer();
    },
  };
}
