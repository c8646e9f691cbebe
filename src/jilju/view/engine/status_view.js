// Status: what runs here, whether it is well, and whether all sums add up: the line above the tiles.
//
// Owns that line. The lamp is a shape and a word besides its colour.

import { h, icon } from "../dom.js";
import { term } from "../term.js";
import { setText } from "./rows.js";

const SCALES = ["M10 3v13", "M6 16.5h8", "M3.5 5.5h13", "M5 5.5l-2.5 6h5z", "M15 5.5l-2.5 6h5z"];
const STATES = ["ready", "loading", "restarting", "draining", "gone"];

export function createStatusView({ root, words, format }) {
  const { t } = words;
  const stateLamp = h("span", { class: "state-lamp", "aria-hidden": "true" });
  const state = h("p", { class: "state", id: "state" }, stateLamp, h("span", { id: "engine-state" }));
  const facts = h("p", { class: "facts" });
  const balance = term("balance", "");
  const lamp = h("p", { class: "balance", id: "balance" }, icon(...SCALES), balance);
  root.append(state, facts, lamp);

  return (frame) => {
    const known = STATES.includes(frame.state) ? t(`state_${frame.state}`) : frame.state;
    state.dataset.state = !frame.is_live ? "recorded" : frame.state === "ready" ? "ready" : "other";
    setText(state.lastChild, frame.is_live ? known : t("state_recorded"));
    const parts = [
      t("facts_version", { version: frame.version }),
      frame.kernel_set,
      t("facts_threads", { threads: frame.num_threads }),
      t("facts_uptime", { uptime: format.long(frame.uptime_s) }),
    ];
    setText(facts, parts.join(" · "));
    const { imbalance } = frame.tiles;
    lamp.dataset.balanced = String(imbalance === 0);
    setText(balance, imbalance === 0 ? t("balanced") : t("unbalanced", { imbalance }));
  };
}
