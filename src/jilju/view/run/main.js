// The page of a run, put together: the only module that names every other one.
//
// Owns what is shown: the run, which of its answers, the chosen step and the moment; and the polling while it runs.

import { byId, h } from "../dom.js";
import { explain } from "../faults.js";
import { openPage } from "../page.js";
import { watchTerms } from "../term.js";
import { createDecodeView } from "./decode_view.js";
import { createHeadView } from "./head_view.js";
import { createMachineView } from "./machine_view.js";
import { createOutputView } from "./output_view.js";
import { createPlay, PACES } from "./play.js";
import { createPrefillView } from "./prefill_view.js";
import { createRich } from "./rich.js";
import { createRunsView } from "./runs_view.js";
import { keepFocus } from "./station.js";
import { createStepView } from "./step_view.js";
import { createStory } from "./story.js";
import { STRINGS as en } from "./strings.en.js";
import { STRINGS as ko } from "./strings.ko.js";
import { createTerms } from "./terms.js";
import { createTextView } from "./text_view.js";
import { createTimelineView } from "./timeline_view.js";
import { createTokensView } from "./tokens_view.js";
import { createUnits } from "./units.js";
import { createWaitView } from "./wait_view.js";

const POLL_MS = 1000;
const OPS_AFTER_MS = 120; // a step that is only passed by is not asked for

const { words, api, key } = openPage({ page: "run", strings: { en, ko } });
const { t } = words;
const units = createUnits(words);
const rich = createRich({ words });
const runId = decodeURIComponent(location.pathname.split("/")[2] ?? "");

let story = null;
let answer = 0; // index of the answer shown
let chosen = null; // index of the chosen step
let at = null; // ms, null: the whole run
const opsBySerial = new Map();
let opsTimer = null;

const play = createPlay({
  story: () => story,
  show: showMoment,
  changed: (isPlaying) => timeline.playing(isPlaying),
  now: () => performance.now(),
  nextFrame: (callback) => requestAnimationFrame(callback),
  isCalm: () => matchMedia("(prefers-reduced-motion: reduce)").matches,
});
const head = createHeadView({ root: byId("head"), words, rich, choose: chooseAnswer, trace: downloadTrace });
const timeline = createTimelineView({ root: byId("timeline"), words, units, rich, seek, play, paces: PACES });
const step = createStepView({ words, units, rich, move: (by) => select(chosen + by) });
const text = createTextView({ words, rich });
const tokens = createTokensView({ words, units, rich });
const wait = createWaitView({ words, rich });
const prefill = createPrefillView({ words, rich, select });
const decode = createDecodeView({ words, units, rich, select });
const output = createOutputView({ words, units, rich, select });
const machine = createMachineView({ words, units, rich });
const runs = createRunsView({ root: byId("runs"), words });
const stations = [text, tokens, wait, prefill, decode, output];
const [before, after] = [stations.slice(0, 5), stations.slice(5)].map((part) => part.map((view) => view.station.section));
byId("stations").append(...before, step.panel, ...after, machine.station.section);
watchTerms({ explain: createTerms({ words, rich, story: () => story }) });
timeline.playing(false);

function draw(run) {
  const before = story;
  story = createStory(run, Math.min(answer, run.sequences.length - 1));
  document.title = `${t("title")} · ${run.id} · jilju`;
  for (const id of ["head", "timeline", "stations"]) byId(id).hidden = id !== "head" && story.sequence === null;
  head.draw(story);
  if (story.sequence === null) return;
  timeline.draw(story);
  const [times] = units.sum(
    story.stations.map(({ ms }) => ms),
    story.balance.sumMs,
  ); // the same texts as in the sum
  stations.forEach((view, index) => {
    view.draw(story);
    view.station.showTime(times[index]);
  });
  machine.draw(story);
  const { steps } = story.sequence;
  if (before?.sequence?.index !== story.sequence.index || chosen === null || chosen >= steps.length) {
    const first = steps.findIndex(({ kind }) => kind === "decode");
    chosen = steps.length === 0 ? null : first < 0 ? steps.length - 1 : first;
  }
  showStep();
  showMoment(at, { follow: false });
}

function select(index) {
  if (!story.sequence.steps[index]) return;
  chosen = index;
  showStep();
}

function showStep() {
  step.draw(story, chosen);
  for (const view of [prefill, decode, output]) view.select(chosen);
  machine.select(chosen);
  const { serial } = story.sequence.steps[chosen] ?? {};
  machine.drawOps(story, chosen, serial === undefined ? null : opsOf(serial));
  clearTimeout(opsTimer);
  if (serial !== undefined && !opsBySerial.has(serial)) opsTimer = setTimeout(() => loadOps(serial), OPS_AFTER_MS);
}

const opsOf = (serial) => ({ step: story.sequence.steps[chosen], ...(opsBySerial.get(serial) ?? { data: null, problem: null }) });

async function loadOps(serial) {
  try {
    opsBySerial.set(serial, { data: await api.json(`/v1/jilju/steps/${serial}`), problem: null });
  } catch (error) {
    if (error.code === undefined) throw error;
    machine.drawOps(story, chosen, { ...opsOf(serial), problem: error }); // not kept: choosing it again asks again
    return;
  }
  if (story.sequence.steps[chosen]?.serial === serial) machine.drawOps(story, chosen, opsOf(serial));
}

function seek(ms) {
  play.moved(ms);
  showMoment(ms);
}

/** Shows a moment of the run, or all of it; the chosen step goes along. */
function showMoment(ms, { follow = true } = {}) {
  at = ms;
  timeline.at(ms);
  for (const view of [prefill, decode, output]) view.at(ms);
  story.stations.forEach(({ beginMs, endMs }, index) => {
    const { section } = stations[index].station;
    const shownFromMs = stations[index] === output ? (story.sequence.output[0]?.at_ms ?? beginMs) : beginMs; // text comes as tokens do
    section.classList.toggle("future", ms !== null && shownFromMs > ms);
    section.classList.toggle("now", ms !== null && beginMs <= ms && ms < endMs);
  });
  if (ms === null || !follow) return;
  const index = story.sequence.steps.findLastIndex((each) => each.begin_ms + each.ms <= ms);
  if (index >= 0 && index !== chosen) select(index);
}

function chooseAnswer(index) {
  play.moved(null);
  answer = index;
  at = null;
  chosen = null;
  keepFocus(byId("main"), () => draw(story.run));
  byId("status").textContent = t("answer_shown", { number: index + 1 });
}

async function downloadTrace() {
  let response;
  try {
    response = await api.call(`/v1/jilju/trace?run=${encodeURIComponent(runId)}`);
  } catch (error) {
    if (error.code === undefined) throw error;
    drawNotice(error, downloadTrace);
    return;
  }
  const url = URL.createObjectURL(await response.blob());
  h("a", { href: url, download: `${runId}.trace.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), POLL_MS);
}

function drawNotice(error, again) {
  if (error === null) {
    byId("notice").replaceChildren();
    return;
  }
  const { title, advice, params } = explain(error);
  const button = h("button", { type: "button", class: "button", onclick: () => (drawNotice(null), again()) }, t("try_again"));
  const said = h("p", { class: "fault-said", lang: "en" }, error.message);
  byId("notice").replaceChildren(
    h(
      "div",
      { class: "fault", role: "alert" },
      h("p", { class: "fault-title" }, t(title)),
      h("p", {}, t(advice, params)),
      said,
      button,
    ),
  );
}

async function showRuns(lost) {
  document.title = `${t("all_runs")} · jilju`;
  const list = await api.json("/v1/jilju/runs");
  byId("runs").hidden = false;
  runs.draw(list, lost);
}

async function load() {
  try {
    if (runId === "") {
      await showRuns(null);
      return;
    }
    const run = await api.json(`/v1/jilju/runs/${encodeURIComponent(runId)}`, { quiet: story !== null }); // a poll asks nobody for a key
    drawNotice(null, load);
    const wasRunning = story?.isRunning ?? false;
    keepFocus(byId("main"), () => draw(run));
    if (run.state === "running") setTimeout(load, POLL_MS);
    else if (wasRunning) byId("status").textContent = t("run_ended");
  } catch (error) {
    if (error.code === undefined) throw error; // ours
    if (error.status === 404 && story === null) await showRuns(runId).catch((problem) => drawNotice(problem, load));
    else if (error.code === "invalid_api_key" && story !== null) drawNotice(error, async () => (await key.ask()) && load());
    else drawNotice(error, load);
  }
}

addEventListener("keydown", (event) => {
  if (event.key === "Escape" && at !== null) seek(null);
});
await load();
