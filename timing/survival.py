"""What is left of something that is late: arithmetic only."""

from math import exp, hypot, log, pi, sqrt

LEAST_SIGMA = 0.05
"""Spread of a single step or phase, at the least."""
MOST_SIGMA = 1.8
"""With this spread, something very late is expected to take about as long again as it has taken."""
LEAST_PHASE_S = 0.01


def remaining(forecast_s: float, elapsed_s: float, sigma: float) -> float:
    """Median of the remaining seconds of what has taken elapsed_s, if forecast_s was the median.

    Survival of a log-logistic distribution with S(t) = 1 / (1 + (t / m)^b), m = forecast_s: the
    median of all t that are above the elapsed ones (Bennett 1983, "Log-logistic regression models
    for survival data"). Once something is late, its lateness adds to the spread, up to MOST_SIGMA.
    So the remainder grows with the elapsed time: what takes ten times as long as forecast is soon
    expected to take as long again as it has taken.
    """
    if elapsed_s <= 0.0:
        return forecast_s
    median_s = max(forecast_s, LEAST_PHASE_S)
    lateness = log(elapsed_s / median_s)
    spread = max(sigma, LEAST_SIGMA)
    if lateness > 0.0:
        spread = max(spread, min(hypot(spread, lateness), MOST_SIGMA))
    shape = pi / (sqrt(3.0) * spread)
    if lateness > 0.0:
        return elapsed_s * (exp(log(2.0 + exp(-shape * lateness)) / shape) - 1.0)
    return median_s * exp(log(1.0 + 2.0 * exp(shape * lateness)) / shape) - elapsed_s
