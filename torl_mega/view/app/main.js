// The page: its head, its panes, and what is drawn for an address.
"use strict";

{
  const POLL_MS = 2000;
  const GROUP_HEIGHT = 62;
  const ATTEMPT_HEIGHT = 34;
  const VIEWS = { problems: "Problems", attempts: "Attempts", timeline: "Timeline", steps: "Steps" };
  const AT_ONCE = 8;

  const panes = {};
  let drawn = {}; // what the panes show
  let prepared = null; // indices with their filters
  let serial = 0;

  // ---------------------------------------------------------------------------------------------- addresses of sets

  /** The part of an address that names a set. */
  torl.atOf = (run, set) => ({
    run: run === torl.manifest.runs[0] ? null : run.key,
    step: set.kind === "step" ? set.step : null,
    eval: set.kind === "eval" ? set.name.replace(/^eval_/, "") : null,
  });
  torl.atSet = (index) => torl.atOf(index.run, index.set);

  const runOf = (state) => torl.manifest.runs.find((run) => run.key === state.run) || torl.manifest.runs[0];

  const setOf = (run, state) => {
    if (state.eval !== undefined) return run.sets.find((set) => set.name === `eval_${state.eval}`);
    if (state.step !== undefined) return run.sets.find((set) => set.kind === "step" && String(set.step) === state.step);
    const opened = run.sets.find((set) => set.name === torl.manifest.open);
    return opened || run.sets.filter((set) => set.kind === "step").at(-1) || run.sets[0];
  };

  const setsOf = (run, state) => {
    if (state.step === "all") return run.sets.filter((set) => set.kind === "step");
    const set = setOf(run, state);
    return set ? [set] : [];
  };

  // ---------------------------------------------------------------------------------------------- head

  const setLink = (run, set, state) => torl.link({ ...torl.atOf(run, set), group: null, sample: null, token: null }, state);

  const beside = (run, current, by) => {
    const same = run.sets.filter((set) => set.kind === (current?.kind || "step"));
    return same[same.indexOf(current) + by];
  };

  const arrow = (word, label, run, set, state) =>
    torl.el("a.arrow", { href: set ? setLink(run, set, state) : null, role: "link", "aria-label": label, "aria-disabled": set ? null : "true" }, word);

  const head = (run, state) => {
    const current = state.step === "all" ? null : setOf(run, state);
    const { runs } = torl.manifest;
    const option = (set) => torl.el("option", { value: set.name, selected: set === current }, set.faults ? `${set.title} (damaged)` : set.title);
    const steps = run.sets.filter((set) => set.kind === "step");
    const evals = run.sets.filter((set) => set.kind === "eval");
    const choose = (event) => {
      const set = run.sets.find((s) => s.name === event.target.value);
      location.hash = set ? setLink(run, set, torl.address()) : torl.link({ step: "all", eval: null, group: null, sample: null, token: null });
    };
    const numFaults = runs.reduce((sum, r) => sum + r.sets.reduce((s, set) => s + set.faults, 0), 0);
    const view = state.problem ? null : state.view || "problems";
    torl.set(
      panes.head,
      torl.el("h1", {}, runs.length > 1
        ? torl.el(
            "select",
            { "aria-label": "Run", onchange: (e) => torl.go({ run: e.target.value === runs[0].key ? null : e.target.value }, { view: state.view }) },
            runs.map((r) => torl.el("option", { value: r.key, selected: r === run }, r.name)),
          )
        : run.name),
      torl.el(
        "div.where",
        {},
        arrow("‹", "previous", run, current && beside(run, current, -1), state),
        torl.el(
          "select",
          { "aria-label": "Step or evaluation", onchange: choose },
          steps.length > 1 ? torl.el("option", { value: "", selected: state.step === "all" }, `all ${steps.length} steps`) : null,
          torl.el("optgroup", { label: "Training" }, steps.map(option)),
          evals.length ? torl.el("optgroup", { label: "Evaluations" }, evals.map(option)) : null,
        ),
        arrow("›", "next", run, current && beside(run, current, 1), state),
      ),
      torl.el(
        "nav.views",
        { "aria-label": "Views" },
        Object.entries(VIEWS).map(([key, name]) =>
          torl.el("a", { href: torl.link({ view: key === "problems" ? null : key, problem: null, left: null, right: null, group: null, sample: null, token: null }), "aria-current": key === view ? "page" : null }, name),
        ),
      ),
      torl.manifest.follow ? torl.el("span.live", { role: "status" }, torl.lost ? "the run's page is no longer served" : "following") : null,
      numFaults ? torl.el("a.chip.bad", { href: torl.link({ view: "steps", problem: null, group: null }) }, `${torl.plural(numFaults, "fault")} in the files`) : null,
      run.note ? torl.el("p.note", {}, run.note) : null,
    );
    document.title = `${run.name} · ${current ? current.title : "torl view"}`;
  };

  // ---------------------------------------------------------------------------------------------- list

  const tiles = (run, set, indices, result) => {
    let right = 0;
    let called = 0;
    let tokens = 0;
    indices.forEach(({ columns, num }, s) => {
      for (let i = 0; i < num; i++) {
        if (!result.passes[s][i]) continue;
        right += columns.correct[i];
        called += columns.calls[i] ? 1 : 0;
        tokens += columns.sampled[i];
      }
    });
    const all = indices.reduce((sum, index) => sum + index.num, 0);
    const of = (sum, digits) => (result.num ? torl.number(sum / result.num, digits) : "–");
    const recorded = set && set.recorded > set.attempts ? ` (${torl.count(set.recorded)} were recorded)` : "";
    return torl.el(
      "p.sums",
      { role: "status" },
      torl.el("b", {}, result.num === all ? torl.plural(all, "attempt") : `${torl.count(result.num)} of ${torl.plural(all, "attempt")}`),
      `${recorded} · accuracy ${of(right)} · called the tool ${of(called, 2)} · ${of(tokens, 0)} tokens each`,
    );
  };

  const groupRow = (item, state, many) => {
    const { index, group, num } = item;
    const size = index.first[group + 1] - index.first[group];
    const [id, problem] = index.problems[group];
    const zero = !index.signal[group] && index.set.kind === "step";
    const notes = [many && index.set.title, num < size && `${num} shown`, zero && "zero signal"];
    const here = drawn.group === `${index.set.name}/${group}`;
    return torl.el(
      "a.group",
      { href: torl.link({ ...torl.atSet(index), group, sample: null, token: null }), "aria-current": here ? "true" : null },
      torl.el("span.line", {}, torl.el("span.title", { dir: "auto" }, problem || id), torl.el("b.rate", {}, `${index.right[group]}/${size}`)),
      torl.el(
        "span.line",
        {},
        torl.strip(index, group, { pass: item.pass }),
        torl.el("span.dim", {}, notes.filter(Boolean).join(" · ")),
      ),
    );
  };

  const attemptRow = ({ index, row }, many) => {
    const { group, sample, reward, sampled } = index.columns;
    const outcome = torl.outcome(index, row);
    return torl.el(
      "a.row",
      { href: torl.link({ ...torl.atSet(index), group: group[row], sample: sample[row], token: null }) },
      torl.el("span.tickbox", {}, torl.el(`i.tick.${outcome}${index.columns.tools[row] > 1 ? ".failed" : ""}`, { role: "img", "aria-label": torl.OUTCOMES[outcome] })),
      torl.el("span.title", { dir: "auto" }, index.problems[group[row]][1]),
      torl.el("span.dim", {}, reward ? torl.signed(reward[row]) : "", ` · ${sampled[row]} tok`),
    );
  };

  const sorting = (state) =>
    torl.el(
      "select",
      { "aria-label": "Order", onchange: (e) => torl.go({ sort: e.target.value === "signal" ? null : e.target.value }) },
      Object.entries(torl.SORTS).map(([key, [name]]) => torl.el("option", { value: key, selected: key === (state.sort || "signal") }, name)),
    );

  const search = (state) => {
    let timer = 0;
    const input = torl.el("input", {
      type: "search",
      placeholder: "search problems",
      "aria-label": "Search problems and gold answers",
      value: state.q || "",
      oninput: () => {
        clearTimeout(timer);
        timer = setTimeout(() => torl.go({ q: input.value }), 150);
      },
    });
    return input;
  };

  const drawList = (run, set, state, result) => {
    const many = prepared.indices.length > 1;
    const begun = performance.now();
    const clear = torl.link(torl.cleared(prepared));
    const nothing = () =>
      torl.el("p.nothing", {}, prepared.indices.some((i) => i.num) ? ["No attempt passes these filters. ", torl.el("a", { href: clear }, "Clear them")] : "Nothing was recorded here.");
    const filtered = result.chosen.some(Boolean) || state.q;
    const focused = document.activeElement?.dataset?.facet;
    torl.set(
      panes.filters,
      torl.el("summary", {}, filtered ? "Filters (on)" : "Filters"),
      filtered ? torl.el("a.small.clear", { href: clear }, "clear all") : null,
      torl.drawFilters(prepared, result, state),
    );
    if (focused) panes.filters.querySelector(`[data-facet="${CSS.escape(focused)}"]`)?.focus();
    torl.set(panes.faults, prepared.indices.map(torl.drawFaults), tiles(run, set, prepared.indices, result));
    const attempts = state.view === "attempts";
    panes.items = torl.groupsShown(prepared, result, state.sort);
    const items = attempts ? torl.attemptsShown(prepared, result, state.sort) : panes.items;
    if (!items.length) {
      panes.virtual = null;
      torl.set(panes.scroll, nothing());
    } else {
      panes.virtual = torl.virtual(panes.scroll, {
        num: items.length,
        height: attempts ? ATTEMPT_HEIGHT : GROUP_HEIGHT,
        label: attempts ? "Attempts" : "Problems",
        draw: (i) => (attempts ? attemptRow(items[i], many) : groupRow(items[i], state, many)),
      });
    }
    torl.lastFilterMs = performance.now() - begun;
  };

  const loadAll = async (run, sets, mine) => {
    const indices = new Array(sets.length);
    const failures = [];
    let next = 0;
    const work = async () => {
      while (next < sets.length && mine === serial) {
        const at = next++;
        try {
          indices[at] = await torl.index(run, sets[at]);
        } catch (error) {
          failures.push(`${sets[at].title}: ${error.message}`);
        }
        if (sets.length > 8) torl.set(panes.faults, torl.el("p.dim", { role: "status" }, `reading ${at + 1} of ${sets.length} steps`));
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    return { indices: indices.filter(Boolean), failures };
  };

  // ---------------------------------------------------------------------------------------------- drawing

  const FILTERS = ["answer", "signal", "reward", "advantage", "tool", "calls", "void", "length", "version", "end", "q"];
  const OPENED = ["group", "sample", "run", "step", "eval", "mode", "token"];
  const pick = (state, keys) => keys.map((key) => state[key] ?? "").join("\u0000");

  const render = async () => {
    const mine = ++serial;
    const state = torl.address();
    const run = runOf(state);
    if (!run?.sets.length) {
      torl.set(panes.head, torl.el("h1", {}, run?.name || "torl view"));
      document.body.dataset.view = "empty";
      torl.set(panes.page, torl.el("p.nothing", { role: "status" }, "Waiting for the first step …"));
      drawn = {};
      return;
    }
    head(run, state);
    const whole = state.problem ? "problem" : state.view === "steps" ? "steps" : state.view === "timeline" ? "timeline" : "list";
    document.body.dataset.view = whole;
    document.body.dataset.open = state.group !== undefined && whole === "list" ? "detail" : "list";
    panes.search.hidden = whole !== "list";
    if (whole === "problem") return done(await torl.drawMeetings(panes.page, state), { problem: true });
    if (whole === "steps") return done(torl.drawSteps(panes.page, run), { steps: true });
    const sets = setsOf(run, state);
    const key = `${run.key} ${sets.map((s) => `${s.name}?${s.version}`).join(" ")}`;
    if (drawn.key !== key) {
      const { indices, failures } = await loadAll(run, sets, mine);
      if (mine !== serial) return undefined;
      prepared = torl.prepare(indices);
      drawn = { key, failures };
    }
    if (!sets.length) torl.say("no such step");
    const filtering = `${whole} ${pick(state, [...FILTERS, "sort", "view", "order"])}`;
    if (drawn.filtering !== filtering) {
      const begun = performance.now();
      panes.result = torl.filter(prepared, state);
      drawn.group = groupName(state);
      drawList(run, sets.length === 1 ? sets[0] : null, state, panes.result);
      torl.lastFilterMs = performance.now() - begun;
      drawn.filtering = filtering;
      if (drawn.failures.length || !sets.length) panes.faults.prepend(torl.el("p.note", {}, sets.length ? drawn.failures.join("; ") : "This run has no such step."));
    }
    if (whole === "timeline") {
      const [index] = prepared.indices;
      if (!index || prepared.indices.length > 1) torl.set(panes.page, torl.el("p.nothing", {}, "Choose one step for its timeline."));
      else torl.drawTimeline(panes.page, index, panes.result.passes[0], state);
      return done();
    }
    return done(await drawDetail(state));
  };

  const groupName = (state) => {
    const [index] = prepared.indices;
    return state.group === undefined || !index ? null : `${index.set.name}/${state.group}`;
  };

  const drawDetail = async (state) => {
    const asked = pick(state, OPENED);
    if (state.group === undefined || prepared.indices.length !== 1) {
      drawn.detail = null;
      torl.set(panes.detail, torl.el("p.nothing", {}, "Choose a problem on the left."));
      return;
    }
    const [index] = prepared.indices;
    const group = Number(state.group);
    if (!(group >= 0 && group < index.problems.length)) {
      torl.set(panes.detail, torl.el("p.note", {}, `This step has no problem number ${state.group}.`));
      return;
    }
    const same = drawn.detail === asked && drawn.shown === drawn.filtering;
    drawn.detail = asked;
    drawn.shown = drawn.filtering;
    const before = drawn.group;
    drawn.group = groupName(state);
    if (before !== drawn.group) panes.virtual?.update();
    panes.virtual?.show(state.view === "attempts" ? -1 : panes.items.findIndex((item) => item.group === group));
    if (same) return;
    panes.detail.scrollTop = 0;
    await torl.drawGroup(panes.detail, { index, group, sample: state.sample, items: panes.items, pass: panes.result.passes[0], state });
  };

  const done = (_, forgotten) => {
    if (forgotten) drawn = {};
    document.body.dataset.ready = String(++torl.rendered);
  };
  torl.rendered = 0;

  // ---------------------------------------------------------------------------------------------- start

  const build = () => {
    const app = document.getElementById("app");
    panes.head = torl.el("header.top");
    panes.filters = torl.el("details.filters");
    panes.faults = torl.el("div");
    panes.search = torl.el("div.listhead");
    panes.scroll = torl.el("div.scroll", { tabindex: 0, role: "region", "aria-label": "List" });
    panes.detail = torl.el("section.detail", { "aria-label": "Problem", tabindex: 0 });
    panes.page = torl.el("section.page", { "aria-label": "Page" });
    const state = torl.address();
    torl.set(panes.search, search(state), sorting(state));
    const wide = matchMedia("(min-width: 1000px)");
    const fold = () => (panes.filters.open = wide.matches);
    wide.addEventListener("change", fold);
    fold();
    torl.set(
      app,
      panes.head,
      torl.el("main", {}, panes.filters, torl.el("section.list", { "aria-label": "Problems and attempts" }, panes.search, panes.faults, panes.scroll), panes.detail, panes.page),
      torl.el("div.unseen", { id: "live", "aria-live": "polite" }),
    );
    addEventListener("resize", () => panes.virtual?.update());
  };

  const follow = async () => {
    try {
      const next = await torl.load("manifest", Date.now());
      const before = JSON.stringify(torl.manifest);
      const changed = torl.lost || JSON.stringify(next) !== before;
      torl.lost = false;
      torl.manifest = next;
      if (changed) await render();
    } catch {
      if (!torl.lost) {
        torl.lost = true;
        head(runOf(torl.address()), torl.address());
      }
    }
    setTimeout(follow, POLL_MS);
  };

  const start = async () => {
    try {
      torl.manifest = await torl.load("manifest", Date.now());
    } catch (error) {
      torl.set(document.getElementById("app"), torl.el("p.boot", {}, `The data beside this page cannot be read: ${error.message}`));
      return;
    }
    build();
    addEventListener("hashchange", render);
    torl.noted = () => {
      if (drawn.detail) drawn.detail = pick(torl.address(), OPENED);
    };
    await render();
    if (torl.manifest.follow && location.protocol.startsWith("http")) setTimeout(follow, POLL_MS);
  };

  start();
}
