// Bar: a sum drawn as its parts, one scale for all bars of a picture, with the words on those parts that have room.
//
// Owns widths and which labels fit. A part is {look, label, value, title}; looks are classes of the style sheet.

import { h } from "../dom.js";

const CHAR_PX = 7.2; // of the small size, on the wide side
const PADDING_PX = 12;

/** `total` is what a bar of the full width stands for; `roomPx` the pixels of that width. */
export function bar(parts, total, roomPx) {
  const pieces = parts.map(({ look, label, value, title }) => {
    const share = total > 0 ? value / total : 0;
    const fits = label && share * roomPx > label.length * CHAR_PX * (/[\u1100-\uffff]/.test(label) ? 1.8 : 1) + PADDING_PX;
    const piece = h("span", { class: `piece look-${look}${fits ? " has-label" : ""}`, title }, fits ? label : null);
    piece.style.width = `${share * 100}%`;
    return piece;
  });
  return h("span", { class: "stacked", "aria-hidden": "true" }, ...pieces);
}
