// Recent runs: what there is to look at, the newest first, where no run was named or the named one is not there.

import { h } from "../dom.js";

export function createRunsView({ root, words }) {
  const { t, duration, integer } = words;
  const title = h("h1", {}, t("all_runs"));

  function line(run) {
    const when = new Intl.DateTimeFormat(words.language, { timeStyle: "medium" }).format(run.created * 1000);
    const read =
      run.cached_tokens > 0
        ? t("list_in_cached", { tokens: run.prompt_tokens, cached: run.cached_tokens })
        : t("list_in", { tokens: run.prompt_tokens });
    const figures = [when, read, t("list_out", { tokens: run.output_tokens }), duration(run.total_ms)];
    if (run.ttft_ms !== null) figures.push(t("list_ttft", { duration: duration(run.ttft_ms) }));
    if (run.state !== "completed") figures.push(t(`run_${run.state}`));
    const text = h(
      "span",
      { class: "list-text" },
      run.text.trim() === "" ? h("span", { class: "quiet-text" }, t("list_no_text")) : run.text,
    );
    return h(
      "li",
      {},
      h(
        "a",
        { class: "list-line", href: `/runs/${encodeURIComponent(run.id)}` },
        text,
        h("span", { class: "list-figures" }, figures.join(" · ")),
        h("span", { class: "list-id" }, run.id),
      ),
    );
  }

  return {
    /** `lost`: the id that was asked for and is not there, or null. */
    draw({ runs }, lost) {
      const isEmpty = runs.length === 0;
      const intro = lost !== null ? t(isEmpty ? "run_gone_alone" : "run_gone", { id: lost }) : isEmpty ? "" : t("recent_intro");
      const body = runs.length > 0 ? h("ol", { class: "list" }, ...runs.map(line)) : h("p", { class: "note" }, t("no_runs"));
      root.replaceChildren(title, h("p", { class: lost === null ? "lead" : "lead lost" }, intro), body);
      root.setAttribute("aria-label", t("all_runs"));
      if (runs.length > 0) root.append(h("p", { class: "note" }, t("num_runs", { runs: integer(runs.length) })));
    },
  };
}
