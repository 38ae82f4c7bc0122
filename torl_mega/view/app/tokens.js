// An answer token by token: shaded by one of several numbers, each token reachable by mouse, touch and keyboard.
"use strict";

{
  const SURPRISE = [0.9, 0.5, 0.2, 0.05, 0.01]; // probabilities that bound the shades 0 to 5
  const GAPS = [0.001, 0.01, 0.1, 0.5]; // nats
  const ENTROPIES = [0.1, 0.5, 1, 2, 3]; // nats
  const SIZES = [0.1, 0.5, 1, 2]; // of an advantage

  const above = (value, limits) => limits.filter((limit) => value >= limit).length;

  /** Each way to look at tokens: its name, whether it was recorded, the shade of a piece, and the legend. */
  const MODES = {
    logprob: {
      name: "log-prob",
      has: (a) => a.turns.some((t) => t.logprobs),
      shade: (p) => (p.low === null ? "" : `s${SURPRISE.filter((limit) => Math.exp(Math.min(p.low, 0)) < limit).length}`),
      legend: [["s0", "p ≥ 0.9"], ["s1", "0.5"], ["s2", "0.2"], ["s3", "0.05"], ["s4", "0.01"], ["s5", "< 0.01"]],
    },
    gap: {
      name: "server − trainer",
      has: (a) => a.turns.some((t) => t.trainer),
      shade: (p) => (p.gap === null ? "" : `${p.gap < 0 ? "n" : "m"}${above(Math.abs(p.gap), GAPS)}`),
      legend: [["n4", "−0.5 nats"], ["n2", "−0.01"], ["m0", "0"], ["m2", "+0.01"], ["m4", "+0.5"]],
    },
    entropy: {
      name: "entropy",
      has: (a) => a.turns.some((t) => t.entropy),
      shade: (p) => (p.entropy === null ? "" : `e${above(p.entropy, ENTROPIES)}`),
      legend: [["e0", "< 0.1 nats"], ["e1", "0.1"], ["e2", "0.5"], ["e3", "1"], ["e4", "2"], ["e5", "3"]],
    },
    advantage: {
      name: "advantage",
      has: (a) => a.facts.advantage !== null,
      shade: (p, facts) => {
        if (p.kind !== "sampled") return "";
        const size = above(Math.abs(facts.advantage), SIZES);
        return facts.advantage > 1e-6 ? `g${size}` : facts.advantage < -1e-6 ? `r${size}` : "";
      },
      legend: [["r4", "−2"], ["r1", "−0.1"], ["", "0, or inserted"], ["g1", "+0.1"], ["g4", "+2"]],
    },
    mask: {
      name: "mask",
      has: () => true,
      shade: (p, facts) => (p.kind === "sampled" && !facts.filtered && facts.advantage !== null ? "trained" : ""),
      legend: [["trained", "trained on"], ["inserted", "inserted: never"]],
    },
    version: {
      name: "weights",
      has: (a) => a.turns.some((t) => t.versions),
      shade: (p) => (p.versions === null ? "" : `v${p.versions[0] % 4}`),
      legend: [["v0", "one colour"], ["v1", "a version"], ["v2", "of the"], ["v3", "weights"]],
    },
  };
  torl.MODES = MODES;

  const expanded = (runs) => runs && runs.flatMap(([value, often]) => Array(often).fill(value));

  /** The pieces of an answer in order: text, origin, and the numbers of its tokens. */
  torl.pieces = function (attempt) {
    const pieces = [];
    let at = 0; // position in the response
    attempt.turns.forEach((turn, number) => {
      const sizes = new Map(turn.counts || []);
      const versions = expanded(turn.versions);
      let first = 0; // position in the turn
      turn.text.forEach((text, i) => {
        const count = turn.counts ? (sizes.get(i) ?? 1) : turn.ids ? turn.ids.length : 0;
        const of = (values) => (values && count ? values.slice(first, first + count) : null);
        const logprobs = of(turn.logprobs);
        const trainer = of(turn.trainer);
        const sum = (values) => (values ? values.reduce((a, b) => a + b, 0) : null);
        pieces.push({
          kind: "sampled",
          text,
          turn: number,
          at,
          count,
          ids: of(turn.ids),
          logprobs,
          low: logprobs && turn.counts ? Math.min(...logprobs) : null,
          sum: sum(logprobs),
          gap: trainer && turn.counts ? sum(logprobs) - sum(trainer) : null,
          trainer: sum(trainer),
          entropy: turn.entropy && turn.counts ? Math.max(...of(turn.entropy)) : null,
          versions: of(versions),
        });
        first += count;
        at += count;
      });
      if (turn.said !== null) {
        const nothing = { ids: null, logprobs: null, low: null, sum: null, gap: null, trainer: null, entropy: null };
        pieces.push({ kind: "inserted", text: turn.said, turn: number, at, count: turn.num_said, versions: null, ...nothing });
        at += turn.num_said || 0;
      }
    });
    return pieces;
  };

  const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u; // would reorder its neighbours

  const className = (piece, mode, facts) =>
    `t ${piece.kind} ${MODES[mode].shade(piece, facts)}${RIGHT_TO_LEFT.test(piece.text) ? " rtl" : ""}`;

  const rows = (piece, facts) => {
    const probability = piece.sum === null ? null : Math.exp(piece.sum);
    const shown = (values, digits) => (values ? values.map((v) => torl.number(v, digits)).join(" ") : "–");
    return [
      ["position", piece.count === 1 ? piece.at : `${piece.at} to ${piece.at + Math.max(piece.count - 1, 0)}`],
      ["token", piece.ids ? (piece.ids.length > 8 ? torl.plural(piece.ids.length, "token") : piece.ids.join(" ")) : "–"],
      ["log-prob", piece.logprobs && piece.logprobs.length <= 8 ? shown(piece.logprobs, 4) : torl.number(piece.sum, 2)],
      ["probability", probability === null ? "–" : probability < 0.001 ? probability.toExponential(1) : torl.number(probability, 3)],
      ["server − trainer", piece.gap === null ? "not recorded" : torl.signed(piece.gap, 4)],
      ["entropy", piece.entropy === null ? "not recorded" : `${torl.number(piece.entropy, 3)} nats`],
      ["trained on", piece.kind !== "sampled" ? "no, it was inserted" : facts.advantage === null ? "no, an evaluation" : facts.filtered ? "no, the attempt was left out" : "yes"],
      ["advantage", piece.kind === "sampled" ? torl.signed(facts.advantage, 3) : "–"],
      ["weights", piece.versions ? [...new Set(piece.versions)].join(", ") : "–"],
      ["turn", piece.turn + 1],
    ];
  };

  const quoted = (text) => (text.length > 60 ? `${text.slice(0, 60)}…` : text).replace(/\n/g, "↵").replace(/\t/g, "⇥");

  const say = (piece, facts) => `${quoted(piece.text)}: ${rows(piece, facts).slice(1, 4).map((row) => row.join(" ")).join(", ")}`;

  const nextUnlikely = (pieces, from) => pieces.findIndex((p, i) => i > from && p.low !== null && Math.exp(p.low) < 0.2);

  /** The piece nearest to that at `from` in the next or previous line of text. */
  const inNextLine = (spans, from, direction) => {
    const box = (i) => spans[i]?.getClientRects()[0];
    const here = box(from);
    if (!here) return Math.max(from, 0);
    let i = from + direction;
    while (spans[i] && (!box(i) || Math.abs(box(i).top - here.top) < 3)) i += direction;
    if (!spans[i]) return from;
    const line = box(i).top;
    let best = i;
    for (; spans[i] && (!box(i) || Math.abs(box(i).top - line) < 3); i += direction) {
      if (box(i) && Math.abs(box(i).left - here.left) < Math.abs(box(best).left - here.left)) best = i;
    }
    return best;
  };

  /** The numbers of the piece at `i`, and ways on from it. */
  const drawPanel = (panel, pieces, i, facts, select) => {
    if (i < 0) {
      torl.set(panel, torl.el("p.dim", {}, "Choose a token for its numbers: by tap, click, or arrow keys."));
      return;
    }
    const button = (word, label, to) =>
      torl.el("button.small", { type: "button", "aria-label": label, disabled: !pieces[to], onclick: () => select(to) }, word);
    const fact = ([name, value]) => torl.el("div", {}, torl.el("dt", {}, name), torl.el("dd", {}, value));
    torl.set(
      panel,
      torl.el("div.chosen", {}, torl.el("code", {}, quoted(pieces[i].text) || "(empty)")),
      torl.el("dl", {}, rows(pieces[i], facts).map(fact)),
      torl.el(
        "div.buttons",
        {},
        button("‹", "previous token", i - 1),
        button("›", "next token", i + 1),
        button("next unlikely ›", "next token with probability below 0.2", nextUnlikely(pieces, i)),
        torl.el("button.small", { type: "button", onclick: (e) => torl.copy(location.href, e.currentTarget) }, "copy link"),
      ),
    );
  };

  /** The answer as pieces that can be chosen, with a panel for the numbers of the chosen one. */
  torl.drawTokens = function (attempt, { mode, token, choose }) {
    const { facts } = attempt;
    const pieces = torl.pieces(attempt);
    const spans = pieces.map((piece, i) => torl.el("span", { class: className(piece, mode, facts), "data-i": i }, piece.text));
    let chosen = -1;
    const panel = torl.el("div.panel", { role: "region", "aria-label": "The chosen token" });
    const label = "Answer by token; arrow keys move, N goes to the next unlikely one";
    const box = torl.el("div.tokens", { tabindex: 0, role: "group", "aria-label": label, dir: "ltr" }, spans);

    const mark = (i) => {
      spans[chosen]?.removeAttribute("id");
      spans[chosen]?.classList.remove("chosen");
      chosen = i;
      spans[i].classList.add("chosen");
      spans[i].id = "chosen-token";
      box.setAttribute("aria-activedescendant", "chosen-token");
      drawPanel(panel, pieces, i, facts, select);
    };

    const select = (i) => {
      if (!pieces[i]) return;
      mark(i);
      spans[i].scrollIntoView({ block: "nearest", inline: "nearest" });
      choose(pieces[i].at);
      torl.say(say(pieces[i], facts));
    };

    const moves = {
      ArrowRight: () => chosen + 1,
      ArrowLeft: () => Math.max(chosen - 1, 0),
      ArrowDown: () => inNextLine(spans, chosen, 1),
      ArrowUp: () => inNextLine(spans, chosen, -1),
      Home: () => 0,
      End: () => pieces.length - 1,
      n: () => nextUnlikely(pieces, chosen),
      N: () => nextUnlikely(pieces, chosen),
    };
    box.addEventListener("click", (event) => {
      const i = event.target.closest(".t")?.dataset.i;
      if (i !== undefined && getSelection().isCollapsed) select(Number(i));
    });
    box.addEventListener("keydown", (event) => {
      if (!Object.hasOwn(moves, event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      select(moves[event.key]());
    });

    drawPanel(panel, pieces, -1, facts, select);
    const start = token === undefined ? -1 : pieces.findIndex((p) => p.at <= token && token < p.at + Math.max(p.count, 1));
    if (start >= 0) mark(start);
    return {
      box,
      panel,
      recolour(next) {
        spans.forEach((span, i) => {
          span.className = className(pieces[i], next, facts) + (i === chosen ? " chosen" : "");
        });
      },
      reveal: () => spans[chosen]?.scrollIntoView({ block: "center" }),
    };
  };

  torl.legend = (mode) =>
    torl.el(
      "p.legend",
      {},
      mode === "mask" ? null : torl.el("i.inserted", {}, "inserted"),
      MODES[mode].legend.map(([shade, word]) => torl.el("i", { class: `t ${shade}` }, word)),
    );
}
