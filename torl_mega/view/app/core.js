// The page's own names, elements and address. What a model wrote becomes text through `el`, never markup.
"use strict";

globalThis.torl = {
  stash: new Map(), // name -> packed chunk that a file has handed over
  libraries: {},

  /** Called by every data file. */
  put(name, packed) {
    torl.stash.set(name, packed);
  },

  /** Gives a library that exports to `module` one. */
  library(name, define) {
    const module = { exports: {} };
    define(module);
    torl.libraries[name] = module.exports;
  },
};

/** An element: attributes, listeners under `on…`, and children that are elements or texts. */
torl.el = function (tag, attributes, ...children) {
  const [name, ...classes] = tag.split(".");
  const node = document.createElement(name || "div");
  if (classes.length) node.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  torl.fill(node, children);
  return node;
};

/** A long text in parts: a browser takes ages over a single one without a place to break. */
torl.parts = (text) => (text.length < 2000 ? [text] : text.match(/[\s\S]{1,1000}/gu));

torl.fill = function (node, children) {
  for (const child of [children].flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    if (child instanceof Node) node.append(child);
    else for (const part of torl.parts(String(child))) node.append(document.createTextNode(part));
  }
  return node;
};

/** Replaces what `node` holds. */
torl.set = function (node, ...children) {
  node.replaceChildren();
  return torl.fill(node, children);
};

// ------------------------------------------------------------------------------------------------ numbers as text

torl.number = function (value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  return Number(value).toFixed(digits).replace("-", "−");
};

torl.signed = function (value, digits = 2) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const text = torl.number(value, digits);
  return value > 0 ? `+${text}` : text;
};

torl.count = (value) => String(value).replace(/\B(?=(\d{3})+$)/g, "\u202f");

torl.seconds = function (value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  return value < 100 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`;
};

torl.plural = (count, word) => `${torl.count(count)} ${word}${count === 1 ? "" : "s"}`;

// ------------------------------------------------------------------------------------------------ the address

/** The state of the page is its address: `#step=7&group=3&sample=5&token=12&mode=entropy&answer=wrong`. */
torl.address = function () {
  const state = {};
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) state[key] = value;
  return state;
};

torl.link = function (changes, keep = torl.address()) {
  const merged = { ...keep, ...changes };
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(merged)) {
    if (value !== null && value !== undefined && value !== "") query.set(key, value);
  }
  return `#${query.toString()}`;
};

torl.go = (changes, keep) => {
  location.hash = torl.link(changes, keep);
};

/** Changes the address without a new entry in the history and without drawing anything again. */
torl.note = (changes) => {
  history.replaceState(null, "", torl.link(changes));
  torl.noted?.();
};

/** Says something to those who do not see the page. */
torl.say = function (text) {
  const live = document.getElementById("live");
  if (live) live.textContent = text;
};

torl.copy = async function (text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
  } catch {
    button.textContent = "it is in the address bar"; // no clipboard for a page from a file in some browsers
  }
  setTimeout(() => {
    button.textContent = before;
  }, 1500);
};

/** Letters of the English plural aside, names of values as the page says them. */
torl.WORDS = {
  ok: "ran through",
  error: "error",
  timeout_wall: "timeout",
  timeout_cpu: "CPU timeout",
  memory: "out of memory",
  output_limit: "too much output",
  signal: "killed by a signal",
  infra: "sandbox fault",
  eos: "ended by itself",
  length: "out of budget",
  no_answer: "no answer",
  timeout: "grader timeout",
  fault: "grader fault",
};
