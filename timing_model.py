"""How long a task takes: arithmetic only, no clock, no files, no threads.

A task's time is a sum of phases (x = latent tokens / 4096, so x = 1 is 1024 x 1024 pixels; n =
steps; t = tokens of the text / 512). Of each phase, per key (model, quantization, and what else
changes the work of a step):

    seconds = scale * law * exp(correction)

    law of text encoding     a + b t (+ c x)        once per task; once per image, with the term in
                                                    x, for pipelines that also encode input images
    law of a step            (d + e x + f x^2) n^m  linear layers cost x, attention x^2
    law of the first step    in addition g + h x + i step  (compilation, allocation)
    course of the others     each step has a factor, in all pictures
    law of decoding          j + k x + l x^2        convolutions, attention of the middle block
    image encoding           p + q x                by file format, off the GPU; no scale

1. The law is what the architecture says. If it is clearly wrong, x is something else than pixels:
   tiles, columns, rows, other stairs, at least some size; and some pictures take longer by a
   factor: above a size, because memory is swapped or another algorithm is used; with sides that are
   no multiples of a number; if they are not square (timing/shapes.py, up to three together). The
   power m and the factors of the steps are 0 and 1 unless pictures show otherwise: some steps of
   each picture are slower, or all steps of those with many (timing/course.py).
   Before the first measurement of a key it is the prior (confidence "none"): a step and text
   encoding are about 2 FLOP per parameter and token, at the measured speed of their kind of product
   (timing/speeds.py); before that 10 TFLOP/s (an Apple M2 Max in bfloat16).
   timing_laws.prior_coefficients compares it with published seconds. The p90 is then PRIOR_P90
   times the forecast.
2. The correction is what the law gets wrong near a size and a number of steps. It is learned from
   residuals, shrunk by their number and noise, and fades where nothing was seen. Two runs of one
   request decide about that request, whatever the law (timing/corrections.py).
3. The scale is the drift of the machine: heat, other load, sudden changes (timing/drift.py).
4. A repeated prompt takes a part of its text encoding that is measured per key: about 0 where mflux
   keeps the embeddings, 1 where it does not.
5. A running task is forecast at its own pace. If a phase is late, the rest is predicted from
   its elapsed time (timing/live.py, timing/survival.py): the countdown never ends before the task.
   What waits behind it is forecast as if its pace were learned now: pace().
6. The p90 of a wait is a quantile of earlier errors, whose level follows how many tasks took longer
   than theirs (timing/spread.py).
7. Each machine has laws of its own: of(). One that has never run a key starts with the samples of
   another one, at the ratio of their speeds on what both have run, or of their measured speeds.

Not learned: impossible durations, and steps that contain a gap (GAP_STEPS in timing/course.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import log, nan
from statistics import median

from timing.linear import OneLaw
from timing.speeds import PRIOR_SPEEDS, Product, Speeds, speed_of
from timing.spread import LONGEST_S
from timing.work import Confidence, Durations, Live, Measured, Phases, Prior, Work
from timing_laws import SAMPLES_TO_TRUST, GpuLaws, mean_step_s

__all__ = ["LOCAL", "Confidence", "Durations", "Live", "Measured", "TimingModel", "Work"]

LOCAL = "local"
"""Name of the machine that the server runs on."""
FORECASTS_KEPT = 10_000
"""Size of the cache of durations, which the next sample empties."""
PRIOR_LOAD_BYTES_PER_S = 1e9
PRIOR_P90 = 3.0
"""Before the first measurement, nine of ten tasks take less than this multiple of the forecast."""
PRIOR_SIGMA = log(PRIOR_P90) / 1.2816
"""The same as spread of log(truth / forecast)."""
MEASURED_LOAD_SIGMA = 0.1
"""A second load takes about as long as the first, but for what the system keeps of its files."""
CACHED_TEXT = 0.1
"""If text encoding took less than this part of its forecast, the embeddings were cached, and the
sample says nothing about a new prompt."""


Sample = tuple[Work, Measured]


@dataclass(frozen=True)
class Learned:
    """What a model becomes with some samples more: TimingModel.learned()."""

    samples: Sequence[Sample]
    count: int
    """How often the model had learned before."""
    laws: dict[str, GpuLaws]
    image_encoding: dict[str, OneLaw]


class _Machines:
    """What the models of several machines share."""

    def __init__(self) -> None:
        self.models: dict[str, TimingModel] = {}
        self.version = 0

    @property
    def all(self) -> "list[TimingModel]":
        return list(self.models.values())

    def learned_by(self, model: "TimingModel") -> None:
        self.version += 1
        for other in self.all:
            if other is model or other.borrows:
                other.forget_forecasts()


class TimingModel:
    """Learns durations from finished tasks. Not thread-safe: the owner holds a lock, except for
    learned(), which changes nothing.

    Each machine has a model of its own: of(). One that has never run a key forecasts it from the
    machine that has run it most, scaled by the speed of the two on what both have run. Its own
    samples then replace the other's.
    """

    def __init__(
        self,
        speeds: Speeds = PRIOR_SPEEDS,
        machine: str = LOCAL,
        beside: "TimingModel | None" = None,
    ) -> None:
        self.speeds = speeds
        """Measured speed of the machine: the prior of models that were not measured yet."""
        self._shared: _Machines = beside._shared if beside else _Machines()
        self._shared.models[machine] = self
        self._laws: dict[str, GpuLaws] = {}
        self._borrowed: dict[str, GpuLaws] = {}
        self._image_encoding: dict[str, OneLaw] = {}
        self._load_s: dict[str, float] = {}
        self._forecasts: dict[Work, Durations] = {}
        self._learned = 0
        self._latest_key: str | None = None
        self.borrows = False
        """Whether a forecast changes with what other machines learn."""

    def of(self, machine: str) -> "TimingModel":
        """The model of another machine; a new one if there is none."""
        known = self._shared.models.get(machine)
        return known or TimingModel(self.speeds, machine, beside=self)

    def relative_speed(self, other: "TimingModel") -> float:
        """What this machine does in a second, in seconds of another one: in the median over the
        keys that it has run."""
        laws = {key: law for key, law in list(self._laws.items()) if law.samples}
        ratios = [law.times_slower_than(other._law(key, Prior(0.0))) for key, law in laws.items()]
        return 1.0 / median(ratios) if ratios else 1.0 / self._slower(other, Product.BF16)

    @property
    def drift(self) -> float | None:
        """How many times slower than usual the machine is now, by what it has run last (Scale);
        None: it has run nothing yet."""
        law = self._laws.get(self._latest_key or "")
        return law.scale.drift if law else None

    @property
    def version(self) -> int:
        """Increases with each change of what was learned, by any of the machines."""
        return self._shared.version

    def calibrate(self, speeds: Speeds) -> None:
        """The speed of the machine was measured: what was not learned yet is forecast by it."""
        self.speeds = speeds
        self._laws = {key: law for key, law in self._laws.items() if law.samples}
        self._shared.version += 1
        for model in self._shared.all:
            model.forget_forecasts()

    def forget_forecasts(self) -> None:
        """What they were made of has changed."""
        self._forecasts.clear()
        self._borrowed.clear()
        self.borrows = False

    def durations(self, work: Work) -> Durations:
        known = self._forecasts.get(work)
        if known is None:
            if len(self._forecasts) >= FORECASTS_KEPT:
                self._forecasts.clear()
            known = self._forecasts[work] = self._compute(work)
        return known

    def _compute(self, work: Work) -> Durations:
        law = self._law(work.model, work.prior)
        (phases,) = law.phases([work.place])
        return Durations(
            text_encoding_s=phases.text * (law.repeated_text if work.prompt_cached else 1.0),
            first_step_extra_s=phases.first - phases.step,
            step_s=phases.step,
            steps=work.steps,
            decoding_s=phases.decoding,
            image_encoding_s=self.image_encoding_s(work),
            sigma=law.scale.spread if law.is_measured else PRIOR_SIGMA,
            confidence=_confidence(law, work.x),
            images=work.images,
            text_each=work.text_each or work.prompt_each,
            course=law.course.relative(work.steps),
        )

    def gpu_s(self, works: Sequence[Work]) -> list[float]:
        """Durations.gpu_s of many works of one key."""
        law = self._law(works[0].model, works[0].prior)
        places = list({work.place: None for work in works})
        phases = dict(zip(places, law.phases(places), strict=True))
        return [_gpu_s(work, phases[work.place], law.repeated_text) for work in works]

    def image_encoding_s(self, work: Work) -> float:
        """Durations.image_encoding_s."""
        return _encoding_law(self._image_encoding, work.format).predict((1.0, work.x))

    def pace(self, work: Work, step_s: Sequence[float]) -> float:
        """By what factor other forecasts of this key would change if a picture with these steps,
        two at least, ended now."""
        law = self._laws.get(work.model)
        return law.pace(work.place, mean_step_s(step_s[1:]), len(step_s)) if law else 1.0

    def learn(self, work: Work, measured: Measured) -> None:
        """Learns from a finished image; the next forecast takes the milliseconds of the fit. A
        sample with an impossible duration (negative, NaN, above LONGEST_S) is ignored."""
        if _is_possible(measured):
            self._laws[work.model] = self._law(work.model, work.prior)
            _learn(self._laws, self._image_encoding, work, measured)
            self._latest_key = work.model
        self._changed()

    def learned(self, samples: Sequence[Sample]) -> Learned:
        """What learn() makes of these samples, fitted. Takes milliseconds, and needs no lock."""
        count = self._learned
        samples = [(work, measured) for work, measured in samples if _is_possible(measured)]
        works = [work for work, _ in samples]
        before = {w.model: self._law(w.model, w.prior) for w in works}
        laws = {model: law.copy() for model, law in before.items()}
        image_encoding = dict(self._image_encoding)
        for work, measured in samples:
            _learn(laws, image_encoding, work, measured)
        for model, law in laws.items():
            law.prepare(before[model])
        return Learned(samples, count, laws, image_encoding)

    def take(self, learned: Learned) -> None:
        """Learn what learned() returned; once more, if another thread was quicker."""
        if not learned.samples:
            return
        if learned.count != self._learned:
            learned = self.learned(learned.samples)
        self._laws.update(learned.laws)
        self._image_encoding.update(learned.image_encoding)
        self._latest_key = learned.samples[-1][0].model
        self._changed()

    def _changed(self) -> None:
        self._learned += 1
        self._shared.learned_by(self)

    def load_s(self, model: str, parameters_b: float) -> float:
        """Seconds to load a model: the last measurement here, or on another machine, or 2 bytes per
        parameter at 1 GB/s."""
        for timing in (self, *self._shared.all):
            if model in timing._load_s:
                return timing._load_s[model]
        return 2.0 + parameters_b * 2e9 / PRIOR_LOAD_BYTES_PER_S

    def load_sigma(self, model: str) -> float:
        """Spread of log(truth / forecast) of a load."""
        return MEASURED_LOAD_SIGMA if model in self._load_s else PRIOR_SIGMA

    def learn_load(self, model: str, seconds: float) -> None:
        if 0.0 <= seconds < LONGEST_S:
            self._load_s[model] = seconds
            self._shared.version += 1

    def keys_of(self, name: str) -> list[str]:
        """Learned keys of a model without further conditions, quantized or not."""
        plain = re.compile(re.escape(name) + r"(/q\d)?")
        return [key for key in self._laws if plain.fullmatch(key) and self.samples(key)]

    def samples(self, model: str) -> int:
        """Number of tasks with this key that were learned."""
        return self._laws[model].samples if model in self._laws else 0

    def version_of(self, model: str) -> int:
        """Changes with whatever changes the forecasts of this key."""
        return self.samples(model) or -1 - self._shared.version

    def _law(self, model: str, prior: Prior) -> GpuLaws:
        known = self._laws.get(model)
        if known and (known.samples or len(self._shared.models) == 1):
            return known
        self.borrows = True
        borrowed = self._borrowed.get(model) or self._lent(model, prior.product)
        if borrowed:
            return self._borrowed.setdefault(model, borrowed)
        return known or self._laws.setdefault(model, GpuLaws(prior, self.speeds))

    def _lent(self, model: str, product: Product) -> GpuLaws | None:
        """The law of the machine that has run this key most, at the speed of this one."""
        owner = max(self._shared.all, key=lambda other: other.samples(model))
        if not owner.samples(model):
            return None
        return owner._laws[model].lent(log(self._times_slower_than(owner, product)))

    def _times_slower_than(self, other: "TimingModel", product: Product) -> float:
        """Seconds here / seconds there: the median over the keys that both have run, or by their
        measured speed."""
        shared = [key for key in self._laws if self.samples(key) and other.samples(key)]
        ratios = [self._laws[key].times_slower_than(other._laws[key]) for key in shared]
        return median(ratios) if ratios else self._slower(other, product)

    def _slower(self, other: "TimingModel", product: Product) -> float:
        return speed_of(other.speeds, product) / speed_of(self.speeds, product)


def _encoding_law(laws: dict[str, OneLaw], image_format: str) -> OneLaw:
    return laws.get(image_format) or OneLaw((0.0, 0.3 if image_format == "PNG" else 0.02))


def _is_possible(measured: Measured) -> bool:
    seconds = [measured.text_encoding_s, *measured.step_s, measured.decoding_s]
    return all(0.0 <= s < LONGEST_S for s in [*seconds, measured.image_encoding_s])


def _learn(
    laws: dict[str, GpuLaws], image_encoding: dict[str, OneLaw], work: Work, measured: Measured
) -> None:
    if measured.gpu_s > 0.0 and measured.step_s:
        law = laws[work.model]
        text_s = law.text_s(work.place) if law.is_measured else 0.0
        if work.prompt_cached and text_s > 0.0:
            law.learn_repeated_text(measured.text_encoding_s / text_s)
        law.learn(work.place, _phases(measured, CACHED_TEXT * text_s), measured.step_s[1:])
    if measured.image_encoding_s > 0.0:  # an image that is upscaled next is not encoded
        encoding = _encoding_law(image_encoding, work.format)
        image_encoding[work.format] = encoding.learned((1.0, work.x), measured.image_encoding_s)


def _gpu_s(work: Work, phases: Phases, repeated_text: float) -> float:
    each = work.text_each or work.prompt_each
    texts = (work.images if each else 1) * (repeated_text if work.prompt_cached else 1)
    image_s = phases.first - phases.step + work.steps * phases.step + phases.decoding
    return texts * phases.text + work.images * image_s


def _confidence(law: GpuLaws, x: float) -> Confidence:
    if not law.is_measured:
        return Confidence.NONE
    few = law.samples < SAMPLES_TO_TRUST
    return Confidence.LOW if few or law.is_far(x) else Confidence.HIGH


def _phases(measured: Measured, least_text_s: float) -> Phases:
    """What a finished image says about each phase.

    Args:
        least_text_s: if text encoding took less, the embeddings were cached.
    """
    text_s = measured.text_encoding_s
    cached = text_s < least_text_s
    first, *later = measured.step_s
    return Phases(nan if cached else text_s, first, mean_step_s(later), measured.decoding_s)
