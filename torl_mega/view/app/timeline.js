// A step over time: its phases, and what every attempt was doing.
"use strict";

{
  const HEIGHT = 20;
  const KINDS = ["generate", "tool", "grade"];

  /** Segments of one attempt: [kind, begin, end] in ms. `spans`: begin, then generate and tool by turns, then grade. */
  const segments = (spans) => {
    const parts = [];
    let at = spans[0];
    for (let i = 1; i < spans.length; i++) {
      const kind = i === spans.length - 1 ? 2 : (i - 1) % 2;
      if (spans[i] > 0) parts.push([kind, at, at + spans[i]]);
      at += spans[i];
    }
    return parts;
  };

  const total = (spans) => spans.slice(1).reduce((a, b) => a + b, 0);

  const ORDERS = {
    begin: ["as they began", (spans) => spans[0]],
    end: ["as they ended", (spans) => spans[0] + total(spans)],
    longest: ["longest first", (spans) => -total(spans)],
  };

  const place = (node, begin, end, whole) => {
    node.style.left = `${(100 * begin) / whole}%`;
    node.style.width = `${Math.max((100 * (end - begin)) / whole, 0.15)}%`;
    return node;
  };

  const phaseBar = (phases, whole) => {
    const bar = torl.el("div.bar.phases", { role: "img", "aria-label": "phases of the step" });
    let at = 0;
    for (const [name, key] of [["rollout", "rollout_s"], ["train", "train_s"], ["sync", "sync_s"]]) {
      const ms = (phases[key] || 0) * 1000;
      bar.append(place(torl.el(`span.seg.${name}`, { title: `${name} ${torl.seconds(ms / 1000)}` }), at, at + ms, whole));
      at += ms;
    }
    return bar;
  };

  const legend = (phases) =>
    torl.el(
      "p.legend",
      {},
      KINDS.map((kind) => torl.el("span", {}, torl.el(`i.swatch.${kind}`), ` ${kind} `)),
      phases
        ? ["rollout", "train", "sync"].map((name) =>
            torl.el("span", {}, torl.el(`i.swatch.${name}`), ` ${name} ${torl.seconds(phases[`${name}_s`])} `),
          )
        : null,
    );

  const sums = (spans) => {
    const by = [0, 0, 0];
    for (const one of spans) for (const [kind, begin, end] of segments(one)) by[kind] += end - begin;
    const all = by[0] + by[1] + by[2] || 1;
    return KINDS.map((kind, k) => `${kind} ${Math.round((100 * by[k]) / all)} %`).join(", ");
  };

  /** When the attempts ran that the filters leave: rows in order, the begin of the step, the length of all in ms. */
  const measure = (index, pass, orderOf) => {
    const { phases } = index.set;
    const all = index.columns.spans || [];
    const rows = Array.from(all.keys()).filter((row) => all[row] && pass[row]);
    const zero = all.reduce((least, spans) => (spans ? Math.min(least, spans[0]) : least), Infinity);
    const ended = rows.reduce((most, row) => Math.max(most, all[row][0] - zero + total(all[row])), 0);
    const phased = phases ? ["rollout_s", "train_s", "sync_s"].reduce((sum, key) => sum + (phases[key] || 0) * 1000, 0) : 0;
    rows.sort((a, b) => orderOf(all[a]) - orderOf(all[b]) || a - b);
    return { all, rows, zero, whole: Math.max(ended, phased, 1), there: all.some((spans) => spans) };
  };

  const ruler = (whole) =>
    torl.el("div.bar.ruler", { "aria-hidden": "true" }, [0, 0.25, 0.5, 0.75, 1].map((share) => {
      const mark = torl.el("span", {}, torl.seconds((share * whole) / 1000));
      mark.style.left = `${share * 100}%`;
      return mark;
    }));

  const attemptBar = (index, row, { all, zero, whole }) => {
    const group = index.columns.group[row];
    const sample = index.columns.sample[row];
    const outcome = torl.outcome(index, row);
    const words = segments(all[row]).map(([kind, a, b]) => `${KINDS[kind]} ${torl.seconds((b - a) / 1000)}`).join(", ");
    const href = torl.link({ ...torl.atSet(index), view: null, order: null, group, sample });
    const label = `${index.problems[group][0]}, sample ${sample}, ${torl.OUTCOMES[outcome]}: ${words}`;
    const bar = torl.el(`a.bar.${outcome}`, { href, title: words, "aria-label": label });
    for (const [kind, a, b] of segments(all[row])) bar.append(place(torl.el(`span.seg.${KINDS[kind]}`), a - zero, b - zero, whole));
    return bar;
  };

  /** The timeline of the set of `index`, of the attempts that the filters leave. */
  torl.drawTimeline = function (box, index, pass, state) {
    const { phases } = index.set;
    const order = ORDERS[state.order] || ORDERS.begin;
    const measured = measure(index, pass, order[1]);
    const { all, rows, whole, there } = measured;
    const choice = torl.el(
      "select",
      { "aria-label": "Order of the attempts", onchange: (e) => torl.go({ order: e.target.value }) },
      Object.entries(ORDERS).map(([key, [name]]) => torl.el("option", { value: key, selected: ORDERS[key] === order }, name)),
    );
    const said = `${torl.plural(rows.length, "attempt")}: ${sums(rows.map((row) => all[row]))}`;
    const missing = `When these attempts ran was not recorded${phases ? "; the bar shows the phases of the step one after the other" : ""}.`;
    const scroll = torl.el("div.scroll", { tabindex: 0, role: "group", "aria-label": "What each attempt did, over time" });
    torl.set(
      box,
      there ? torl.el("div.listhead", {}, torl.el("span", {}, said), choice) : torl.el("p.note", {}, missing),
      there || phases ? [legend(phases), ruler(whole)] : null,
      phases ? phaseBar(phases, whole) : null,
      scroll,
    );
    if (!there) return;
    const draw = (i) => attemptBar(index, rows[i], measured);
    torl.virtual(scroll, { num: rows.length, height: HEIGHT, label: "Attempts over time", draw });
  };
}
