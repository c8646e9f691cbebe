// Sums: memory by owner, money and energy, calls: each shown as the sum that it is, with a sign that it adds up.
//
// Owns these three panels. What is not known (of a recorded file, of a machine without a counter) is said in words.

import { h } from "../dom.js";
import { term } from "../term.js";
import { bar } from "./bar.js";
import { setText } from "./rows.js";

const LAST_OWNERS = ["unattributed", "not_resident"];
const OWNERS = ["weights", "kv", "workspace", "log", "start", "run store", "calls", "history", "grammars", "prefix index", ...LAST_OWNERS];
const PROCESSES = ["engine", "server", "gpu"];
const UNATTRIBUTED_MAX = 0.05; // of a process; above it the line warns
const COST_LINES = ["requests", "idle", "load", "failed", "recompute", "host"];
const COST_LOOKS = { requests: "accent", idle: "wait", load: "others", failed: "fault", recompute: "cached", host: "host" };
const ENDINGS = ["completed", "cancelled", "deadline", "shed", "failed", "live"];
const ROUNDING = 1e-6; // of a sum of floats

const total = (list, of) => list.reduce((sum, each) => sum + of(each), 0);

export function createMemoryView({ root, words }) {
  const { t, bytes } = words;
  let drawn = "";

  const signed = (count) => (count < 0 ? `−${bytes(-count)}` : bytes(count));

  function nameOf({ owner, is_file: isFile }) {
    const name = OWNERS.includes(owner) ? t(`owner_${owner.replace(" ", "_")}`) : owner;
    if (LAST_OWNERS.includes(owner)) return term(owner, name);
    return isFile ? h("span", {}, name, " ", term("file_pages", t("file_pages"))) : name;
  }

  function line(owned, resident, held) {
    const { owner, bytes: count, is_file: isFile } = owned;
    const isHigh = owner === "unattributed" && count > UNATTRIBUTED_MAX * resident;
    const look = isFile ? "file" : owner === "unattributed" ? "wait" : "accent";
    const share = count >= 0 && held > 0 ? words.share(count / held) : "";
    const cells = [signed(count), share].map((text) => h("td", {}, text));
    const picture = h("td", { class: "row-bar" }, bar([{ look, value: Math.max(0, count) }], held, 0));
    return h("tr", { class: isHigh ? "fault-text" : null }, h("th", { scope: "row" }, nameOf(owned)), ...cells, picture);
  }

  function table(process, owners) {
    const resident = total(owners, (each) => each.bytes);
    const held = total(owners, (each) => Math.max(0, each.bytes)); // what was promised may be more than what is there
    const rank = ({ owner, bytes: count }) => (LAST_OWNERS.includes(owner) ? -1 - LAST_OWNERS.indexOf(owner) : count);
    const shown = owners.filter(({ owner, bytes: count }) => owner !== "not_resident" || count !== 0);
    const sorted = shown.sort((one, other) => rank(other) - rank(one));
    const heads = ["owner", "bytes", "share"].map((key) => h("th", { scope: "col" }, t(`memory_${key}`)));
    return h(
      "table",
      { class: "sum-table" },
      h("caption", {}, PROCESSES.includes(process) ? t(`process_${process}`) : process),
      h("thead", { class: "visually-hidden" }, h("tr", {}, ...heads, h("td", {}))),
      h("tbody", {}, ...sorted.map((each) => line(each, resident, held))),
      h("tfoot", {}, h("tr", {}, h("th", { scope: "row" }, t(process === "gpu" ? "memory_used" : "memory_sum")), h("td", {}, bytes(resident)), h("td", {}), h("td", {}))),
    );
  }

  return ({ memory, is_live: isLive }) => {
    const key = JSON.stringify([memory, isLive]);
    if (key === drawn) return;
    drawn = key;
    if (memory === null) root.replaceChildren(h("p", { class: "quiet-text" }, t(isLive ? "memory_none_now" : "memory_none")));
    else {
      const processes = [...new Set(memory.map((each) => each.process))];
      root.replaceChildren(...processes.map((process) => table(process, memory.filter((each) => each.process === process))));
    }
  };
}

export function createCostView({ root, words, format }) {
  const { t } = words;
  const price = h("p", { class: "quiet-text" });
  const strip = h("p", { class: "strip" });
  const cells = () => ({ time: h("td", {}), share: h("td", {}), amount: h("td", { class: "amount" }) });
  const lines = new Map([...COST_LINES, "total"].map((name) => [name, cells()]));
  const row = (name, head) => h("tr", {}, head, ...Object.values(lines.get(name)));
  const rows = COST_LINES.map((name) => {
    const swatch = h("span", { class: `swatch look-${COST_LOOKS[name]}`, "aria-hidden": "true" });
    return row(name, h("th", { scope: "row" }, swatch, term(`cost_${name}`, t(`cost_${name}`))));
  });
  const heads = ["line", "time", "share", "amount"].map((name) => h("th", { scope: "col", class: name }, t(`cost_${name}`)));
  const table = h(
    "table",
    { class: "sum-table" },
    h("caption", { class: "visually-hidden" }, t("cost_title")),
    h("thead", { class: "visually-hidden" }, h("tr", {}, ...heads)),
    h("tbody", {}, ...rows),
    h("tfoot", {}, row("total", h("th", { scope: "row" }, t("cost_sum")))),
  );
  const [perToken, keys, energy] = [h("p", { class: "small" }), h("p", { class: "quiet-text" }), h("p", { class: "small" })];
  const none = h("p", { class: "quiet-text", hidden: true });
  const money = h("div", { class: "stack" }, price, strip, table, perToken, keys);
  root.append(money, none, energy);

  // the option as one word, which no line end may cut
  const [before, after] = t("price_none", { option: "\n" }).split("\n");
  const withoutPrice = [before, h("code", { class: "option" }, "--price"), after];

  function drawLine(name, cost) {
    const { machine_s: seconds, currency } = cost;
    const { time, share, amount } = lines.get(name);
    setText(time, format.long(seconds[name]));
    setText(share, name !== "total" && seconds.total > 0 ? words.share(seconds[name] / seconds.total) : "");
    setText(amount, words.money(cost[name], currency, cost.total));
  }

  function drawMoney({ cost }) {
    const { machine_s: seconds, currency } = cost;
    money.classList.toggle("has-no-price", cost.is_default);
    if (cost.is_default) price.replaceChildren(...withoutPrice);
    else setText(price, t("price", { price: words.money(cost.price_per_hour, currency) }));
    for (const name of lines.keys()) drawLine(name, cost);
    const gap = (sums) => Math.abs(total(COST_LINES, (name) => sums[name]) - sums.total);
    const isTrue = [seconds, cost].every((sums) => gap(sums) <= ROUNDING * Math.max(1, sums.total));
    setText(lines.get("total").share, isTrue ? "✓" : "≠");
    table.querySelector("tfoot").classList.toggle("fault-text", !isTrue);
    const parts = COST_LINES.map((name) => ({ look: COST_LOOKS[name], value: seconds[name], title: t(`cost_${name}`) }));
    strip.replaceChildren(bar(parts, seconds.total, 0));
    perToken.hidden = seconds.per_million_output_tokens === null;
    if (!perToken.hidden) {
      const time = format.long(seconds.per_million_output_tokens);
      const paid = cost.is_default ? null : cost.per_million_output_tokens;
      const amount = paid === null ? "" : `, ${words.money(paid, currency)}`;
      setText(perToken, t("cost_per_million", { time, amount }));
    }
    const named = Object.entries(seconds.by_key).filter(([key]) => key !== ""); // that of a server without keys
    keys.hidden = named.length === 0;
    setText(keys, named.map(([key, time]) => `${key} ${format.long(time)}`).join(" · "));
  }

  const [energyTerm, energyText] = [term("energy", t("energy")), h("span", {})];
  function drawEnergy({ energy: used }) {
    if (used === null) {
      energy.replaceChildren(h("span", { class: "quiet-text" }, t("energy_none")));
      return;
    }
    if (energyTerm.parentNode !== energy) energy.replaceChildren(energyTerm, " ", energyText);
    const rest = Math.max(0, used.joules - used.requests_joules - used.idle_joules); // loading, host, failed steps
    const parts = { all: used.joules, requests: used.requests_joules, idle: used.idle_joules, rest };
    const written = Object.fromEntries(Object.entries(parts).map(([name, value]) => [name, words.joules(value)]));
    const each = used.joules_per_output_token;
    const perOutput = each === null ? "" : ` ${t("energy_per_token", { joules: words.joules(each) })}`;
    setText(energyText, `${t("energy_text", { ...written, source: used.source })}${perOutput}`);
  }

  return (frame) => {
    money.hidden = frame.cost === null;
    none.hidden = frame.cost !== null;
    setText(none, t(frame.is_live ? "cost_none_now" : "cost_none"));
    energy.hidden = !frame.is_live && frame.energy === null;
    if (frame.cost) drawMoney(frame);
    drawEnergy(frame);
  };
}

export function createCallsView({ root, words }) {
  const { t, integer } = words;
  const figures = new Map();
  const figure = (name) => {
    figures.set(name, h("b", {}));
    return figures.get(name);
  };
  const apart = (name) => [figure(name), " ", term(name, t(`calls_${name}`))];
  const parts = ENDINGS.map((name) => h("li", { "data-name": name }, figure(name), " ", t(`calls_${name}`)));
  const sign = h("span", {});
  root.append(
    h("p", {}, figure("accepted"), " ", t("calls_accepted"), " = "),
    h("ul", { class: "calls" }, ...parts),
    sign,
    h("p", { class: "calls-apart" }, ...apart("refused"), " · ", ...apart("restarts")),
  );

  return ({ counts }) => {
    for (const [name, element] of figures) setText(element, integer(counts[name]));
    const isTrue = total(ENDINGS, (name) => counts[name]) === counts.accepted;
    setText(sign, t(isTrue ? "calls_true" : "calls_false"));
    sign.classList.toggle("fault-text", !isTrue);
    for (const item of parts) item.classList.toggle("is-zero", counts[item.dataset.name] === 0);
  };
}
