// Numbers as people read them: a value and its unit. Pure, imports nothing.

const NOTHING = "–";
const grouped = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 0 });

/** Three significant digits at most before a suffix takes over: 8,412 · 31.2k · 4.10M. */
export function amount(value) {
  if (value == null) return NOTHING;
  if (Math.abs(value) < 10 && !Number.isInteger(value)) return value.toFixed(1);
  if (Math.abs(value) < 1e4) return grouped.format(value);
  const [scale, suffix] = value < 1e6 ? [1e3, "k"] : value < 1e9 ? [1e6, "M"] : [1e9, "G"];
  const scaled = value / scale;
  return scaled.toFixed(scaled < 10 ? 2 : scaled < 100 ? 1 : 0) + suffix;
}

/** Every digit. */
export const count = (value) => (value == null ? NOTHING : grouped.format(value));

/** [value, unit] of milliseconds. */
export function latency(ms) {
  if (ms == null) return [NOTHING, ""];
  if (ms >= 1e4) return [(ms / 1e3).toFixed(1), "s"];
  if (ms >= 1e3) return [(ms / 1e3).toFixed(2), "s"];
  return [ms < 10 ? ms.toFixed(1) : ms.toFixed(0), "ms"];
}

/** [value, unit] of a part of one, as a percentage. */
export function percent(part) {
  if (part == null) return [NOTHING, ""];
  const value = 100 * part;
  return [value > 0 && value < 10 ? value.toFixed(1) : value.toFixed(0), "%"];
}

/** Value and unit in one string. */
export const joined = ([value, unit]) => (unit ? `${value} ${unit}` : value);

export function duration(seconds) {
  if (seconds > 0 && seconds < 10) return `${seconds.toFixed(1)} s`;
  const s = Math.floor(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** Seconds since 1970 as the viewer's wall clock. */
export function clock(t, seconds = true) {
  const options = { hour: "2-digit", minute: "2-digit", hour12: false };
  return new Date(1e3 * t).toLocaleTimeString("en-GB", seconds ? { ...options, second: "2-digit" } : options);
}

export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

/** What the number of a scheduler's life says. */
export const restarts = (epoch) => (epoch === 0 ? "never restarted" : epoch === 1 ? "restarted once" : `restarted ${count(epoch)} times`);

/** What a group that is coming up does: "loading weights, 42 %". */
export const startWords = ({ phase, done, total }) => (total ? `${phase}, ${joined(percent(done / total))}` : phase);
