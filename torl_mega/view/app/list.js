// Long lists of which only what can be seen is drawn, and the strips of outcomes in them.
"use strict";

{
  const BEYOND = 6; // rows drawn above and below

  /** A list of `num` rows of `height` pixels in `box`, which scrolls. `draw(i)` gives the element of row i. */
  torl.virtual = function (box, { num, height, draw, label }) {
    const list = torl.el("ol.virtual", { "aria-label": label });
    list.style.height = `${num * height}px`;
    let first = -1;
    let last = -1;
    const update = () => {
      const from = Math.max(Math.floor(box.scrollTop / height) - BEYOND, 0);
      const to = Math.min(Math.ceil((box.scrollTop + box.clientHeight) / height) + BEYOND, num);
      if (from === first && to === last) return;
      first = from;
      last = to;
      const focused = document.activeElement?.closest?.(".virtual > li")?.dataset.row;
      const rows = [];
      for (let i = from; i < to; i++) {
        const row = torl.el("li", { "data-row": i, "aria-setsize": num, "aria-posinset": i + 1 }, draw(i));
        row.style.top = `${i * height}px`;
        row.style.height = `${height}px`;
        rows.push(row);
      }
      list.replaceChildren(...rows);
      if (focused !== undefined) list.querySelector(`[data-row="${focused}"] a`)?.focus({ preventScroll: true });
    };
    const show = (i) => {
      if (i < 0) return;
      const top = i * height;
      if (top < box.scrollTop || top + height > box.scrollTop + box.clientHeight) {
        box.scrollTop = Math.max(top - box.clientHeight / 3, 0);
      }
      update();
    };
    box.onscroll = update;
    box.onkeydown = (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      const row = event.target.closest?.("li")?.dataset.row;
      if (!step || row === undefined) return;
      const next = Number(row) + step;
      if (next < 0 || next >= num) return;
      event.preventDefault();
      show(next);
      list.querySelector(`[data-row="${next}"] a`)?.focus({ preventScroll: true });
    };
    box.replaceChildren(list);
    update();
    return { update: () => ((first = -1), update()), show };
  };

  const MOST_TICKS = 64;

  torl.outcome = function (index, row) {
    if (index.columns.correct[row]) return "right";
    const grade = index.names.grades[index.columns.grade[row]];
    return grade === "ok" ? "wrong" : grade === "no_answer" ? "none" : "lost";
  };

  const OUTCOMES = { right: "correct", wrong: "wrong", none: "no answer", lost: "not judged" };
  torl.OUTCOMES = OUTCOMES;

  /** How attempts ended, in words: "5 correct, 11 wrong". */
  torl.tally = function (index, rows) {
    const counts = {};
    for (const row of rows) {
      const outcome = torl.outcome(index, row);
      counts[outcome] = (counts[outcome] || 0) + 1;
    }
    return Object.entries(OUTCOMES)
      .filter(([outcome]) => counts[outcome])
      .map(([outcome, word]) => `${counts[outcome]} ${word}`)
      .join(", ");
  };

  /** A mark for every attempt of a group, in order. `pass`: those that the filters leave; `link(row)` makes them links. */
  torl.strip = function (index, group, { pass = null, link = null, current = -1 } = {}) {
    const rows = index.rows.subarray(index.first[group], index.first[group + 1]);
    const shown = link ? rows : rows.subarray(0, MOST_TICKS);
    const marks = Array.from(shown, (row) => {
      const outcome = torl.outcome(index, row);
      const failed = index.columns.tools[row] > 1 ? ".failed" : "";
      const off = pass && !pass[row] ? ".off" : "";
      const name = `i.tick.${outcome}${failed}${off}`;
      if (!link) return torl.el(name);
      const sample = index.columns.sample[row];
      return torl.el(
        "a.mark",
        {
          href: link(row),
          "aria-label": `sample ${sample}, ${OUTCOMES[outcome]}${failed ? ", a program failed" : ""}`,
          "aria-current": row === current ? "true" : null,
        },
        torl.el(name),
      );
    });
    const more = rows.length - shown.length;
    const attributes = link ? {} : { role: "img", "aria-label": torl.tally(index, rows) };
    return torl.el("span.strip", attributes, marks, more > 0 ? torl.el("span.dim", {}, `+${more}`) : null);
  };

  // ---------------------------------------------------------------------------------------------- order

  const kind = (index, g) => {
    const all = index.first[g + 1] - index.first[g];
    return index.right[g] === all ? 2 : index.right[g] ? 0 : 1; // mixed, failed, solved
  };

  const rate = (index, g) => index.right[g] / (index.first[g + 1] - index.first[g]);

  const meanLength = (index, g) => {
    let sum = 0;
    for (let k = index.first[g]; k < index.first[g + 1]; k++) sum += index.columns.sampled[index.rows[k]];
    return sum / (index.first[g + 1] - index.first[g]);
  };

  const SORTS = {
    signal: ["mixed and failed first", ({ index, group }) => kind(index, group) + rate(index, group) / 2],
    recorded: ["as collected", () => 0],
    hardest: ["hardest first", ({ index, group }) => rate(index, group)],
    longest: ["longest first", ({ index, group }) => -meanLength(index, group)],
  };
  torl.SORTS = SORTS;

  const ATTEMPT_SORTS = {
    signal: ({ index, row }) => -Math.abs(index.columns.advantage ? index.columns.advantage[row] : 0),
    recorded: () => 0,
    hardest: ({ index, row }) => rate(index, index.columns.group[row]),
    longest: ({ index, row }) => -index.columns.sampled[row],
  };

  const sorted = (items, keyOf) => {
    const keys = Float64Array.from(items, keyOf);
    const order = Uint32Array.from(items.keys());
    order.sort((a, b) => keys[a] - keys[b] || a - b);
    return Array.from(order, (i) => items[i]);
  };

  /** The groups with attempts that pass, in the order asked for. */
  torl.groupsShown = function ({ indices }, { passes }, sort) {
    const items = [];
    indices.forEach((index, s) => {
      for (let g = 0; g < index.problems.length; g++) {
        let num = 0;
        for (let k = index.first[g]; k < index.first[g + 1]; k++) num += passes[s][index.rows[k]];
        if (num) items.push({ index, group: g, num, pass: passes[s] });
      }
    });
    return sorted(items, (SORTS[sort] || SORTS.signal)[1]);
  };

  torl.attemptsShown = function ({ indices }, { passes }, sort) {
    const items = [];
    indices.forEach((index, s) => {
      for (let row = 0; row < index.num; row++) if (passes[s][row]) items.push({ index, row });
    });
    return sorted(items, ATTEMPT_SORTS[sort] || ATTEMPT_SORTS.signal);
  };
}
