// An answer's text as it grows: Markdown, drawn once a frame at most, and only what still can change.
//
// Owns one element. A block is finished once another follows it; finished blocks are drawn once and stay, so a long answer
// costs what it adds. A last block that is slow to draw is drawn the more rarely. Knows nothing of messages.

import { lex, render } from "./markdown.js";

const REST = 4; // times as long as a drawing took, until the next one

/** `root`: the element. `words` for what is added to the text. */
export function createAnswerText({ root, words }) {
  let text = ""; // as last given
  let drawnText = "";
  let numSettled = 0; // characters of the text in blocks that are finished
  let open = []; // nodes of the last block
  let openCode = null; // {lang, node} if it is a block of code: its text grows, the rest of it stays
  let hasDefinitions = false; // of links, which earlier blocks may have used
  let frame = null;
  let restUntil = 0;

  function clear() {
    drawnText = "";
    numSettled = 0;
    open = [];
    openCode = null;
    hasDefinitions = false;
    root.replaceChildren();
  }

  /** Lets the block of code that is drawn grow to what it is now, if it is that block. */
  function grewCode(block) {
    if (openCode === null || block?.type !== "code" || block.lang !== openCode.lang) return false;
    const shown = openCode.node.data.slice(0, -1); // without the line end that closes every block of code
    if (!block.text.startsWith(shown)) return false;
    openCode.node.replaceData(shown.length, 1, `${block.text.slice(shown.length)}\n`);
    return true;
  }

  function draw() {
    if (!text.startsWith(drawnText)) clear();
    drawnText = text;
    const blocks = lex(text.slice(numSettled));
    let numFinished = blocks.length - 1;
    while (numFinished > 0 && blocks[numFinished].type === "space") numFinished--;
    const grew = grewCode(blocks[0]);
    if (!grew) for (const node of open) node.remove();
    if (!grew || numFinished > 0) {
      open = [];
      openCode = null;
    }
    blocks.forEach((block, index) => {
      const isFinished = index < numFinished;
      if (isFinished) numSettled += block.raw.length;
      hasDefinitions ||= block.type === "def";
      if ((index === 0 && grew) || block.type === "space" || block.type === "def") return;
      const fragment = render(block, words);
      if (!isFinished) {
        open = [...fragment.childNodes];
        const node = block.type === "code" ? fragment.querySelector("code")?.firstChild : null;
        openCode = node ? { lang: block.lang, node } : null;
      }
      root.append(fragment);
    });
  }

  function drawInFrame() {
    frame = null;
    const begun = performance.now();
    if (begun < restUntil) {
      later();
      return;
    }
    draw();
    const ended = performance.now();
    restUntil = ended + REST * (ended - begun);
  }

  function later() {
    frame ??= requestAnimationFrame(drawInFrame);
  }

  return {
    /** The text so far; drawn in a frame to come. */
    grow(newText) {
      text = unixLines(newText);
      if (text !== drawnText) later();
    },
    /** The whole text; drawn now. */
    finish(newText) {
      if (frame !== null) cancelAnimationFrame(frame);
      frame = null;
      text = unixLines(newText);
      draw();
      if (!hasDefinitions) return;
      clear();
      draw(); // all at once, so that every link finds its definition
    },
  };
}

const unixLines = (text) => (text.includes("\r") ? text.replace(/\r\n?/g, "\n") : text);
