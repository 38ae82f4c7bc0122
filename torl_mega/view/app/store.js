// Data on demand: chunks become script elements, which load from a file where nothing else does; the least used are forgotten.
"use strict";

{
  const MOST_CHUNKS = 12; // opened details
  const MOST_LISTED = 400000; // attempts in indices that are held beside those in use

  const unpack = async (packed) => {
    const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };

  const script = (address) =>
    new Promise((resolve, reject) => {
      const node = document.createElement("script");
      node.src = address;
      node.addEventListener("load", () => (node.remove(), resolve()));
      node.addEventListener("error", () => (node.remove(), reject(new Error(`${address} is not there`))));
      document.head.append(node);
    });

  /** The value that a data file holds. Rejects for a file that is not there or is damaged. */
  torl.load = async function (name, version) {
    const single = document.querySelector("link[rel=stylesheet]") === null;
    if (!single) {
      torl.stash.delete(name);
      await script(`data/${name}.js${version ? `?${version}` : ""}`);
    }
    const packed = torl.stash.get(name);
    if (packed === undefined) throw new Error(`${name} is not in this page`);
    if (!single) torl.stash.delete(name);
    return unpack(packed);
  };

  const libraries = new Map();

  /** Loads a bundled library once. */
  torl.need = function (name, there) {
    if (there()) return Promise.resolve();
    if (!libraries.has(name)) libraries.set(name, script(`app/${name}.js`));
    return libraries.get(name);
  };

  // ---------------------------------------------------------------------------------------------- indices

  const NUMBERS = ["reward", "advantage"];
  const indices = new Map(); // "key/name?version" -> promise of an index

  const typed = (index) => {
    const given = index.columns;
    const num = (given.group || []).length;
    const columns = {};
    for (const [name, values] of Object.entries(given)) {
      if (name === "spans") columns.spans = values;
      else if (values === null) columns[name] = null;
      else if (NUMBERS.includes(name)) columns[name] = Float32Array.from(values, (v) => (v === null ? NaN : v));
      else columns[name] = Int32Array.from(values, (v) => (v === null ? -1 : v));
    }
    return { num, columns };
  };

  /** Rows by group, without an array for each: those of group g stand at rows[first[g]] … rows[first[g + 1] - 1]. */
  const grouped = (group, num, numGroups) => {
    const first = new Int32Array(numGroups + 1);
    for (let i = 0; i < num; i++) first[group[i] + 1]++;
    for (let g = 0; g < numGroups; g++) first[g + 1] += first[g];
    const next = first.slice();
    const rows = new Int32Array(num);
    for (let i = 0; i < num; i++) rows[next[group[i]]++] = i;
    return { first, rows };
  };

  const judge = (index) => {
    const { columns, first, rows } = index;
    const numGroups = index.problems.length;
    index.right = new Int32Array(numGroups);
    index.signal = new Uint8Array(numGroups);
    for (let g = 0; g < numGroups; g++) {
      let differs = 0;
      for (let k = first[g]; k < first[g + 1]; k++) {
        const row = rows[k];
        index.right[g] += columns.correct[row];
        if (columns.advantage) differs |= Math.abs(columns.advantage[row]) > 1e-6 ? 1 : 0;
        else differs |= columns.correct[row] !== columns.correct[rows[first[g]]] ? 1 : 0;
      }
      index.signal[g] = differs;
    }
  };

  const read = async (run, set) => {
    const index = await torl.load(`${run.key}/${set.name}.index`, set.version);
    Object.assign(index, typed(index), { run, set });
    if (!index.num) Object.assign(index.columns, { group: new Int32Array(0), correct: new Int32Array(0) });
    Object.assign(index, grouped(index.columns.group, index.num, index.problems.length));
    judge(index);
    return index;
  };

  /** The index of one set. */
  torl.index = function (run, set) {
    const key = `${run.key}/${set.name}?${set.version}`;
    const found = indices.get(key) || read(run, set);
    indices.delete(key);
    indices.set(key, found); // the most recent last
    found.catch(() => indices.delete(key));
    let held = 0;
    for (const [other, promise] of [...indices].reverse()) {
      held += promise.attempts || 0;
      if (held > MOST_LISTED && other !== key) indices.delete(other);
    }
    found.attempts = set.attempts;
    return found;
  };

  // ---------------------------------------------------------------------------------------------- details

  const chunks = new Map(); // name -> promise of a chunk
  torl.heldChunks = () => chunks.size;

  const chunkOf = (starts, row) => {
    let low = 0;
    let high = starts.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (starts[middle] <= row) low = middle;
      else high = middle - 1;
    }
    return low;
  };

  /** What was recorded of one attempt, and of its problem. */
  torl.detail = async function (index, row) {
    const number = chunkOf(index.starts, row);
    const name = `${index.run.key}/${index.set.name}.${String(number).padStart(3, "0")}`;
    const key = `${name}?${index.set.version}`;
    const loading = chunks.get(key) || torl.load(name, index.set.version);
    chunks.delete(key);
    chunks.set(key, loading);
    loading.catch(() => chunks.delete(key));
    while (chunks.size > MOST_CHUNKS) chunks.delete(chunks.keys().next().value);
    const chunk = await loading;
    const attempt = chunk.attempts[row - index.starts[number]];
    const prompt = chunk.prompts.find(([group]) => group === attempt.group)[1];
    return { ...attempt, ...prompt };
  };

  torl.rowOf = function (index, group, sample) {
    for (let k = index.first[group]; k < index.first[group + 1]; k++) {
      if (index.columns.sample[index.rows[k]] === sample) return index.rows[k];
    }
    return -1;
  };
}
