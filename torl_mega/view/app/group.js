// A problem and its attempts: equal ones folded, one of them open.
"use strict";

{
  /** Attempts that came to the same: answer, verdict, tool and ending. */
  const folds = (index, rows) => {
    const { columns } = index;
    const found = new Map();
    for (const row of rows) {
      const tool = columns.calls[row] ? (columns.tools[row] === 1 ? 1 : 2) : 0;
      const key = [columns.answer[row], torl.outcome(index, row), tool, columns.end[row]].join(" ");
      if (!found.has(key)) found.set(key, []);
      found.get(key).push(row);
    }
    const order = ["wrong", "none", "lost", "right"];
    const place = ([row]) => order.indexOf(torl.outcome(index, row));
    return [...found.values()].sort((a, b) => place(a) - place(b) || b.length - a.length);
  };

  const toolWord = (index, row) => {
    const { calls, tools } = index.columns;
    if (!calls[row]) return "no call";
    const failed = index.names.statuses.filter((_, place) => place && tools[row] & (1 << place)).map((s) => torl.WORDS[s] || s);
    return failed.length ? failed.join(", ") : torl.plural(calls[row], "call");
  };

  const line = (index, row, { link, current, often = 1 }) => {
    const facts = torl.factsOf(index, row);
    return torl.el(
      "a.attempt",
      { href: link(row), "aria-current": row === current ? "true" : null },
      torl.outcomeMark(facts.outcome),
      torl.el("span.answer", {}, facts.extracted ?? "–"),
      often > 1 ? torl.el("b.often", {}, `×${often}`) : torl.el("span.dim", {}, `sample ${facts.sample}`),
      torl.el("span.dim", {}, toolWord(index, row)),
      torl.el("span.dim", {}, torl.plural(facts.sampled, "token")),
      facts.end ? torl.el("span.chip.bad", {}, "out of budget") : null,
    );
  };

  /** Attempts by what they came to; a fold of several opens to all of them. */
  torl.drawFolds = function (index, group, { link, current = -1, pass = null }) {
    const rows = Array.from(index.rows.subarray(index.first[group], index.first[group + 1])).filter((row) => !pass || pass[row]);
    return torl.el(
      "div.folds",
      {},
      folds(index, rows).map((same) => {
        const shown = same.includes(current) ? current : same[0];
        if (same.length === 1) return line(index, shown, { link, current });
        const rest = torl.el("div.rest", { hidden: true }, same.map((row) => line(index, row, { link, current })));
        const toggle = torl.el("button.small", { type: "button", "aria-expanded": "false" }, `all ${same.length}`);
        toggle.addEventListener("click", () => {
          rest.hidden = !rest.hidden;
          toggle.setAttribute("aria-expanded", String(!rest.hidden));
        });
        return torl.el("div.fold", {}, torl.el("div.first", {}, line(index, shown, { link, current, often: same.length }), toggle), rest);
      }),
    );
  };

  /** Where the problem was met: its text, gold answer, origin. */
  torl.drawProblem = function (index, group, full) {
    const [id, problem, answer, source] = index.problems[group];
    const text = full?.problem ?? problem;
    return torl.el(
      "div.problem",
      {},
      torl.el("h2", { dir: "auto" }, globalThis.katex ? torl.withFormulas(text) : text),
      torl.el(
        "p.dim",
        {},
        torl.el("span.id", {}, id),
        source && !id.startsWith(source) ? ` · ${source}` : "",
        " · gold answer ",
        torl.el("b.gold", {}, full?.answer ?? answer),
      ),
    );
  };

  const neighbour = (items, at, by) => (at < 0 ? undefined : items[at + by]);

  /** The pane of one group. `items`: the groups of the list, for previous and next. */
  torl.drawGroup = async function (box, { index, group, sample, items, pass, state }) {
    const rows = index.rows.subarray(index.first[group], index.first[group + 1]);
    const hidden = pass && !rows.some((row) => pass[row]);
    const visible = hidden ? null : pass;
    let row = sample === undefined ? -1 : torl.rowOf(index, group, Number(sample));
    if (row < 0) row = folds(index, Array.from(rows).filter((r) => !visible || visible[r]))[0][0];
    const base = torl.atSet(index);
    const link = (r) => torl.link({ ...base, group, sample: index.columns.sample[r], token: null });
    const at = items.findIndex((item) => item.index === index && item.group === group);
    const step = (by, word) => {
      const other = neighbour(items, at, by);
      const target = other && torl.link({ ...torl.atSet(other.index), group: other.group, sample: null, token: null });
      return torl.el("a.small", { href: target, "aria-disabled": other ? null : "true", role: other ? null : "link" }, word);
    };
    const title = torl.el("div");
    const pane = torl.el("section.attempt-pane", { "aria-label": "Attempt" });
    const counts = torl.tally(index, rows);
    const signal = index.signal[group] || index.set.kind === "eval" ? null : torl.el("span.chip.quiet", {}, "zero signal: nothing to learn from");
    torl.set(
      box,
      torl.el(
        "nav.steps",
        { "aria-label": "Problems" },
        torl.el("a.small.back", { href: torl.link({ group: null, sample: null, token: null }) }, "‹ list"),
        step(-1, "‹ previous"),
        step(1, "next ›"),
        torl.el("a.small", { href: torl.link({ problem: index.problems[group][0], left: null, right: null }, {}) }, "this problem elsewhere"),
        torl.el("button.small", { type: "button", onclick: (e) => torl.copy(location.href, e.currentTarget) }, "copy link"),
      ),
      title,
      torl.el("p.tally", {}, torl.strip(index, group, { link, pass: visible, current: row }), torl.el("span.dim", {}, counts), signal),
      torl.drawFolds(index, group, { link, current: row, pass: visible }),
      pane,
    );
    torl.set(title, torl.drawProblem(index, group));
    const fresh = { ...torl.atSet(index), group, sample: index.columns.sample[row] };
    if (sample === undefined) torl.note(fresh);
    const attempt = await torl.drawAttempt(pane, index, row, state, (changes) => torl.note({ ...fresh, ...changes }));
    if (!attempt) return;
    if (/[$\\]/.test(attempt.problem)) await torl.readable().catch(() => {});
    torl.set(title, torl.drawProblem(index, group, attempt));
  };
}
