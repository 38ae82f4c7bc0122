// One problem wherever it was met: over steps and evaluations, and in two runs side by side.
"use strict";

{
  const AT_ONCE = 8;

  /** Every group of this problem in one run, in order of its sets. Reads all indices of the run, some at a time. */
  const meetings = async (run, id, tell) => {
    const found = new Array(run.sets.length).fill(null);
    let next = 0;
    let done = 0;
    const work = async () => {
      while (next < run.sets.length) {
        const at = next++;
        try {
          const index = await torl.index(run, run.sets[at]);
          const groups = index.problems.flatMap(([other], group) => (other === id ? [group] : []));
          found[at] = groups.map((group) => ({ index, group }));
        } catch {
          found[at] = []; // the list of steps says what cannot be read
        }
        tell(++done, run.sets.length);
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    return found.flat();
  };

  const reference = (index, row) => `${index.run.key}/${index.set.name}/${row}`;

  const find = (all, text) => {
    const [key, name, row] = (text || "").split("/");
    const met = all.find(({ index }) => index.run.key === key && index.set.name === name);
    return met && Number(row) < met.index.num ? { ...met, row: Number(row) } : null;
  };

  /** What is open at first: its newest step, which has tokens, rather than an evaluation. */
  const first = (met) => {
    if (!met.length) return null;
    const { index, group } = met.filter((m) => m.index.set.kind === "step").at(-1) || met.at(-1);
    return { index, group, row: index.rows[index.first[group]] };
  };

  const column = (side, run, met, open, state) => {
    const pane = torl.el("section.attempt-pane", { "aria-label": `Attempt on the ${side}` });
    const rows = met.map(({ index, group }) => {
      const link = (row) => torl.link({ [side]: reference(index, row) });
      return torl.el(
        "div.meeting",
        {},
        torl.el("a.when", { href: torl.link({ ...torl.atSet(index), group }, {}) }, index.set.title),
        torl.strip(index, group, { link, current: open?.index === index ? open.row : -1 }),
        torl.el("span.dim", {}, torl.tally(index, index.rows.subarray(index.first[group], index.first[group + 1]))),
      );
    });
    const others = torl.manifest.runs.map((other) =>
      torl.el("option", { value: other.key, selected: other.key === run.key }, other.name),
    );
    const choice = torl.el(
      "select",
      { "aria-label": `Run on the ${side}`, onchange: (e) => torl.go({ [`${side}run`]: e.target.value, [side]: null }) },
      others,
    );
    const body = rows.length ? rows : torl.el("p.dim", {}, "This run has not met the problem.");
    if (open) {
      const note = (changes) => torl.note(changes.mode ? { mode: changes.mode } : {});
      torl.drawAttempt(pane, open.index, open.row, { mode: state.mode }, note);
    }
    const where = open ? torl.el("p.dim", {}, `${open.index.set.title}, sample ${open.index.columns.sample[open.row]}`) : null;
    return torl.el("div.side", {}, torl.el("div.runs", {}, choice), torl.el("div.meetings", { tabindex: 0, role: "group", "aria-label": "Where it was met" }, body), where, pane);
  };

  /** The page of a problem: left and right are the same run, or two. */
  torl.drawMeetings = async function (box, state) {
    const { runs } = torl.manifest;
    const left = runs.find((r) => r.key === state.leftrun) || runs[0];
    const right = runs.find((r) => r.key === state.rightrun) || runs[1] || runs[0];
    const progress = torl.el("p.dim", { role: "status" }, "looking through the steps …");
    torl.set(box, progress);
    const tell = (done, all) => torl.set(progress, `looking through the steps: ${done} of ${all}`);
    const leftMet = await meetings(left, state.problem, tell);
    const rightMet = right === left ? leftMet : await meetings(right, state.problem, tell);
    if (torl.address().problem !== state.problem) return;
    const any = leftMet[0] || rightMet[0];
    if (!any) {
      torl.set(box, torl.el("p.note", {}, `No step holds a problem named ${state.problem}.`), back());
      return;
    }
    const openLeft = find(leftMet, state.left) || first(leftMet);
    const openRight = find(rightMet, state.right) || (right === left ? first(leftMet.slice(0, 1)) : first(rightMet));
    if (/[$\\]/.test(any.index.problems[any.group][1])) await torl.readable().catch(() => {});
    torl.set(
      box,
      back(),
      torl.drawProblem(any.index, any.group),
      torl.el("div.sides", {}, column("left", left, leftMet, openLeft, state), column("right", right, rightMet, openRight, state)),
    );
  };

  const back = () => torl.el("nav.steps", { "aria-label": "Back" }, torl.el("a.small", { href: torl.link({}, {}) }, "‹ all problems"));
}
