// Everything on the page that is words and numbers: the figures, the legend of the maps, the cache, the table, the totals.

import { amount, count, duration, joined, latency, percent, plural } from "./words.js";

// Name, [value, unit], note; s: the newest sample, d: the document.
const FIGURES = [
  ["Running", (s) => [amount(s.running), ""], (s, d) => `in ${plural(d.groups.filter((g) => g.state !== "down").length, "group")}`],
  ["Queued", (s) => [amount(s.waiting), ""], (s, d) => (s.waiting ? `oldest ${duration(d.oldest_wait_s)}` : "no wait")],
  ["Preempted", (s) => [amount(s.preempted), ""], (s, d) => `${amount(d.totals.preemptions)} in all`],
  ["Output", (s) => [amount(s.output_tps), "tok/s"], (s, d) => `${amount(d.totals.output_tokens)} in all`],
  ["Prompt", (s) => [amount(s.prompt_tps), "tok/s"], (s, d) => `${amount(d.totals.started_tokens)} in all`],
  ["Hit rate", (s) => percent(s.hit_rate), (s, d) => `${joined(part(d.totals.cached_tokens, d.totals.started_tokens))} in all`],
  ["TTFT p50", (s) => latency(s.ttft_p50_ms), (s) => `p99 ${joined(latency(s.ttft_p99_ms))}`],
  ["TPOT p50", (s) => latency(s.tpot_p50_ms), (s) => `p99 ${joined(latency(s.tpot_p99_ms))}`],
  ["Scheduler busy", (s) => percent(s.busy), (s, d) => plural(d.front_ends, "front end")],
];

// State, name, and what it means, in the order of `deploy.status.maps.STATE_NAMES`.
const LEGEND = [
  ["free", "free", ""],
  ["held", "held", "by one sequence"],
  ["shared", "shared", "by several"],
  ["cached", "cached", ""],
];

// Field of the totals, name, meaning. The parts sum up to `started_tokens`.
const CACHE = [
  ["cached_tokens", "found", "in the group’s cache"],
  ["miss_inside_block", "inside a block", "beyond the last full block"],
  ["miss_routed", "routed away", "another group has them"],
  ["miss_evicted", "evicted", "were there before"],
  ["miss_cold", "cold", "never seen"],
];

const COLUMNS = [
  ["Group", (g) => String(g.group)],
  ["State", (g) => g.state],
  ["Running", (g) => count(g.running)],
  ["Starved", (g) => count(g.starved), "running sequences that wait for a block"],
  ["Backlog", (g) => amount(g.backlog_tokens), "tokens of started sequences, not computed yet"],
  ["Step", (g) => joined(latency(g.step_ms)), "mean duration of a step"],
  ["Batch", (g) => amount(g.step_tokens), "mean tokens of a step"],
  ["Held", (g) => count(g.held)],
  ["Shared", (g) => count(g.shared)],
  ["Cached", (g) => count(g.cached)],
  ["Free", (g) => count(g.free)],
  ["Blocks", (g) => count(g.total)],
  ["Evictions", (g) => amount(g.evictions)],
];

const EXPERT_COLUMNS = [
  ["Group", (g) => String(g.group)],
  ["Layers", (g) => count(g.experts.layers), "that have experts"],
  ["Mean", (g) => g.experts.mean.toFixed(2), "over these layers"],
  ["Most", (g) => g.experts.most.toFixed(2), "in the least even layer"],
  ["Layer", (g) => count(g.experts.layer), "the least even one"],
  ["Expert", (g) => count(g.experts.expert), "the busiest one there"],
];

const part = (value, whole) => percent(whole ? value / whole : null);

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** Writes only what changed, so that assistive technology and the selection are left alone. */
function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export class Panel {
  /** $: finds an element of the page by its id. */
  constructor($) {
    this.$ = $;
    this.figures = FIGURES.map(([name, value, note]) => {
      const [big, unit, small] = [element("b"), element("small"), element("dd", { className: "note" })];
      $("figures").append(element("div", {}, element("dt", {}, name), element("dd", {}, big, " ", unit), small));
      return { value, note, big, unit, small };
    });
    this.legend = LEGEND.map(([state, name, meaning]) => {
      const [swatch, number] = [element("i", { className: `swatch ${state}` }), element("b", {}, "–")];
      $("legend").append(element("li", {}, swatch, number, ` ${name} `, element("span", {}, meaning)));
      return { state, swatch, number };
    });
    this.swatches = this.legend.map(({ swatch }) => swatch);
    this.cache = CACHE.map(([field, name, meaning]) => {
      const [bar, value, unit, tokens] = [element("i", { className: field }), element("b"), element("small"), element("dd", { className: "note" })];
      const title = element("dt", {}, element("i", { className: `swatch ${field}` }), name);
      $("bar").append(bar);
      $("misses").append(element("div", {}, title, element("dd", {}, value, " ", unit), tokens));
      return { field, bar, value, unit, tokens, meaning };
    });
    for (const [body, columns] of [["groups", COLUMNS], ["experts", EXPERT_COLUMNS]]) {
      const titles = columns.map(([name, , title]) => element("th", { scope: "col", title: title ?? "" }, name));
      $(body).previousElementSibling.append(element("tr", {}, ...titles));
    }
  }

  show(answer, sample) {
    for (const { value, note, big, unit, small } of this.figures) {
      const [number, of] = value(sample);
      write(big, number);
      write(unit, number === "–" ? "" : of);
      write(small, sample.epoch === null ? "" : note(sample, answer));
    }
    if (sample.epoch === null) return; // the rest stays as it was last known
    this.showLegend(answer);
    this.showCache(answer.totals);
    this.showRows("groups", COLUMNS, answer.groups);
    const mixtures = answer.groups.filter((group) => group.experts);
    this.showRows("experts", EXPERT_COLUMNS, mixtures);
    this.$("expert-load").hidden = !mixtures.length;
    this.showTotals(answer.totals);
  }

  showLegend({ groups, block_size: blockSize, blocks_per_cell: per }) {
    for (const { state, number } of this.legend) write(number, count(groups.reduce((sum, group) => sum + group[state], 0)));
    write(this.$("cell"), `a cell is ${per === 1 ? "a block" : `${per} blocks`} of ${plural(blockSize, "token")}`);
  }

  showCache(totals) {
    for (const { field, bar, value, unit, tokens, meaning } of this.cache) {
      const [number, of] = part(totals[field], totals.started_tokens);
      bar.style.flexGrow = totals[field];
      write(value, number);
      write(unit, of);
      write(tokens, `${amount(totals[field])} ${meaning}`);
    }
  }

  /** A line for each group in the table whose body has this id. */
  showRows(id, columns, groups) {
    const body = this.$(id);
    while (body.rows.length > groups.length) body.deleteRow(-1);
    groups.forEach((group, index) => {
      const row = body.rows[index] ?? body.insertRow();
      row.dataset.state = group.state;
      columns.forEach(([, text], column) => {
        if (!row.cells[column]) row.append(column ? element("td") : element("th", { scope: "row" }));
        write(row.cells[column], text(group));
      });
    });
  }

  showTotals(totals) {
    const words = [
      `${plural(totals.requests, "request")} since the scheduler started`,
      `${count(totals.finished)} ended`,
      `${count(totals.refused)} refused`,
      `${amount(totals.recomputed_tokens)} tokens computed twice`,
    ];
    write(this.$("totals"), words.join(" · "));
  }
}
