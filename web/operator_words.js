// What the operator's view says about forecasts and machines.

import { percent } from "./charts.js";
import { some } from "./words.js";

/** Fewer forecasts say nothing about the next ones. */
const LEAST_TASKS = 10;
const GOOD = { error: 0.15, inside: 0.8 };
const ROUGH = { error: 0.4, inside: 0.6 };

/** Whether the forecast can be believed. stats: of GET /stats. */
export function verdict({ forecasts_compared: count, median_error: error, share_inside_p90: inside }) {
  if (count < LEAST_TASKS) {
    return `Too early to say whether the forecast can be believed: ${some(count, "task has", "tasks have")} ended, ${LEAST_TASKS} are needed.`;
  }
  const within = (most) => error <= most.error && inside >= most.inside;
  const head = within(GOOD)
    ? "The forecast can be believed"
    : within(ROUGH)
      ? "The forecast is rough"
      : "The forecast cannot be believed now";
  const most = percent(Math.max(error, 0.01));
  return `${head}: for half of the last ${count} tasks it was within ${most} of the truth, and ${percent(inside)} ended within their p90 (it should be ${percent(0.9)}).`;
}

/** 1.5 -> "1.5 times slower", 0.5 -> "2 times faster" */
export function pace(drift) {
  if (drift === undefined) return "not known";
  const times = (factor) => `${Number(factor.toFixed(factor < 10 ? 2 : 0))} times`;
  if (drift > 1.05) return `${times(drift)} slower`;
  if (drift < 1 / 1.05) return `${times(1 / drift)} faster`;
  return "as before";
}

export function bytes(count) {
  if (count < 1e6) return `${Math.round(count / 1e3)} KB`;
  if (count < 1e9) return `${Math.round(count / 1e6)} MB`;
  return `${(count / 1e9).toFixed(1)} GB`;
}

/** The name of a client; tasks from before there were keys, or of everybody, have none. */
export const clientName = (name) => name || "everybody";
