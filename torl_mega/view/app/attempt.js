// One attempt: what it earned, its calls, and its text, by token or to be read.
"use strict";

{
  const callChip = (call) => {
    const code = call.return_code ? ` (${call.return_code})` : "";
    const name = call.tool === "python" ? "" : `${call.tool || "no tool"} · `;
    const time = call.wall_s === null ? "" : ` · ${torl.seconds(call.wall_s)}`;
    return torl.el(`span.chip.${call.status === "ok" ? "ok" : "bad"}`, {}, `${name}${torl.WORDS[call.status] || call.status}${code}${time}`);
  };

  torl.factsOf = function (index, row) {
    const facts = {};
    for (const [name, values] of Object.entries(index.columns)) {
      const value = values === null || values === undefined ? null : values[row];
      facts[name] = typeof value === "number" && Number.isNaN(value) ? null : value;
    }
    facts.outcome = torl.outcome(index, row);
    facts.extracted = index.columns.answer[row] < 0 ? null : index.answers[index.columns.answer[row]];
    const grade = index.names.grades[index.columns.grade[row]];
    facts.gradeWord = grade === "ok" || grade === "no_answer" ? null : torl.WORDS[grade];
    facts.ending = torl.WORDS[index.names.ends[index.columns.end[row]]];
    return facts;
  };

  torl.outcomeMark = (outcome) =>
    torl.el(`span.mark.${outcome}`, {}, `${{ right: "✓", wrong: "✗", none: "∅", lost: "?" }[outcome]} ${torl.OUTCOMES[outcome]}`);

  const head = (index, row, attempt, facts) => {
    const fact = (name, value) => (value === null ? null : torl.el("span.fact", {}, torl.el("span.dim", {}, `${name} `), value));
    const parts = attempt.parts.length > 1 ? attempt.parts.map(([n, v]) => `${n} ${torl.signed(v)}`).join(", ") : null;
    return torl.el(
      "div.facts",
      {},
      torl.outcomeMark(facts.outcome),
      fact("sample", facts.sample),
      fact("answer", facts.extracted ?? "none"),
      facts.gradeWord ? torl.el("span.chip.bad", {}, facts.gradeWord) : null,
      fact("reward", facts.reward === null ? null : torl.signed(facts.reward)),
      parts ? torl.el("span.dim", {}, `(${parts})`) : null,
      fact("advantage", facts.advantage === null ? null : torl.signed(facts.advantage)),
      fact("tokens", facts.inserted === null ? facts.sampled : `${facts.sampled} sampled + ${facts.inserted} inserted`),
      facts.filtered ? torl.el("span.chip.quiet", {}, "left out of training") : null,
      facts.void ? torl.el("span.chip.bad", {}, "void turn") : null,
      torl.el("span.dim", {}, facts.ending),
      attempt.turns.flatMap((turn) => turn.calls).map(callChip),
    );
  };

  const modeChoice = (attempt, mode, onchange) => {
    const choice = (key, name) => {
      const input = torl.el("input", {
        type: "radio",
        name: `mode-${attempt.serial}`,
        value: key,
        checked: key === mode,
        onchange: () => onchange(key),
      });
      return torl.el("label", {}, input, torl.el("span", {}, name));
    };
    const modes = Object.entries(torl.MODES);
    const absent = modes.filter(([, { has }]) => !has(attempt)).map(([, { name }]) => name);
    return torl.el(
      "fieldset.modes",
      {},
      torl.el("legend", {}, "Show"),
      choice("read", "to read"),
      modes.filter(([, { has }]) => has(attempt)).map(([key, { name }]) => choice(key, name)),
      absent.length ? torl.el("span.dim", {}, `not recorded: ${absent.join(", ")}`) : null,
    );
  };

  const usable = (attempt, mode) => (mode === "read" || torl.MODES[mode]?.has(attempt) ? mode : fallback(attempt));
  const fallback = (attempt) => (torl.MODES.logprob.has(attempt) ? "logprob" : "read");

  let serial = 0;

  /** Draws one attempt into `box`. `state`: mode and token; `note(changes)` is told of choices. */
  torl.drawAttempt = async function (box, index, row, state, note) {
    const asked = ++serial;
    box.dataset.asked = asked;
    let attempt;
    try {
      attempt = await torl.detail(index, row);
    } catch (error) {
      torl.set(box, torl.el("p.note", {}, `This attempt cannot be shown: ${error.message}`));
      return;
    }
    if (box.dataset.asked !== String(asked)) return; // another one was asked for meanwhile
    const facts = torl.factsOf(index, row);
    facts.filtered = attempt.filtered;
    attempt = { ...attempt, facts, serial: asked };
    const text = torl.el("div.text");
    const legend = torl.el("div");
    let drawn = null;

    const draw = async (mode) => {
      if (mode === "read") {
        await torl.readable().catch(() => {});
        drawn = null;
        torl.set(legend);
        torl.set(text, torl.drawReading(attempt));
        return;
      }
      torl.set(legend, torl.legend(mode));
      if (drawn) {
        drawn.recolour(mode);
        return;
      }
      const token = state.token === undefined ? undefined : Number(state.token);
      drawn = torl.drawTokens(attempt, { mode, token, choose: (at) => note({ token: at, mode: current }) });
      torl.set(text, drawn.box, drawn.panel);
      drawn.reveal();
    };

    let current = usable(attempt, state.mode || fallback(attempt));
    const change = (mode) => {
      current = mode;
      note({ mode });
      draw(mode);
    };
    const prompt = torl.el(
      "details.prompt",
      {},
      torl.el("summary", {}, attempt.num_prompt === null ? "problem as text" : `prompt · ${torl.plural(attempt.num_prompt, "token")}`),
      torl.el("pre", { tabindex: 0 }, attempt.prompt),
    );
    torl.set(box, head(index, row, attempt, facts), prompt, modeChoice(attempt, current, change), legend, text);
    await draw(current);
    return attempt;
  };
}
