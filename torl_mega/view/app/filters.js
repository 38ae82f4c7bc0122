// What attempts can be filtered by, and how many of each kind there are under the other filters.
// Each filter gives an attempt a bit for every value that it has; a choice is a mask. One pass counts all of them.
"use strict";

{
  const bit = (place) => 1 << place;
  const LENGTHS = [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768];
  const MOST_CALLS = 5;
  const MOST_BEHIND = 4;
  const MOST_REWARDS = 8;

  const lengthPlace = (tokens) => {
    let place = 0;
    while (place < LENGTHS.length && tokens >= LENGTHS[place]) place++;
    return place;
  };

  const short = (n) => (n >= 1024 ? `${n / 1024}k` : String(n));
  const lengthWords = [
    `below ${LENGTHS[0]}`,
    ...LENGTHS.slice(1).map((limit, i) => `${short(LENGTHS[i])} to ${short(limit)}`),
    `from ${short(LENGTHS.at(-1))}`,
  ];

  /** The rewards that occur, or ranges of them where they are many. */
  const rewardValues = (indices) => {
    const seen = new Set();
    for (const { columns } of indices) {
      if (!columns.reward) continue;
      for (const value of columns.reward) if (seen.size <= MOST_REWARDS && !Number.isNaN(value)) seen.add(value);
    }
    if (seen.size <= MOST_REWARDS) {
      const sorted = [...seen].sort((a, b) => b - a);
      return { words: sorted.map((v) => torl.signed(v)), place: (v) => sorted.indexOf(v) };
    }
    const limits = [-1, -0.5, 0, 0.5, 1];
    const words = ["below −1", "−1 to −0.5", "−0.5 to 0", "0 to 0.5", "0.5 to 1", "from 1"];
    return { words, place: (v) => limits.filter((limit) => v >= limit).length };
  };

  const signPlace = (value) => (value > 1e-6 ? 0 : value < -1e-6 ? 2 : 1);

  /** Each filter: its key in the address, its name, its values' words, and the mask of a row (null: not recorded here). */
  const define = (indices) => {
    const statuses = indices[0]?.names.statuses || [];
    const grades = indices[0]?.names.grades || [];
    const rewards = rewardValues(indices);
    const graded = (columns, i) => grades[columns.grade[i]];
    return [
      {
        key: "answer",
        name: "Answer",
        words: ["correct", "wrong", "no answer", "not judged"],
        mask: ({ columns }) => (i) => {
          if (columns.correct[i]) return bit(0);
          const grade = graded(columns, i);
          return bit(grade === "ok" ? 1 : grade === "no_answer" ? 2 : 3);
        },
      },
      {
        key: "signal",
        name: "Group's signal",
        words: ["answers differ", "zero signal"],
        mask: ({ columns, signal, set }) => set.kind === "step" && ((i) => bit(signal[columns.group[i]] ? 0 : 1)),
      },
      {
        key: "reward",
        name: "Reward",
        words: rewards.words,
        mask: ({ columns }) => columns.reward && ((i) => bit(rewards.place(columns.reward[i]))),
      },
      {
        key: "advantage",
        name: "Advantage",
        words: ["positive", "zero", "negative"],
        mask: ({ columns }) => columns.advantage && ((i) => bit(signPlace(columns.advantage[i]))),
      },
      {
        key: "tool",
        name: "Tool",
        words: ["not called", "all ran through", ...statuses.slice(1).map((s) => torl.WORDS[s] || s)],
        mask: ({ columns }) => (i) => {
          const bits = columns.tools[i];
          if (!columns.calls[i]) return bit(0);
          return (bits === 1 ? bit(1) : 0) | ((bits >> 1) << 2);
        },
      },
      {
        key: "calls",
        name: "Calls",
        words: ["0", "1", "2", "3", "4", "5 or more"],
        mask: ({ columns }) => (i) => bit(Math.min(columns.calls[i], MOST_CALLS)),
      },
      {
        key: "void",
        name: "Void turns",
        words: ["none", "some"],
        mask: ({ columns }) => columns.void && ((i) => bit(columns.void[i])),
      },
      {
        key: "length",
        name: "Tokens",
        words: lengthWords,
        mask: ({ columns }) => (i) => bit(lengthPlace(columns.sampled[i] + Math.max(columns.inserted ? columns.inserted[i] : 0, 0))),
      },
      {
        key: "version",
        name: "Weights",
        words: ["of this step", "1 step behind", "2 behind", "3 behind", "4 or more behind", "changed meanwhile"],
        mask: ({ columns, set }) =>
          columns.oldest &&
          set.step !== null &&
          ((i) => {
            const behind = Math.min(Math.max(set.step - columns.oldest[i], 0), MOST_BEHIND);
            return bit(behind) | (columns.oldest[i] !== columns.newest[i] ? bit(MOST_BEHIND + 1) : 0);
          }),
      },
      {
        key: "end",
        name: "Ending",
        words: ["by itself", "out of budget"],
        mask: ({ columns }) => (i) => bit(columns.end[i]),
      },
    ];
  };

  const slug = (word) => word.replace(/[^A-Za-z0-9−.+]+/g, "-");

  /** Prepares indices for filtering: masks[filter][set] is a Uint16Array, or null where it was not recorded. */
  torl.prepare = function (indices) {
    const filters = define(indices);
    for (const filter of filters) {
      filter.slugs = filter.words.map(slug);
      filter.masks = indices.map((index) => {
        const of = filter.mask(index);
        if (!of) return null;
        const masks = new Uint16Array(index.num);
        for (let i = 0; i < index.num; i++) masks[i] = of(i);
        return masks;
      });
    }
    return { indices, filters: filters.filter((f) => f.masks.some((m) => m !== null)) };
  };

  const wanted = (filter, text) =>
    (text || "").split(",").reduce((mask, word) => {
      const place = filter.slugs.indexOf(word);
      return place < 0 ? mask : mask | bit(place);
    }, 0);

  /** Whether each group's problem has what was searched for; null when nothing was. */
  const searched = (index, text) => {
    const needle = (text || "").trim().toLowerCase();
    if (!needle) return null;
    return Uint8Array.from(index.problems, (texts) => (texts.some((t) => t.toLowerCase().includes(needle)) ? 1 : 0));
  };

  const expand = (table, words) =>
    words.map((_, place) => {
      let sum = 0;
      for (let mask = 0; mask < table.length; mask++) if (table[mask] && mask & bit(place)) sum += table[mask];
      return sum;
    });

  /** Applies the filters of the address: which rows pass (1) by set, how many do, and the counts of every filter's values. */
  torl.filter = function ({ indices, filters }, state) {
    const chosen = filters.map((filter) => wanted(filter, state[filter.key]));
    const active = filters.map((_, f) => f).filter((f) => chosen[f]);
    const tables = filters.map(() => new Uint32Array(1 << 14));
    let num = 0;
    const passes = indices.map((index, s) => {
      const pass = new Uint8Array(index.num);
      const found = searched(index, state.q);
      const group = index.columns.group;
      for (let i = 0; i < index.num; i++) {
        if (found && !found[group[i]]) continue;
        let failed = -1;
        let fails = 0;
        for (const f of active) {
          const masks = filters[f].masks[s];
          if (!masks || !(masks[i] & chosen[f])) {
            failed = f;
            if (++fails > 1) break;
          }
        }
        if (fails > 1) continue;
        if (!fails) {
          pass[i] = 1;
          num++;
        }
        for (let f = fails ? failed : 0, end = fails ? failed + 1 : filters.length; f < end; f++) {
          const masks = filters[f].masks[s];
          if (masks) tables[f][masks[i]]++;
        }
      }
      return pass;
    });
    const counts = filters.map((filter, f) => expand(tables[f], filter.words));
    return { passes, num, counts, chosen };
  };

  /** The filters as groups of buttons. A value that no attempt has is left out, one that the other filters exclude is dimmed. */
  torl.drawFilters = function (prepared, result, state) {
    const boxes = prepared.filters.map((filter, f) => {
      const total = filter.words.map((_, place) =>
        filter.masks.some((masks) => masks && masks.some((mask) => mask & bit(place))),
      );
      const buttons = filter.words.map((word, place) => {
        if (!total[place]) return null;
        const pressed = Boolean(result.chosen[f] & bit(place));
        const others = filter.slugs.filter((_, p) => result.chosen[f] & bit(p) && p !== place);
        const next = (pressed ? others : [...others, filter.slugs[place]]).join(",");
        const count = result.counts[f][place];
        return torl.el(
          `button.facet${count || pressed ? "" : ".empty"}`,
          {
            type: "button",
            "aria-pressed": pressed ? "true" : "false",
            disabled: !count && !pressed,
            "data-facet": `${filter.key}:${filter.slugs[place]}`,
            onclick: () => torl.go({ [filter.key]: next, group: null, sample: null, token: null }),
          },
          torl.el("span", {}, word),
          torl.el("span.num", {}, torl.count(count)),
        );
      });
      if (buttons.filter(Boolean).length < 2 && !result.chosen[f]) return null;
      return torl.el("fieldset.filter", {}, torl.el("legend", {}, filter.name), buttons);
    });
    return boxes;
  };

  /** The address without any filter. */
  torl.cleared = (prepared) => Object.fromEntries([...prepared.filters.map((f) => [f.key, null]), ["q", null]]);
}
