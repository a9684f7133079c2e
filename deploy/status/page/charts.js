// Line charts over one shared span of time, with one shared cursor. SVG, redrawn whole; a few hundred points each.

import { amount, clock, joined, latency, percent } from "./words.js";

const HEIGHT = 104;
const LEFT = 46; // room for the values
const TOP = 14; // room for the word at a mark
const BOTTOM = 20; // room for the times
const GAP_S = 4; // without samples for longer than this, the line breaks

const number = (unit) => ({ read: (value) => [amount(value), value == null ? "" : unit], tick: (value) => amount(value).replace(/\.0+(?=\D|$)/, "") });
const share = { read: percent, tick: (value) => `${Math.round(100 * value * 10) / 10} %` };
const time = { read: latency, tick: (value) => joined(latency(value)).replace(/\.0+ /, " ") };

// least: the smallest top of the axis; top: a fixed one. Each series is [field of a sample, its name].
const CHARTS = [
  { title: "Requests", ...number(""), least: 4, series: [["running", "running"], ["waiting", "queued"], ["preempted", "preempted"]] },
  { title: "Output", ...number("tok/s"), least: 10, series: [["output_tps", ""]] },
  { title: "Prompt", ...number("tok/s"), least: 10, series: [["prompt_tps", ""]] },
  { title: "Prefix hit rate", ...share, top: 1, series: [["hit_rate", ""]] },
  { title: "Time to first token", ...time, least: 1, series: [["ttft_p50_ms", "p50"], ["ttft_p99_ms", "p99"]] },
  { title: "Time per output token", ...time, least: 1, series: [["tpot_p50_ms", "p50"], ["tpot_p99_ms", "p99"]] },
  { title: "Pool", ...share, top: 1, series: [["used", "in use"], ["cached", "cached"]] },
  { title: "Scheduler busy", ...share, least: 0.01, series: [["busy", ""]] },
];

/** The next of 1, 2, 5 times a power of ten: a top of the axis whose half is a round number too. */
export function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 4, 5, 6, 8, 10].find((step) => step * power >= value * (1 - 1e-9));
}

const SVG = "http://www.w3.org/2000/svg";
function svg(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

class Chart {
  constructor(spec) {
    this.spec = spec;
    this.root = document.createElement("figure");
    this.root.innerHTML = `<figcaption><span>${spec.title}</span><span class="reads"></span></figcaption>`;
    this.drawing = svg("svg", { role: "img", height: HEIGHT });
    this.root.append(this.drawing);
    const reads = this.root.querySelector(".reads");
    this.reads = spec.series.map(([, name], index) => {
      const read = document.createElement("span");
      read.className = `read s${index}`;
      read.innerHTML = `${spec.series.length > 1 ? `<i></i>${name} ` : ""}<b></b> <small></small>`;
      reads.append(read);
      return [read.querySelector("b"), read.querySelector("small")];
    });
  }

  /** Values of one sample in the caption. */
  read(sample) {
    this.spec.series.forEach(([field], index) => {
      const [value, unit] = this.spec.read(sample?.[field]);
      this.reads[index][0].textContent = value;
      this.reads[index][1].textContent = unit;
    });
  }

  words(sample) {
    return this.spec.series.map(([field, name]) => `${name} ${joined(this.spec.read(sample[field]))}`.trim()).join(", ");
  }

  draw(samples, from, to, cursor) {
    const width = this.root.clientWidth;
    const floor = HEIGHT - BOTTOM;
    const fields = this.spec.series.map(([field]) => field);
    const highest = samples.reduce((most, sample) => Math.max(most, ...fields.map((field) => sample[field] ?? 0)), 0);
    const top = this.spec.top ?? niceTop(Math.max(1.04 * highest, this.spec.least));
    const x = (t) => LEFT + ((width - LEFT) * (t - from)) / (to - from);
    const y = (value) => floor - ((floor - TOP) * value) / top;
    const parts = [...this.grid(width, y, top), ...times(from, to, width, x), ...marks(samples, x, width, floor)];
    fields.forEach((field, index) => {
      const runs = unbroken(samples, field).map((run) => run.map((sample) => [x(sample.t).toFixed(1), y(sample[field]).toFixed(1)]));
      if (index === 0) parts.push(svg("path", { class: "area", d: runs.map((run) => area(run, floor)).join("") }));
      parts.push(svg("path", { class: `line s${index}`, d: runs.map(line).join("") }));
    });
    parts.push(...this.cursorParts(cursor, x, y, floor));
    this.drawing.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.drawing.setAttribute("width", width);
    const newest = samples.at(-1);
    this.drawing.setAttribute("aria-label", newest ? `${this.spec.title} over time; now ${this.words(newest)}` : this.spec.title);
    this.drawing.replaceChildren(...parts);
    this.read(cursor ?? newest);
  }

  grid(width, y, top) {
    return [0, 0.5, 1].flatMap((part) => {
      const at = Math.round(y(top * part)) + 0.5;
      const rule = svg("line", { class: part ? "rule" : "base", x1: LEFT, x2: width, y1: at, y2: at });
      return [rule, svg("text", { class: "tick value", x: LEFT - 7, y: at + 4 }, part ? this.spec.tick(top * part) : "0")];
    });
  }

  cursorParts(sample, x, y, floor) {
    if (!sample) return [];
    const at = x(sample.t).toFixed(1);
    const dots = this.spec.series.map(([field], index) =>
      sample[field] == null ? null : svg("circle", { class: `dot s${index}`, cx: at, cy: y(sample[field]).toFixed(1), r: 3 }),
    );
    return [svg("line", { class: "now", x1: at, x2: at, y1: TOP, y2: floor }), ...dots.filter(Boolean)];
  }
}

/** Runs of samples where the field is known and time has no gap. */
function unbroken(samples, field) {
  const runs = [];
  let last = null;
  for (const sample of samples) {
    if (sample[field] == null) last = null;
    else {
      if (!last || sample.t - last.t > GAP_S || sample.epoch !== last.epoch) runs.push([]);
      runs.at(-1).push(sample);
      last = sample;
    }
  }
  return runs;
}

const line = (run) => `M${run.map((point) => point.join(" ")).join("L")}${run.length === 1 ? "h.1" : ""}`;
const area = (run, floor) => `M${run[0][0]} ${floor}L${run.map((point) => point.join(" ")).join("L")}L${run.at(-1)[0]} ${floor}Z`;

/** A label at every full minute, or at every so many of them that about five fit. */
function times(from, to, width, x) {
  const every = 60 * Math.max(1, Math.round((to - from) / 60 / Math.max(2, Math.min(6, Math.floor((width - LEFT) / 56)))));
  const labels = [];
  for (let t = Math.ceil(from / every) * every; t < to; t += every) {
    if (x(t) < LEFT + 10 || x(t) > width - 16) continue;
    labels.push(svg("text", { class: "tick time", x: x(t).toFixed(1), y: HEIGHT - 5 }, clock(t, false)));
  }
  return labels;
}

/** Restarts of the scheduler as marks, its absence as a shade. */
function marks(samples, x, right, floor) {
  const parts = [];
  let [epoch, lost] = [null, null];
  const shade = (until) => {
    if (lost !== null) parts.push(svg("rect", { class: "outage", x: x(lost), y: TOP, width: Math.max(1, x(until) - x(lost)), height: floor - TOP }));
    lost = null;
  };
  for (const { t, epoch: next } of samples) {
    if (next == null) lost ??= epoch === null ? null : t; // before its first sign of life it is not missed
    else {
      shade(t);
      if (epoch !== null && next !== epoch) {
        const at = x(t).toFixed(1);
        const word = svg("text", { class: "tick mark", x: at, y: TOP - 4, "text-anchor": at > right - 20 ? "end" : "middle" }, "restart");
        parts.push(svg("line", { class: "mark", x1: at, x2: at, y1: TOP, y2: floor }), word);
      }
      epoch = next;
    }
  }
  shade(samples.at(-1)?.t ?? 0);
  return parts;
}

export class Charts {
  /** when: shows the time of what is read; live: an element whose text is announced. */
  constructor(root, when, live) {
    Object.assign(this, { root, when, live, samples: [], span: 300, at: null });
    this.charts = CHARTS.map((spec) => new Chart(spec));
    root.append(...this.charts.map((chart) => chart.root));
    new ResizeObserver(() => this.draw()).observe(root);
    root.addEventListener("pointermove", (event) => this.point(event));
    root.addEventListener("pointerleave", () => this.move(null));
    root.addEventListener("blur", () => this.move(null));
    root.addEventListener("keydown", (event) => this.key(event));
  }

  update(samples) {
    this.samples = samples;
    this.draw();
  }

  look(span) {
    this.span = span;
    this.draw();
  }

  /** The samples inside the span. */
  visible() {
    const to = this.samples.at(-1)?.t ?? Date.now() / 1e3;
    return [this.samples.filter((sample) => sample.t >= to - this.span), to - this.span, to];
  }

  draw() {
    const [samples, from, to] = this.visible();
    if (this.at !== null && !samples.includes(this.at)) this.at = null;
    this.when.textContent = this.at ? clock(this.at.t) : "now";
    for (const chart of this.charts) chart.draw(samples, from, to, this.at);
  }

  move(sample) {
    if (this.at === sample) return;
    this.at = sample;
    this.draw();
  }

  point(event) {
    const drawing = event.target.closest("figure")?.querySelector("svg");
    const [samples, from, to] = this.visible();
    if (!drawing || !samples.length) return this.move(null);
    const box = drawing.getBoundingClientRect();
    const t = from + ((event.clientX - box.left - LEFT) / (box.width - LEFT)) * (to - from);
    this.move(samples.reduce((best, sample) => (Math.abs(sample.t - t) < Math.abs(best.t - t) ? sample : best)));
  }

  /** Left and right move the cursor through time, with Shift by ten samples; Escape leaves it. */
  key(event) {
    const [samples] = this.visible();
    const last = samples.length - 1;
    const now = this.at ? samples.indexOf(this.at) : last;
    const by = event.shiftKey ? 10 : 1;
    const to = { ArrowLeft: now - by, ArrowRight: now + by, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.move(null);
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.move(samples[Math.max(0, Math.min(last, to))]);
    this.live.textContent = `${clock(this.at.t)}: ${this.charts.map((chart) => `${chart.spec.title} ${chart.words(this.at)}`).join("; ")}`;
  }
}
