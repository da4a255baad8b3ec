"""What three tasks say about the next ones: the forecast beside the best that can be known.

    python benchmarks/forecast_after_three.py [--quick]

Laws composed() of forecast_laws.py. Three tasks of random sizes and steps have run; the forecast is
the sum of the seconds of the next seven, as a client sees it who submits the last of them. Each law
has 20 such starts, with 3 % noise.

"Kind known" is an estimator that knows how the law was composed, the distributions of its constants
and the noise, but not the constants; "family known" does not know either which of 7 x 7 x 5 kinds
it is. Both are the median of the Bayesian posterior after the same three tasks. It is sampled by
tempered sequential Monte Carlo (Del Moral, Doucet & Jasra 2006), so they are themselves a little
worse than the best. Laws with drift and with long prompts are left out.
"""

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any

import numpy as np
from common import Results
from forecast_laws import COMPOSED, KLEIN, OTHERS, SIZES, Scenario
from forecast_replay import size_and_steps

from timing_model import Measured, TimingModel, Work

STARTS, SEEN, NEXT, NOISE = 20, 3, 7, 0.03
PARTICLES, TEMPERATURES, MOVES = 1500, 40, 3
EXACT = 0.01
"""Spread of one phase against another: 0 in truth, but then nothing could be sampled."""
LEFT_OUT = ("prompt", "drift")
KINDS = tuple(other for other in OTHERS if other not in LEFT_OUT)
WHO = ("ours", "kind known", "family known")
Floats = Any
Request = tuple[int, int, int]
"""Width, height, steps."""


class Family:
    """Laws composed of some kinds. A law is a point of the unit cube.

    Args:
        step, decoding, others: the kinds that come into question.
    """

    DIMENSIONS = 24

    def __init__(self, step: Sequence[str], decoding: Sequence[str], others: Sequence[str]) -> None:
        self.step, self.decoding, self.others = step, decoding, others

    def phases(self, laws: Floats, requests: Sequence[Request]) -> Floats:
        """(laws, requests, 4): seconds of text encoding, the first step, all later ones, and
        decoding; as composed() computes them."""
        slower, text_s = 10 ** (laws[:, :1] - 0.5), 3 * laws[:, 1:2]
        first, pause = 1 + 7 * laws[:, 2:3], 0.5 + 1.5 * laws[:, 4:5]
        every = _choice(laws[:, 3:4], (4, 8, 10))
        steps = np.array([n for _, _, n in requests], float)
        step_s = slower * _of_size(self.step, laws[:, 5:13], laws[:, 21:22], requests)
        other = self.other(laws)
        first_s = step_s * np.where(other == "first step", first, 1.0)
        first_s = first_s + np.where(other == "compiling", 5 * first, 0.0)
        in_stairs = other == "stairs of steps"
        first_s = first_s * np.where(in_stairs, 1 + 3 * pause, 1.0)
        later = steps - 1 + np.where(in_stairs, 3 * pause * (np.ceil(steps / every) - 1), 0.0)
        decoding_s = slower * _of_size(self.decoding, laws[:, 13:21], laws[:, 22:23], requests)
        text = np.broadcast_to(text_s, step_s.shape)
        return np.maximum(np.stack((text, first_s, step_s * later, decoding_s), axis=2), 1e-6)

    def other(self, laws: Floats) -> Floats:
        """(laws, 1): what there is besides."""
        return _choice(laws[:, 23:24], self.others)


def _of_size(kinds: Sequence[str], u: Floats, kind: Floats, requests: Sequence[Request]) -> Floats:
    """(laws, requests): seconds by width and height."""
    constant, linear, squared = u[:, 0:1], 0.3 + 2.7 * u[:, 1:2], u[:, 2:3]
    bend, factor = 0.4 + 1.4 * u[:, 3:4], 1.3 + 2.7 * u[:, 4:5]
    tile, wide = _choice(u[:, 5:6], (256, 320, 512)), _choice(u[:, 6:7], (0.2, 0.25, 0.5))
    power = 0.6 + 1.6 * u[:, 7:8]
    width, height = (np.array([r[side] for r in requests], float) for side in (0, 1))
    pixels = np.broadcast_to(width * height / 2**20, (len(u), len(requests)))
    sizes = {
        "tiles": np.ceil(width / tile) * np.ceil(height / tile) * tile * tile / 2**20,
        "stairs of pixels": np.ceil(pixels / wide) * wide,
        "stairs of width": np.ceil(width / tile) * tile * height / 2**20,
        "floor": np.maximum(pixels, bend),
    }
    own, x = _choice(kind, kinds), pixels
    for name, size in sizes.items():
        x = np.where(own == name, size, x)
    found = constant + linear * x + squared * x * x
    found = found * np.where((own == "threshold") & (x > bend), factor, 1.0)
    return np.where(own == "power", linear * x**power, found)


def _choice(u: Floats, values: Sequence[Any]) -> Floats:
    return np.array(values)[np.minimum((u * len(values)).astype(int), len(values) - 1)]


def log_likelihood(family: Family, laws: Floats, seen: Floats, requests: list[Request]) -> Floats:
    """Of phases that were measured (requests, 4), under each law. All phases of a task have its
    noise in common."""
    off = np.log(seen) - np.log(family.phases(laws, requests))
    known = seen > 1e-5
    count = known.sum(axis=1)
    mean = np.where(known, off, 0.0).sum(axis=2) / count
    apart = np.where(known, off - mean[:, :, None], 0.0)
    total = -0.5 * (apart**2).sum(axis=(1, 2)) / EXACT**2
    spread = NOISE**2 + EXACT**2 / count
    common = -0.5 * mean**2 / spread
    slow = -0.5 * (mean - math.log(3.0)) ** 2 / spread
    either = np.logaddexp(math.log(0.92) + common, math.log(0.08) + slow)
    common = np.where(family.other(laws) == "outliers", either, common)
    found: Floats = total + common.sum(axis=1)
    return found


def posterior(family: Family, seen: Floats, requests: list[Request], seed: int) -> Floats:
    """Laws, sampled."""
    dice = np.random.default_rng(seed)
    laws = dice.random((PARTICLES, Family.DIMENSIONS))
    value = log_likelihood(family, laws, seen, requests)
    heats = np.linspace(0.0, 1.0, TEMPERATURES + 1) ** 4
    for before, heat in pairwise(heats.tolist()):
        weights = np.exp((heat - before) * (value - value.max()))
        chosen = dice.choice(PARTICLES, PARTICLES, p=weights / weights.sum())
        laws, value = laws[chosen], value[chosen]
        spread = laws.std(axis=0) + 1e-3
        for move in range(MOVES):
            scale = spread * (0.6, 0.05, 0.2)[move % 3]
            only = dice.random(laws.shape) < 0.4
            moved = laws + only * scale * dice.standard_normal(laws.shape)
            inside = ((moved > 0.0) & (moved < 1.0)).all(axis=1)
            own = log_likelihood(family, np.clip(moved, 0.0, 1.0), seen, requests)
            taken = inside & (np.log(dice.random(PARTICLES)) < heat * (own - value))
            laws[taken], value[taken] = moved[taken], own[taken]
    return laws


def drawn(scenario: Scenario, dice: random.Random, request: Request) -> tuple[Work, Measured]:
    """A task, with noise."""
    width, height, steps = request
    tokens = width * height // 256
    params: Any = SimpleNamespace(width=width, height=height, steps=steps, tokens=tokens, prompt="")
    factor = dice.lognormvariate(0.0, NOISE) * (3 if dice.random() < scenario.outliers else 1)
    law = scenario.law(params, KLEIN, 0.0).times(factor)
    work = Work("m", 4.0, tokens, steps, "JPEG", width=width)
    return work, Measured(law.text, law.steps, law.decode, 0.0)


def errors(scenario: Scenario, seed: int) -> list[float]:
    """Of WHO, |forecast / truth - 1|."""
    dice, timing = random.Random(seed), TimingModel()
    requests = [size_and_steps(dice) for _ in range(SEEN + NEXT)]
    tasks = [drawn(scenario, dice, request) for request in requests]
    for work, measured in tasks[:SEEN]:
        timing.learn(work, measured)
    truth_s = sum(measured.gpu_s for _, measured in tasks[SEEN:])
    forecasts_s = [sum(timing.gpu_s([work for work, _ in tasks[SEEN:]]))]
    phases = [
        (m.text_encoding_s, m.step_s[0], sum(m.step_s[1:]), m.decoding_s) for _, m in tasks[:SEEN]
    ]
    seen = np.maximum(np.array(phases), 1e-6)
    step, decoding, other = scenario.name.split(": ")[1].split(", ")
    for family in (Family([step], [decoding], [other]), Family(SIZES, SIZES, KINDS)):
        laws = posterior(family, seen, requests[:SEEN], seed)
        sums_s = family.phases(laws, requests[SEEN:]).sum(axis=(1, 2))
        forecasts_s.append(float(np.median(sums_s)))
    return [abs(forecast_s / truth_s - 1) for forecast_s in forecasts_s]


def main() -> None:
    results = Results(__file__, __doc__)
    rows = []
    laws = [law for law in COMPOSED if not law.name.endswith(LEFT_OUT)]
    for scenario in laws[:2] if results.quick else laws:
        starts = range(4 if results.quick else STARTS)
        own = [*zip(*(errors(scenario, seed) for seed in starts), strict=True)]
        medians = [100 * median(some) for some in own]
        below = [100 * fmean(error < 0.15 for error in some) for some in own]
        rows.append([scenario.name, *medians, *below])
        print(rows[-1], flush=True)
    header = ["law", *(f"{who}: median error %" for who in WHO)]
    header += [f"{who}: % of starts below 15 %" for who in WHO]
    results.table(f"The next {NEXT} tasks, after {SEEN}", header, rows)
    results.save()


if __name__ == "__main__":
    main()
