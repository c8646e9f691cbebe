// The engine page, put together: the only module that names every other one.
//
// Owns what is shown: the present as it comes, a moment of the past, or a step picked out of the timeline, which holds the
// timeline and sets everything else to that step's moment.

import { copyText } from "../clipboard.js";
import { byId, h } from "../dom.js";
import { readKey } from "../key_view.js";
import { openPage } from "../page.js";
import { runLink } from "../run_link.js";
import { createStore } from "../store.js";
import { term, watchTerms } from "../term.js";
import { createAbout } from "./about.js";
import { createBlocksView } from "./blocks_view.js";
import { createFallsView } from "./falls_view.js";
import { createFormat } from "./format.js";
import { createInspectorView } from "./inspector_view.js";
import { createMarksView } from "./marks_view.js";
import { createQueueView } from "./queue_view.js";
import { createRewindView } from "./rewind_view.js";
import { setText } from "./rows.js";
import { createSource } from "./source.js";
import { createStatusView } from "./status_view.js";
import { createSteps } from "./steps.js";
import { createStepsTableView } from "./steps_table_view.js";
import { STRINGS as en } from "./strings.en.js";
import { STRINGS as ko } from "./strings.ko.js";
import { createCallsView, createCostView, createMemoryView } from "./sums_view.js";
import { createTilesView } from "./tiles_view.js";
import { createTimelineView } from "./timeline_view.js";

const MARKS = ["refused", "shed", "cancelled", "deadline", "failed", "restart", "preempted"];

const page = openPage({ page: "engine", strings: { en, ko }, bar: () => ({ subject: h("p", { id: "model-name" }) }) });
const { api, key } = page;
const words = { ...page.words, markName: (kind) => (MARKS.includes(kind) ? page.words.t(`mark_${kind}`) : kind) };
const { t } = words;
document.title = `${t("page_engine")} · jilju`;

const format = createFormat(words);
const steps = createSteps();
const store = createStore({
  frame: null, // what the panels show
  mode: "live", // "live", "past", "file"
  selected: null, // serial of a step
  isMoment: true, // the frame is of the moment that was asked for
  link: { state: "connecting" },
});
watchTerms({ explain: createAbout({ words, format, shown: () => ({ frame: store.get().frame, steps }) }) });

const linkRun = (run) => runLink(run, words, { hasPage: store.get().frame.is_live });

// What is shown

function take(frame, how) {
  const { selected } = store.get();
  const isLive = how === "first" || how === "next";
  if (how === "next") steps.append(frame);
  else if (selected === null) steps.replace(frame);
  store.update({ frame, mode: isLive ? "live" : frame.is_live ? "past" : "file", isMoment: how !== "passing" });
}

const source = createSource({ api, take, tell: (link) => store.update({ link }) });

function live() {
  store.update({ mode: "live", selected: null, isMoment: true });
  source.live();
}

function go(endMs) {
  store.update({ selected: null, isMoment: false, mode: store.get().mode === "file" ? "file" : "past" });
  source.moment(endMs);
}

// A step is in the log from its end on; times on the wire are rounded to a µs.
const AFTER_MS = 0.002;

/** A step: everything shows the moment of its end; the timeline stays where it is. */
function select(serial) {
  const { begin_ms: beginMs, ms } = steps.at(steps.indexOf(serial));
  store.update({ selected: serial, isMoment: false, mode: store.get().mode === "file" ? "file" : "past" });
  source.moment(beginMs + ms + AFTER_MS);
}

/** Lets go of a step: back to the present, or to the moment of the step's window. */
function release() {
  if (store.get().selected === null) return;
  if (store.get().mode === "file") go(steps.endMs);
  else live();
}

async function askKey() {
  if (await key.ask()) source.retry();
}

// The views

const timeline = createTimelineView({ words, format, store, steps, select });
byId("timeline-place").append(timeline.stage);
byId("timeline-head").append(timeline.zoom);
const stepsTable = createStepsTableView({ details: byId("steps-table"), words, format, store, steps, select });
const inspector = createInspectorView({ root: byId("inspector"), words, format, linkRun, api, walk: timeline.walk, release });
const rewind = createRewindView({
  root: byId("rewind-bar"),
  notice: byId("notice"),
  status: byId("status"),
  words,
  format,
  go,
  live,
  end: () => go(null),
  retry: source.retry,
  askKey,
});
const marks = createMarksView({ list: byId("marks"), empty: byId("marks-empty"), words, format, linkRun });
const panels = [
  createStatusView({ root: byId("engine-status"), words, format }),
  createTilesView({ root: byId("tiles"), words }),
  createBlocksView({ map: byId("blocks-map"), sum: byId("blocks-sum"), list: byId("streams"), words, linkRun }),
  createQueueView({ list: byId("queue"), more: byId("queue-more"), empty: byId("queue-empty"), words, linkRun }),
  createFallsView({ list: byId("falls"), more: byId("falls-more"), empty: byId("falls-empty"), words, format, linkRun }),
  createMemoryView({ root: byId("memory"), words }),
  createCostView({ root: byId("cost"), words, format }),
  createCallsView({ root: byId("calls"), words }),
  (frame) => marks(frame, steps.marks),
];
for (const place of document.querySelectorAll("[data-words]")) place.append(term(place.dataset.term, t(place.dataset.words)));

// A server with keys is told one, out of the shell's environment: the key itself does not belong on a screen.
const example = ({ model }) =>
  [
    `curl ${location.origin}/v1/chat/completions`,
    "-H 'content-type: application/json'",
    ...(readKey() === null ? [] : ['-H "authorization: Bearer $KEY"']),
    `-d '{"model": "${model}",\n    "messages": [{"role": "user", "content": "${t("example_question")}"}]}'`,
  ].join(" \\\n  ");
byId("empty-copy").addEventListener("click", async ({ currentTarget }) => {
  if (await copyText(byId("empty-example").textContent)) currentTarget.textContent = t("copied");
});

function drawEmpty(frame) {
  const isNew = frame.is_live && frame.counts.accepted === 0 && steps.length === 0;
  byId("empty").hidden = !isNew;
  document.body.classList.toggle("has-no-steps", isNew);
  if (isNew) setText(byId("empty-example"), example(frame));
}

let drawn = {};
store.subscribe((state) => {
  const { frame, selected, isMoment } = state;
  if (frame !== null && frame !== drawn.frame) {
    byId("engine").hidden = false;
    byId("loading").hidden = true;
    setText(byId("model-name"), frame.model);
    for (const update of panels) update(frame);
    drawEmpty(frame);
    stepsTable();
  }
  if (frame !== null && (frame !== drawn.frame || selected !== drawn.selected || isMoment !== drawn.isMoment)) {
    const index = selected === null ? -1 : steps.indexOf(selected);
    inspector.show(index < 0 ? null : steps.at(index), frame, isMoment);
    timeline.changed();
  }
  document.body.dataset.mode = state.mode;
  document.body.dataset.link = state.link.state;
  if (state !== drawn) rewind.update(state);
  drawn = state;
});

document.addEventListener("visibilitychange", () => (document.hidden ? source.hide() : source.show()));
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.defaultPrevented && !document.querySelector(":popover-open, dialog[open]")) release();
});
if (document.hidden) source.hide();
source.live();
