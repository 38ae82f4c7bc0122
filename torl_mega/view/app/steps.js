// All steps and evaluations of a run, and what could not be read of them.
"use strict";

{
  const bar = (set) => {
    const mixed = set.groups - set.solved - set.failed;
    const parts = [["mixed", mixed], ["failed", set.failed], ["solved", set.solved]];
    const label = parts.map(([name, n]) => `${n} ${name}`).join(", ");
    const node = torl.el("span.stack", { role: "img", "aria-label": label, title: label });
    for (const [name, n] of parts) {
      const part = torl.el(`i.${name}`);
      part.style.flexGrow = String(n);
      node.append(part);
    }
    return node;
  };

  const row = (run, set) =>
    torl.el(
      "tr",
      {},
      torl.el("th", { scope: "row" }, torl.el("a", { href: torl.link({ ...torl.atOf(run, set) }, {}) }, set.title)),
      torl.el("td", {}, bar(set)),
      torl.el("td.n", {}, set.groups),
      torl.el("td.n", {}, set.attempts === set.recorded ? torl.count(set.attempts) : `${torl.count(set.attempts)} of ${torl.count(set.recorded)}`),
      torl.el("td.n", {}, torl.number(set.accuracy)),
      torl.el("td.n", {}, torl.signed(set.reward)),
      torl.el("td.n", {}, torl.number(set.called, 2)),
      torl.el("td.n", {}, torl.number(set.length, 0)),
      torl.el("td.n", {}, torl.seconds(set.phases?.step_s)),
      torl.el("td", {}, set.faults ? torl.el("span.chip.bad", {}, torl.plural(set.faults, "fault")) : ""),
    );

  const HEADS = ["", "problems: mixed, failed, solved", "problems", "attempts", "accuracy", "mean reward", "called the tool", "tokens", "time", ""];

  /** The table of one run's sets. */
  torl.drawSteps = function (box, run) {
    const damaged = run.sets.filter((set) => set.faults);
    torl.set(
      box,
      damaged.length
        ? torl.el(
            "div.note",
            { role: "note" },
            `${torl.plural(damaged.reduce((sum, set) => sum + set.faults, 0), "line or file", )} could not be read:`,
            torl.el("ul", {}, damaged.map((set) => torl.el("li", {}, set.first_fault, set.faults > 1 ? ` (and ${set.faults - 1} more)` : ""))),
          )
        : null,
      torl.el(
        "div.scroll.wide",
        { tabindex: 0, role: "region", "aria-label": "Steps and evaluations" },
        torl.el(
          "table",
          {},
          torl.el("thead", {}, torl.el("tr", {}, HEADS.map((h) => (h ? torl.el("th", { scope: "col" }, h) : torl.el("td"))))),
          torl.el("tbody", {}, run.sets.map((set) => row(run, set))),
        ),
      ),
    );
  };

  /** What could not be read of a set, above its list. */
  torl.drawFaults = function (index) {
    if (!index.set.faults) return null;
    const named = index.faults.slice(0, 20);
    return torl.el(
      "details.note",
      {},
      torl.el("summary", {}, `${torl.plural(index.set.faults, "fault")} in this file; what can be read is shown`),
      torl.el("ul", {}, named.map((text) => torl.el("li", {}, text))),
      index.set.faults > named.length ? torl.el("p", {}, `and ${index.set.faults - named.length} more`) : null,
    );
  };
}
