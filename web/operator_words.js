// What the operator's view says about forecasts and machines.

import { percent } from "./charts.js";
import { decimal, rounded, t } from "./language.js";

/** Fewer forecasts say nothing about the next ones. */
const LEAST_TASKS = 10;
const GOOD = { error: 0.15, inside: 0.8 };
const ROUGH = { error: 0.4, inside: 0.6 };

/** Whether the forecast can be believed. stats: of GET /stats. */
export function verdict({ forecasts_compared: count, median_error: error, share_inside_p90: inside }) {
  if (count < LEAST_TASKS) return t("operator.verdict_early", { n: count, least: LEAST_TASKS });
  const within = (most) => error <= most.error && inside >= most.inside;
  const head = within(GOOD) ? "operator.verdict_good" : within(ROUGH) ? "operator.verdict_rough" : "operator.verdict_bad";
  return t("operator.verdict", {
    head: t(head),
    n: count,
    error: percent(Math.max(error, 0.01)),
    inside: percent(inside),
    wanted: percent(0.9),
  });
}

/** 1.5 -> "1.5 times slower", 0.5 -> "2 times faster" */
export function pace(drift) {
  if (drift === undefined) return t("operator.pace_unknown");
  if (drift > 1.05) return t("operator.pace_slower", { n: rounded(drift, 3) });
  if (drift < 1 / 1.05) return t("operator.pace_faster", { n: rounded(1 / drift, 3) });
  return t("operator.pace_same");
}

export function bytes(count) {
  if (count < 1e6) return t("operator.kb", { n: Math.round(count / 1e3) });
  if (count < 1e9) return t("operator.mb", { n: Math.round(count / 1e6) });
  return t("operator.gb", { n: decimal(count / 1e9) });
}

/** The state of the server or of a machine. */
export const stateName = (state) => t(`operator.is_${state}`);

/** The name of a client; tasks from before there were keys, or of everybody, have none. */
export const clientName = (name) => name || t("operator.everybody");
