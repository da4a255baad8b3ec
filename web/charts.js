// Charts of the operator's view, as SVG: forecast against truth, and busy hours.

import { LOCALE, rounded, t } from "./language.js";

const NS = "http://www.w3.org/2000/svg";
const EDGE = { left: 52, right: 10, top: 8, bottom: 34 };
const LEAST_RATIO = 4;
const TICK_WIDTH = 70;
const BARS = { height: 76, words: 16 };

function svg(tag, attributes, ...children) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const titled = (words) => svg("title", {}, words);

/** 0.0025 -> "2.5 ms", 0.25 -> "0.25 s", 90 -> "90 s", 7200 -> "2 h" */
export function exact(seconds) {
  if (seconds > 0 && seconds < 0.1) return t("operator.ms", { n: rounded(seconds * 1000) });
  if (seconds < 10) return t("words.duration_s", { n: rounded(seconds) });
  if (seconds < 600) return t("words.duration_s", { n: Math.round(seconds) });
  if (seconds < 7200) return t("words.duration_min", { n: Math.round(seconds / 60) });
  return t("words.duration_h", { n: rounded(seconds / 3600) });
}

export const isLate = (task) => task.actual_s > task.p90_s;

function median(values) {
  const sorted = [...values].sort((one, other) => one - other);
  return sorted[Math.floor(sorted.length / 2)];
}

/** Round values between low and high: 1, 2, 5, 10, ..., or only powers of ten if these are too many. */
function ticks(low, high, most) {
  const found = [];
  for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10) {
    found.push(...[1, 2, 5].map((digit) => digit * power).filter((value) => value >= low && value <= high));
  }
  if (found.length <= most) return found;
  const tens = found.filter((value) => Number.isInteger(Math.round(Math.log10(value) * 1e6) / 1e6));
  return tens.length > 1 ? tens : found;
}

/** The same range on both axes, so that the diagonal is the exact forecast. */
function range(tasks) {
  const values = tasks.flatMap((task) => [task.forecast_s, task.actual_s]).filter((seconds) => seconds > 0);
  const low = Math.min(...values) / 1.25;
  const high = Math.max(...values) * 1.25;
  const wider = Math.max(1, Math.sqrt(LEAST_RATIO / (high / low)));
  return { low: low / wider, high: high * wider };
}

/** tasks: last_tasks of GET /stats, at least one. Logarithmic axes: forecast to the right, truth upwards. */
export function scatter(tasks, width) {
  const height = Math.round(Math.min(width * 0.72, 420));
  const { low, high } = range(tasks);
  const part = (seconds) => Math.log(Math.max(seconds, low) / low) / Math.log(high / low);
  const x = (seconds) => EDGE.left + part(seconds) * (width - EDGE.left - EDGE.right);
  const y = (seconds) => height - EDGE.bottom - part(seconds) * (height - EDGE.top - EDGE.bottom);
  const line = (kind, factor) =>
    svg("line", { class: kind, x1: x(low), y1: y(low * factor), x2: x(high / factor), y2: y(high) });
  const values = ticks(low, high, (width - EDGE.left) / TICK_WIDTH);
  return svg(
    "svg",
    { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": "verdict" },
    ...values.flatMap((value) => [
      svg("line", { class: "rule", x1: x(value), x2: x(value), y1: EDGE.top, y2: height - EDGE.bottom }),
      svg("line", { class: "rule", x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) }),
      svg("text", { x: x(value), y: height - EDGE.bottom + 15, "text-anchor": "middle" }, exact(value)),
      svg("text", { x: EDGE.left - 6, y: y(value) + 4, "text-anchor": "end" }, exact(value)),
    ]),
    svg("text", { x: width - EDGE.right, y: height - 4, "text-anchor": "end" }, t("operator.forecast_axis")),
    svg("text", { x: EDGE.left + 6, y: EDGE.top + 12 }, t("operator.truth_axis")),
    line("exact", 1),
    line("p90", Math.max(median(tasks.map((task) => task.p90_s / task.forecast_s)), 1)),
    ...tasks.map((task) => point(task, x(task.forecast_s), y(task.actual_s))),
  );
}

function point(task, x, y) {
  const times = { forecast: exact(task.forecast_s), time: exact(task.actual_s) };
  const words = titled(t("operator.point", { model: task.model ?? t("operator.legend_task"), ...times }));
  if (!isLate(task)) return svg("circle", { class: "point", cx: x, cy: y, r: 3.5 }, words);
  return svg("path", { class: "point late", d: `M${x - 4} ${y - 4}l8 8m0-8l-8 8` }, words);
}

/** With a space at which lines do not break. */
export const percent = (share) => `${Math.round(share * 100)}\u00a0%`;

export const hourWords = (unix) =>
  new Date(unix * 1000).toLocaleTimeString(LOCALE, { hour: "2-digit", minute: "2-digit" });

/** One of busy_hours of GET /stats. */
export function bars({ machine, starts_at: start, shares }, width) {
  const step = width / shares.length;
  const full = BARS.height - BARS.words;
  const mean = shares.reduce((sum, share) => sum + share, 0) / shares.length;
  return svg(
    "svg",
    {
      width,
      height: BARS.height,
      viewBox: `0 0 ${width} ${BARS.height}`,
      role: "img",
      "aria-label": t("operator.busy_of", { machine, share: percent(mean), n: shares.length }),
    },
    ...shares.map((share, index) => {
      const high = share > 0 ? Math.max(share * full, 2) : 0;
      const place = { x: index * step + 1, y: full - high, width: step - 2, height: high };
      return svg("rect", { class: "busy", ...place }, titled(`${hourWords(start + index * 3600)}: ${percent(share)}`));
    }),
    svg("line", { class: "rule", x1: 0, x2: width, y1: 0.5, y2: 0.5 }),
    svg("line", { class: "rule", x1: 0, x2: width, y1: full + 0.5, y2: full + 0.5 }),
    svg("text", { x: 0, y: BARS.height - 3 }, hourWords(start)),
    svg("text", { x: width, y: BARS.height - 3, "text-anchor": "end" }, t("queue.now")),
  );
}
