// An answer as a person reads it: formulas set by KaTeX, programs coloured by highlight.js. Both are given text and give elements.
"use strict";

{
  const MOST_FORMULA = 4000; // characters; a longer one stays text
  const MOST_CODE = 60000;
  const OPTIONS = { output: "mathml", throwOnError: true, trust: false, strict: "ignore", maxExpand: 200, maxSize: 20 };

  const libraries = () =>
    Promise.all([
      torl.need("katex", () => globalThis.katex !== undefined),
      torl.need("highlight", () => torl.libraries.highlight_python !== undefined),
    ]);

  /** A formula as an element; what KaTeX refuses stays as it was written. */
  const formula = (source, whole, display) => {
    if (source.length > MOST_FORMULA) return torl.el("span.tex", {}, whole);
    const node = torl.el(display ? "div.formula" : "span.formula");
    try {
      globalThis.katex.render(source, node, { ...OPTIONS, displayMode: display });
    } catch {
      return torl.el("span.tex", { title: "not a formula that can be set" }, whole);
    }
    for (const marked of node.querySelectorAll("[style]")) marked.removeAttribute("style");
    return node;
  };

  /** Where the brace opened before `from` closes, or -1. */
  const closing = (text, from) => {
    let depth = 1;
    for (let i = from; i < text.length && i - from < MOST_FORMULA; i++) {
      if (text[i] === "\\") i++;
      else if (text[i] === "{") depth++;
      else if (text[i] === "}" && --depth === 0) return i;
    }
    return -1;
  };

  const OPENERS = /\$\$|\$(?=\S)|\\\(|\\\[|\\boxed\{/g;
  const CLOSERS = { "$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]" };

  /** Text with its formulas as elements. */
  torl.withFormulas = function (text) {
    const parts = [];
    let done = 0;
    OPENERS.lastIndex = 0;
    for (let found = OPENERS.exec(text); found; found = OPENERS.exec(text)) {
      const begin = found.index + found[0].length;
      const boxed = found[0] === "\\boxed{";
      const closer = CLOSERS[found[0]];
      const end = boxed ? closing(text, begin) : text.indexOf(closer, begin);
      if (end < 0 || end - begin > MOST_FORMULA || (closer === "$" && /[\n\s]$/.test(text.slice(begin, end).slice(-1)))) continue;
      if (closer === "$" && text.slice(begin, end).includes("\n\n")) continue;
      const stop = end + (boxed ? 1 : closer.length);
      const whole = text.slice(found.index, stop);
      parts.push(text.slice(done, found.index));
      parts.push(formula(boxed ? whole : text.slice(begin, end), whole, found[0] === "$$" || found[0] === "\\["));
      done = stop;
      OPENERS.lastIndex = stop;
    }
    parts.push(text.slice(done));
    return parts.filter((part) => part !== "");
  };

  /** highlight.js's tree of tokens as elements; its own HTML is not used. */
  const branches = (node) =>
    node.children.map((child) =>
      typeof child === "string" ? child : torl.el("span", { class: `hl-${String(child.scope || "").split(".")[0]}` }, branches(child)),
    );

  torl.code = function (text) {
    const { highlight_core: highlighter, highlight_python: python } = torl.libraries;
    if (!highlighter || text.length > MOST_CODE) return torl.el("code", {}, text);
    if (!highlighter.getLanguage("python")) highlighter.registerLanguage("python", python);
    const result = highlighter.highlight(text, { language: "python", ignoreIllegals: true });
    return torl.el("code", {}, branches(result._emitter.rootNode));
  };

  const FENCE = /```(\w*)\n([\s\S]*?)(?:```|$)/g;

  /** Written text: fenced programs apart, formulas set. */
  const written = (text) => {
    const parts = [];
    let done = 0;
    for (const found of text.matchAll(FENCE)) {
      if (found.index > done) parts.push(prose(text.slice(done, found.index)));
      const python = found[1] === "" || /^py/.test(found[1]);
      parts.push(torl.el("pre.program", { tabindex: 0 }, python ? torl.code(found[2]) : found[2]));
      done = found.index + found[0].length;
    }
    if (done < text.length) parts.push(prose(text.slice(done)));
    return parts;
  };

  const prose = (text) => (text.trim() ? torl.el("div.prose", { dir: "auto" }, torl.withFormulas(text.replace(/^\n+|\n+$/g, ""))) : null);

  const stripped = (said) => said.replace(/^\n+/, "").replace(/\n?```\n*$/, "");

  /** The whole answer, turn by turn. Needs `torl.readable()` to have resolved. */
  torl.drawReading = function (attempt) {
    return torl.el(
      "div.reading",
      {},
      attempt.turns.map((turn) => {
        const text = turn.text.join("");
        const opened = turn.said !== null ? text.replace(/```output\s*$/, "") : text;
        return [
          written(opened),
          turn.said === null ? null : torl.el("pre.output", { tabindex: 0, "aria-label": "inserted output" }, stripped(turn.said)),
        ];
      }),
    );
  };

  torl.readable = libraries;
}
