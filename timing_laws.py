"""The laws of time of one key, learned from samples: arithmetic only.

Seconds of a phase = scale * law(features) * exp(correction(place)). timing/linear.py has the law,
timing/course.py its factors that depend on the steps, timing/corrections.py the correction near a
place, timing/drift.py the scale of all phases. A new sample is first compared with what was
predicted, which moves the scale; then laws and corrections are fitted again to the latest
SAMPLES_KEPT samples, each divided by the scale at its time, unless its like was drawn before and it
was predicted right (linear.RIGHT).

A fit takes milliseconds. The owner of a model therefore lets a copy learn, and fit itself, while
others read the law: copy(), learn(), prepare().
"""

from collections import deque
from collections.abc import Sequence
from copy import copy
from math import isnan, log, nan
from statistics import fmean, median
from typing import NamedTuple

import numpy as np

from timing.corrections import Corrections, Floats, Ints
from timing.course import GAP_STEPS, Course, Growth
from timing.drift import SAMPLES_KEPT, Scale
from timing.linear import LEAST_S, RIGHT, STALE, LinearLaw, SizeLaw
from timing.speeds import PRIOR_SPEEDS, Product, Speeds, speed_of
from timing.work import REFERENCE_TOKENS, TEXT_TOKENS, Phases, Place, Prior

SAMPLES_TO_TRUST = 3
FIRST_STEP_EXTRA = (0.0, 0.0, 0.1)
"""Extra time of the first step before it was measured: constant, of x, and in steps."""
DECODING_FLOP, TINY_DECODING_FLOP = 10e12, 4e9
UNPACKING_TOKENS = 100
"""A CPU unpacks a quantized matrix before each product: that takes as long as so many tokens."""
TEXT_SHARE = 0.25
"""Of a text encoder that is not described: its parameters / those of the transformer."""
PHASE_S = 0.05
BACKFITS, SAME_POWER = 3, 0.01
"""Rounds of fitting what a step takes by size and by number of steps; less is no change."""
Coefficients = tuple[float, float, float]
LENT_SAMPLES = 30
"""So many samples of another machine are learned from at first; each own one replaces two."""
COMPARED_PLACES = 9
"""Of the latest pictures, two machines are compared at this many."""
PLACES_KEPT = 20_000
"""Size of the cache of predicted places."""


class _Sample(NamedTuple):
    place: Place
    logs: tuple[float, float, float, float]
    """log(seconds) of each phase; NaN: it did not run."""


class GpuLaws:
    """The GPU phases of one key, and their common scale; x and the formulas: timing_model.py."""

    def __init__(self, prior: Prior, speeds: Speeds = PRIOR_SPEEDS) -> None:
        step, text, decoding = prior_coefficients(prior, speeds)
        self.text, self.step, self.decoding = LinearLaw(text), SizeLaw(step), SizeLaw(decoding)
        self.first_step = LinearLaw(FIRST_STEP_EXTRA)
        self.course, self.growth = Course(), Growth()
        self.repeated_text = 1.0
        """Part of text encoding that a prompt takes that was encoded before: 0 where mflux keeps
        the embeddings, 1 where it does not, and before a repeated prompt was measured."""
        self.scale = Scale()
        self._samples: deque[_Sample] = deque(maxlen=SAMPLES_KEPT)
        self._count = self._lent = self._repeats = self._unfitted = 0
        self._must_fit = False
        """Before the next forecast, because of a sample that was predicted wrong."""
        self._numbers: dict[object, int] = {}
        self._corrections: tuple[Corrections, Corrections] | None = None
        self._seen = (float("inf"), 0.0)
        self._known: dict[Place, Phases] = {}
        """Predicted by the laws as they are now, at scale 1. Replaced when they are fitted again:
        copies share it."""
        self._steps: dict[Place, tuple[float, bool, float]] = {}
        """What pace() compares with: predicted seconds, and how well they are known."""
        self._asked: dict[Place, None] = {}

    def copy(self) -> "GpuLaws":
        """A law that learns without changing this one. Readers may use this one meanwhile."""
        other = copy(self)
        other.scale, other.course = self.scale.copy(), self.course.copy()
        other._samples = self._samples.copy()
        other._asked, other._steps = {}, {}
        return other

    def prepare(self, before: "GpuLaws") -> None:
        """Fit, and predict what the law before this one was asked for: then phases() is quick."""
        if self._must_fit:
            self._fit()
        self._expected(list(before._asked))

    def lent(self, by: float) -> "GpuLaws":
        """What another machine starts with: the same law, slower by exp(by)."""
        other = self.copy()
        if other._unfitted:
            other._fit()
        other.scale.move(by)
        while len(other._samples) > LENT_SAMPLES:
            other._samples.popleft()
        other._lent, other._count = len(other._samples), 0
        return other

    def times_slower_than(self, other: "GpuLaws") -> float:
        """The median of seconds here / seconds there, at the places of the latest samples here."""
        places = [sample.place for sample in list(self._samples)[-COMPARED_PLACES:]]
        both = zip(places, self._predicted(places), other._predicted(places), strict=True)
        slower = median(_whole(own, p.steps) / _whole(theirs, p.steps) for p, own, theirs in both)
        return slower * self.scale.value / other.scale.value

    @property
    def samples(self) -> int:
        """Pictures that were learned, of this machine."""
        return self._count

    @property
    def is_measured(self) -> bool:
        """On this machine or another one."""
        return self._count > 0 or self._lent > 0

    def is_far(self, x: float) -> bool:
        """From the sizes seen."""
        least, most = self._seen
        return x < least / 2 or x > most * 2

    def phases(self, places: Sequence[Place]) -> list[Phases]:
        """Predicted seconds of pictures."""
        if len(self._known) + len(places) > PLACES_KEPT:
            self._known, self._asked = {}, {}
        self._asked |= dict.fromkeys(places)
        if self._must_fit:
            self._fit()
        return self._expected(places)

    def text_s(self, place: Place) -> float:
        """Predicted seconds of text encoding; perhaps without the latest samples."""
        return self._expected([place])[0].text

    def _expected(self, places: Sequence[Place]) -> list[Phases]:
        """As phases(); perhaps without the latest samples."""
        if new := [place for place in dict.fromkeys(places) if place not in self._known]:
            self._known.update(zip(new, self._predicted(new), strict=True))
        scale = self.scale.value
        return [Phases(*(scale * s for s in self._known[place])) for place in places]

    def _predicted(self, places: Sequence[Place]) -> list[Phases]:
        """At scale 1."""
        seconds = self._by_law(places) * np.exp(self._corrections_at(places))
        return [Phases(*row) for row in seconds.tolist()]

    def _corrections_at(self, places: Sequence[Place]) -> Floats:
        """(places, 4)"""
        if self._corrections is None:
            return np.zeros((len(places), 4))
        texts, pictures = self._corrections
        text = texts.at(*_texts(places, self._numbers))
        return np.concatenate((text, pictures.at(*_pictures(places, self._numbers)))).T

    def learn(self, place: Place, measured: Phases, later_s: Sequence[float] = ()) -> None:
        """Take in the seconds of a picture; a phase that did not run is NaN.

        Args:
            later_s: of each step after the first one.
        """
        if self._unfitted > STALE * len(self._samples):
            self._fit()
        is_right = False
        if self._corrections:
            (predicted,) = self._expected([place])
            where, (number,) = _pictures([place], self._numbers)
            seen = self._corrections[1].knows(int(number))
            is_right = seen and _is_right(measured, predicted)
            self.scale.follow(
                log(_whole(measured, place.steps, predicted) / _whole(predicted, place.steps)),
                seen=seen,
                near=float(self._corrections[1].near(where)[0]),
            )
        else:
            self.scale.start()
        self.course.learn(later_s)
        logs = [log(max(s, LEAST_S)) if not isnan(s) else s for s in measured]
        self._samples.append(_Sample(place, (logs[0], logs[1], logs[2], logs[3])))
        for _ in range(min(self._lent, 2)):
            self._samples.popleft()
            self._lent -= 1
        self._count += 1
        self._unfitted += 1
        self._must_fit = self._must_fit or not is_right
        self._steps.clear()
        self._seen = (min(self._seen[0], place.x), max(self._seen[1], place.x))

    def pace(self, place: Place, step_s: float, steps: int) -> float:
        """By what factor forecasts would change if a picture ended now.

        Args:
            step_s: mean seconds of its steps after the first one; steps: how many it has had.
        """
        if self._corrections is None:
            return 1.0
        if place not in self._steps:
            (predicted,) = self._expected([place])
            where, (number,) = _pictures([place], self._numbers)
            corrections = self._corrections[1]
            near = float(corrections.near(where)[0])
            self._steps[place] = predicted.step, corrections.knows(int(number)), near
        predicted_s, seen, near = self._steps[place]
        predicted_s *= self.course.mean(steps) / self.course.mean(place.steps)
        return self.scale.foreseen(log(max(step_s, LEAST_S) / predicted_s), seen=seen, near=near)

    def learn_repeated_text(self, part: float) -> None:
        """A prompt was encoded again, in this part of the time of a new one."""
        gain = 0.5 if self._repeats else 1.0
        self.repeated_text += gain * (min(part, 1.0) - self.repeated_text)
        self._repeats += 1

    def _by_law(self, places: Sequence[Place]) -> Floats:
        """(places, 4): seconds at scale 1, without corrections."""
        sides = np.array([place.sides for place in places])
        step = self.step.at(sides) * self.growth.at(_steps(places))
        phases = (
            self.text.at(np.array([_text_features(place) for place in places])),
            step + self.first_step.at(_first_features(sides, step)),
            step * self._courses(places),
            self.decoding.at(sides),
        )
        return np.maximum(np.array(phases).T, LEAST_S)

    def _courses(self, places: Sequence[Place]) -> Floats:
        """(places): mean seconds of the later steps / usual seconds."""
        return np.array([self.course.mean(place.steps) for place in places])

    def _fit(self) -> None:
        """Fit the laws to the samples, and the corrections to what they leave over."""
        self.text, self.step = copy(self.text), copy(self.step)  # copies of this one share them
        self.decoding, self.first_step = copy(self.decoding), copy(self.first_step)
        self.growth = copy(self.growth)
        self.course.settle()
        places = [sample.place for sample in self._samples]
        names = dict.fromkeys(name(place) for place in places for name in (_text, _picture))
        self._numbers = {name: number for number, name in enumerate(names)}
        drift = self.scale.at_samples(len(places))[:, None]
        logs = np.array([sample.logs for sample in self._samples]) - drift
        sides = np.array([place.sides for place in places])
        seconds = np.exp(logs)
        self.text.fit(np.array([_text_features(place) for place in places]), seconds[:, 0])
        self.decoding.fit(sides, seconds[:, 3])
        usual, steps = seconds[:, 2] / self._courses(places), _steps(places)
        extra = np.maximum(seconds[:, 1] - usual, 0.0)
        if np.isnan(extra).all():
            self.step.fit(sides, seconds[:, 1] / (1.0 + FIRST_STEP_EXTRA[2]))
        else:
            latest = {_picture(place): number for number, place in enumerate(places)}
            self._fit_step(sides, steps, usual, np.array(sorted(latest.values())))
        step = self.step.at(sides) * self.growth.at(steps)
        self.first_step.fit(_first_features(sides, step), extra, unit=step)
        residuals = (logs - np.log(self._by_law(places))).T
        self._corrections = (
            Corrections(*_texts(places, self._numbers), residuals[:1]),
            Corrections(*_pictures(places, self._numbers), residuals[1:]),
        )
        self._unfitted, self._must_fit = 0, False
        self._known = {}
        self._steps.clear()

    def _fit_step(self, sides: Floats, steps: Floats, seconds: Floats, once: Ints) -> None:
        """What a step takes by the size, and by the number of steps, one after the other: the
        backfitting of additive models (Hastie & Tibshirani 1986).

        Args:
            once: the latest samples of each request. Twenty runs of one say no more about others.
        """
        known = once[~np.isnan(seconds[once])]
        logs = np.log(np.maximum(seconds[known], LEAST_S))
        for _ in range(BACKFITS):
            before = self.growth.power
            self.step.fit(sides, seconds / self.growth.at(steps))
            law = np.log(np.maximum(self.step.at(sides[known]), LEAST_S))
            self.growth.fit(steps[known], logs - law)
            if abs(self.growth.power - before) < SAME_POWER:
                return


def prior_coefficients(prior: Prior, speeds: Speeds) -> tuple[Coefficients, ...]:
    """Of a step, of text encoding and of decoding, before anything was measured.

    A step is 2 FLOP for each parameter and each token, those of the text included; attention adds a
    tenth at x = 1. Text encoding is 2 FLOP for each parameter and each token. Decoders need 10
    TFLOP at x = 1 (the convolutions of a VAE with 128 to 512 channels), those of tiny models about
    as much as a step.

    mflux's own table (README of releases 0.3 to 0.10, "Image generation speed") has FLUX.1 schnell,
    2 steps, 1024 x 1024, loading included: M2 Ultra below 15 s, M4 Max 19 s, M3 Max 20 s, M2 Max 25
    s, M4 Pro 34 s, M2 Pro 54 s, M1 Max 55 s. With 0.8 of each GPU's peak in float32 (27.2, 18.4,
    14.2, 13.6, 9.2, 6.8, 10.4 TFLOP/s) the prior says 12, 18, 23, 24, 35, 47, 31 s without loading.
    tests/test_family_work.py has what the READMEs of other families say.

    Args:
        speeds: of large products; mflux reaches about that.
    """
    flop_per_s = speed_of(speeds, prior.product)
    per_token = 2 * prior.parameters_b * 1e9 / flop_per_s
    step_x = per_token * REFERENCE_TOKENS
    text_b = TEXT_SHARE * prior.parameters_b if prior.text_b is None else prior.text_b
    text_product = prior.text_product or prior.product
    text_token = 2 * text_b * 1e9 / speed_of(speeds, text_product)
    text_s = text_token * TEXT_TOKENS
    step_tokens = prior.step_text_tokens + _unpacking(prior.product)
    text_tokens = prior.fixed_text_tokens + _unpacking(text_product)
    decoding_flop = min(DECODING_FLOP, max(step_x * flop_per_s, TINY_DECODING_FLOP))
    decoding_x = decoding_flop / speed_of(speeds, Product.CONVOLUTION)
    return (
        (per_token * step_tokens, step_x, 0.1 * step_x),
        (PHASE_S + text_token * text_tokens, text_s, 0.05 * decoding_x + 2 * text_s),
        (PHASE_S, decoding_x, 0.05 * decoding_x),
    )


def _unpacking(product: Product) -> int:
    return UNPACKING_TOKENS if product in (Product.Q4, Product.Q8) else 0


def mean_step_s(steps_s: Sequence[float]) -> float:
    """Of the steps after the first; NaN: there are none. One of more than GAP_STEPS times their
    median contains a gap, and counts as the median."""
    if not steps_s:
        return nan
    usual = median(steps_s)
    return fmean(step if step <= GAP_STEPS * usual else usual for step in steps_s)


def _steps(places: Sequence[Place]) -> Floats:
    return np.array([max(place.steps, 1) for place in places], float)


def _text_features(place: Place) -> tuple[float, float, float]:
    return (1.0, place.text, place.input_x)


def _first_features(sides: Floats, step_s: Floats) -> Floats:
    return np.array((np.ones(len(sides)), sides[:, 0] * sides[:, 1], step_s)).T


def _text(place: Place) -> object:
    """Names exactly this text encoding."""
    return place.text, place.input_x, _picture(place)


def _picture(place: Place) -> object:
    """Names exactly this picture."""
    return place.x, place.steps, place.width


def _texts(places: Sequence[Place], numbers: dict[object, int]) -> tuple[Floats, Ints]:
    where = [(log(p.x), log(p.text + 0.1), 0.0) for p in places]
    return np.array(where), np.array([numbers.get(_text(p), -1) for p in places], np.intp)


def _pictures(places: Sequence[Place], numbers: dict[object, int]) -> tuple[Floats, Ints]:
    where = [(log(p.x), log(max(p.steps, 1)), p.aspect) for p in places]
    return np.array(where), np.array([numbers.get(_picture(p), -1) for p in places], np.intp)


def _is_right(measured: Phases, predicted: Phases) -> bool:
    """Whether all phases that ran took about as long as predicted."""
    both = zip(measured, predicted, strict=True)
    return all(isnan(own) or abs(log(max(own, LEAST_S) / p)) <= RIGHT for own, p in both)


def _whole(phases: Phases, steps: int, instead: Phases | None = None) -> float:
    """Seconds of a picture; those phases that did not run count as `instead`."""
    text, first, step, decoding = (
        own if instead is None or not isnan(own) else other
        for own, other in zip(phases, instead or phases, strict=True)
    )
    return max(text + first + (steps - 1) * step + decoding, LEAST_S)
