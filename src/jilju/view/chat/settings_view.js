// The settings sheet: one form over settings.js, with the server's default beside every field.
//
// Owns the dialog. Nothing is kept until it is all valid; each problem stands at its field.

import { h } from "../dom.js";
import { FIELDS, keepSettings, readSettings } from "./settings.js";

// The rest of the defaults in force, in this order; the page sets none of them, so it shows them only.
const ALSO_IN_FORCE = ["top_p", "top_k", "min_p", "repetition_penalty"];

/** `parts`: the elements {dialog, form, fields, open, close, clear, inForce, inForceList, inForceSource}. */
export function createSettingsView({ parts, store, words }) {
  const { dialog, form, fields, open, close, clear, inForce, inForceList, inForceSource } = parts;
  const { t } = words;
  const rows = new Map(FIELDS.map((field) => [field.name, createRow(field)]));
  fields.append(...[...rows.values()].map((row) => row.root));

  function createRow({ name, kind }) {
    const ids = { input: `setting-${name}`, help: `setting-${name}-help`, error: `setting-${name}-error` };
    const common = { id: ids.input, autocomplete: "off", "aria-describedby": `${ids.help} ${ids.error}` };
    const input =
      kind === "text"
        ? h("textarea", { ...common, rows: 5 })
        : h("input", { ...common, type: "text", inputmode: kind === "decimal" ? "decimal" : "text", spellcheck: "false" });
    const byDefault = h("span", { class: "field-default" });
    const help = h("p", { class: "field-help", id: ids.help }, `${t(`setting_${name}_help`)} `, byDefault);
    const error = h("p", { class: "field-error", id: ids.error });
    const label = h("label", { for: ids.input }, t(`setting_${name}`));
    return { input, byDefault, error, root: h("div", { class: "field" }, label, input, error, help) };
  }

  function drawProblems(problems) {
    for (const [name, { input, error }] of rows) {
      const found = problems[name];
      error.textContent = found ? t(found.problem, found.params) : "";
      input.setAttribute("aria-invalid", String(Boolean(found)));
    }
  }

  function defaultOf(name, model) {
    if (name === "temperature") return model?.defaults.temperature?.toString() ?? t("default_unknown");
    if (name === "maxTokens" && !model?.maxModelLen) return t("default_maxTokens_unknown");
    return t(`default_${name}`, { tokens: model?.maxModelLen ?? 0 });
  }

  function drawDefaults({ model }) {
    for (const [name, { byDefault }] of rows) byDefault.textContent = t("default_is", { value: defaultOf(name, model) });
    const defaults = model?.defaults ?? {};
    const known = ALSO_IN_FORCE.filter((name) => defaults[name] != null);
    inForce.hidden = known.length === 0;
    inForceList.replaceChildren(
      ...known.map((name) => h("div", {}, h("dt", {}, name), h("dd", {}, String(defaults[name])))),
    );
    inForceSource.textContent = defaults.source ? t("in_force_source", { source: defaults.source }) : "";
  }

  const texts = () => Object.fromEntries([...rows].map(([name, { input }]) => [name, input.value]));
  const limits = () => ({ maxModelLen: store.get().model?.maxModelLen ?? null });

  open.addEventListener("click", () => {
    const { settings } = store.get();
    for (const [name, { input }] of rows) input.value = settings[name] ?? "";
    drawProblems({});
    dialog.showModal();
    rows.get(FIELDS[0].name).input.focus();
  });
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // the backdrop
  });
  clear.addEventListener("click", () => {
    for (const { input } of rows.values()) input.value = "";
    drawProblems({});
    rows.get(FIELDS[0].name).input.focus();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const { values, problems } = readSettings(texts(), limits());
    drawProblems(problems);
    const first = FIELDS.find((field) => problems[field.name]);
    if (first) {
      rows.get(first.name).input.focus();
      return;
    }
    keepSettings(values);
    store.update({ settings: values });
    dialog.close();
  });
  store.subscribe(drawDefaults);
}
