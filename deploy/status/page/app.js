// The status page: asks for /status.json once a second while it is seen, and hands what came to the parts beside this file.
// It never needs a reload: a lost connection, a restarted scheduler and a refused key are states of the page.

import { Charts } from "./charts.js";
import { PoolMaps } from "./map.js";
import { Panel } from "./panel.js";
import { clock, duration, plural, restarts, startWords } from "./words.js";

const PERIOD_MS = 1000;
const TIMEOUT_MS = 10000;
const KEPT_SAMPLES = 1800;
const MISSED_S = 5; // after a longer pause, what was missed comes from the server's history
const RESTART_NOTICE_S = 30;
const MODEL = new URLSearchParams(location.search).get("model"); // of several; without one, the first is shown

const $ = (id) => document.getElementById(id);
const now = () => Date.now() / 1e3;

const panel = new Panel($);
const maps = new PoolMaps($("maps"), $("tip"), panel.swatches);
const charts = new Charts($("charts"), $("when"), $("live"));

const samples = [];
let newest = null; // the last document
let failing = null; // since when none comes
let restart = null; // when a restart of the scheduler was last seen

// ---- asking ----------------------------------------------------------------------------------------------------------

let timer = 0;
let asking = false;
let key = recall("sessionStorage", "manta-key");

async function ask() {
  const missed = !newest || failing !== null || now() - received > MISSED_S;
  const query = new URLSearchParams(missed ? {} : { history: 0 });
  if (MODEL) query.set("model", MODEL);
  const answer = await fetch(`status.json?${query}`, {
    headers: key ? { Authorization: `Bearer ${key}` } : {},
    signal: AbortSignal.timeout(TIMEOUT_MS),
    cache: "no-store",
  });
  if (answer.status === 401 || answer.status === 403) return lock();
  if (!answer.ok) throw new Error(`HTTP status ${answer.status}`);
  take(await answer.json());
  failing = null;
  received = now();
  show();
}

let received = 0;

async function poll() {
  clearTimeout(timer);
  if (asking || document.hidden) return;
  asking = true;
  const began = performance.now();
  try {
    await ask();
  } catch {
    failing ??= now();
    showState();
  }
  asking = false;
  if ($("access").hidden) timer = setTimeout(poll, Math.max(0, PERIOD_MS - (performance.now() - began)));
}

/** Adds the samples that are new. A scheduler that was seen before and counts a new epoch has been restarted. */
function take(answer) {
  for (const row of [...answer.history, answer.now]) {
    const sample = Object.fromEntries(answer.columns.map((name, index) => [name, row[index]]));
    if (samples.length && sample.t <= samples.at(-1).t) continue;
    const before = samples.findLast((earlier) => earlier.epoch !== null);
    if (before && sample.epoch !== null && sample.epoch !== before.epoch) restart = sample.t;
    samples.push(sample);
  }
  samples.splice(0, samples.length - KEPT_SAMPLES);
  newest = answer;
}

// ---- showing ---------------------------------------------------------------------------------------------------------

function show() {
  showState();
  panel.show(newest, samples.at(-1));
  if (newest.groups.length) maps.update(newest);
  charts.update(samples);
}

const PHASES = {
  starting: "Starting",
  ready: "Ready",
  degraded: "No group is up",
  failed: "The start failed",
  stopped: "Stopped",
  unreachable: "No scheduler",
};

/** [kind, a word, a sentence where there is something to say]. Times, not counts of seconds: nothing chatters. */
function state() {
  if (failing !== null) {
    return ["lost", "Connection lost", `No answer from this endpoint since ${clock(failing)}. Asking again every second.`];
  }
  const { phase, progress, connected } = newest;
  const word = PHASES[phase] ?? phase;
  if (phase === "failed") return ["lost", word, progress.at(-1)];
  if (samples.at(-1).epoch === null && samples.some((sample) => sample.epoch !== null)) {
    return ["lost", "No scheduler", "The scheduler cannot be reached. Requests are refused until it is back; this page goes on by itself."];
  }
  if (phase === "starting") return [phase, word, startLines(newest)];
  if (phase === "degraded") return [phase, word, ["Requests wait until a group is up.", startLines(newest)].join("\n")];
  if (phase !== "ready") return ["lost", word, progress.at(-1) ?? ""];
  if (!connected) return ["connecting", "Connecting", "This front end is opening its stream to the scheduler."];
  const recent = restart !== null && samples.at(-1).t - restart < RESTART_NOTICE_S;
  return [phase, word, recent ? `The scheduler was restarted at ${clock(restart)}. Its counters and caches begin anew.` : ""];
}

/** What the start is doing: each group that is coming up, or the last words. */
function startLines({ progress, starting }) {
  const groups = starting.slice(0, 8).map((start) => `Group ${start.group}: ${startWords(start)}`);
  if (starting.length > 8) groups.push(`and ${plural(starting.length - 8, "more group")}`);
  return (groups.length ? groups : progress.slice(-2)).join("\n");
}

function showState() {
  const [kind, word, sentence] = state();
  $("phase").dataset.phase = kind;
  $("phase").lastElementChild.textContent = word;
  document.body.dataset.phase = kind;
  if ($("notice").textContent !== sentence) $("notice").textContent = sentence;
  const epoch = samples.at(-1)?.epoch ?? null;
  $("since").textContent = epoch === null ? "" : `scheduler up ${duration(newest.uptime_s)}, epoch ${epoch}: ${restarts(epoch)}`;
  showModels();
  document.title = `${kind === "ready" ? "" : `${word} · `}${newest ? `${newest.model} · ` : ""}Manta`;
}

/** The name of the model; of several, all of them, each a link to its own page. */
function showModels() {
  const names = newest?.models.length > 1 ? newest.models : [];
  if (!names.length) $("model").textContent = newest?.model ?? "";
  if ($("model").dataset.names === names.join("\n")) return;
  $("model").dataset.names = names.join("\n");
  if (!names.length) return;
  const links = names.map((name) => {
    const link = document.createElement("a");
    link.href = `?${new URLSearchParams({ model: name })}`;
    link.textContent = name;
    if (name === newest.model) link.setAttribute("aria-current", "page");
    return link;
  });
  $("model").replaceChildren(...links);
}

// ---- the API key -----------------------------------------------------------------------------------------------------

function lock() {
  $("access").hidden = false;
  document.querySelector("main").hidden = true;
  $("refused").textContent = key ? "This key was refused." : "";
  $("phase").dataset.phase = "locked";
  $("phase").lastElementChild.textContent = "Locked";
  $("key").focus();
}

$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  keep("sessionStorage", "manta-key", key);
  $("key").value = "";
  $("access").hidden = true;
  document.querySelector("main").hidden = false;
  poll();
});

// ---- light and dark --------------------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];
let theme = recall("localStorage", "manta-theme") ?? "auto";

function showTheme() {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme[0].toUpperCase() + theme.slice(1);
  $("theme").setAttribute("aria-label", `Colours: ${theme}. Change to ${nextTheme()}.`);
  maps.paint();
}

const nextTheme = () => THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];

$("theme").addEventListener("click", () => {
  theme = nextTheme();
  keep("localStorage", "manta-theme", theme);
  showTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => maps.paint());

// ---- storage, which a browser may forbid: then a choice holds until the page is left ------------------------------------

function recall(storage, name) {
  try {
    return window[storage].getItem(name);
  } catch {
    return null;
  }
}

function keep(storage, name, value) {
  try {
    window[storage].setItem(name, value);
  } catch {
    return;
  }
}

// ---- begin -----------------------------------------------------------------------------------------------------------

$("span").addEventListener("change", (event) => charts.look(Number(event.target.value)));
document.addEventListener("visibilitychange", poll);
showTheme();
poll();
