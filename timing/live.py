"""What is left of a task that is being drawn: arithmetic only.

What has taken its time already says how fast this task is drawn: its steps, before them the first
step, before that the encoding of its prompt. How much each of them says depends on how sure the
forecast was.
"""

from math import exp, log, sqrt
from statistics import fmean
from typing import NamedTuple

from timing.survival import remaining
from timing.work import Confidence, Durations, Live

STEPS_NOISE = 0.033
"""How far, as a logarithm, the mean of the steps of a task is from the pace of its rest. With a
learned law (sigma 0.05) they have 70 % of the weight, before the first measurement nearly all."""
FIRST_STEP_NOISE, LATE_FIRST_STEP_NOISE = 0.1, 0.5
"""The same of the first step, which contains compilation: until the model was measured, and after
that if it was late."""
TEXT_NOISE = 0.45
"""The same of text encoding, which another model does."""
DECODING_NOISE = 0.4
"""How far decoding is from the pace of the steps, once the model was measured."""
UNMEASURED_SIGMA = 1.2
"""Spread of log(seconds / forecast) of the prompt and the first step of a model that was never
measured. Above PRIOR_SIGMA, so that the countdown of a picture of two steps or more that takes up
to 50 times as long as forecast is below a third of the truth for a tenth of the time at most."""
LEAST_UNMEASURED_PACE = 0.2
"""If steps are quicker than this part of their forecast, it was wrong about them and not about the
machine: decoding does not follow further."""
LEAST_S = 1e-3


class _Pace(NamedTuple):
    """What the phases that have ended say about the rest."""

    value: float
    """Seconds per forecast second."""
    sigma: float
    """Spread of its logarithm."""
    steps: int = 0
    """Number of steps that it was measured from, without the first."""


def remaining_s(forecast: Durations, live: Live) -> float:
    """The remaining GPU seconds of a running task.

    A phase or step that is late slows the expected pace of those after it.
    """
    after_s = (forecast.images - live.images_done - 1) * _image_s(forecast)
    left_s = phase_left_s(forecast, live)
    if live.phase == "text_encoding":
        pace = _pace_of_text(forecast, live.phase_elapsed_s + left_s)
        return left_s + pace * (forecast.image_gpu_s + after_s)
    pace, _, steps = _pace(forecast, live)
    if live.phase == "denoising":
        steps_after = live.steps_total - live.steps_done - 1
        if steps_after < 0:
            return _decoding_s(forecast, pace) + pace * after_s
        now_s = _step_s(forecast, live, pace)
        if now_s > 0.0:
            pace *= 1.0 + ((live.step_elapsed_s + left_s) / now_s - 1.0) / (1 + steps)
        after_steps_s = pace * forecast.steps_s(live.steps_done + 1, live.steps_total)
        rest_s = after_steps_s + _decoding_s(forecast, pace)
        return left_s + rest_s + pace * after_s
    return left_s + pace * after_s if live.phase == "decoding" else 0.0


def phase_left_s(forecast: Durations, live: Live) -> float:
    """The remaining seconds of the present step, or of the phase if it has no steps."""
    if live.phase == "text_encoding":
        if live.images_done and not forecast.text_each:
            return 0.0
        return remaining(forecast.text_encoding_s, live.phase_elapsed_s, _sigma(forecast))
    pace, pace_sigma, _ = _pace(forecast, live)
    if live.phase == "denoising":
        if live.steps_done >= live.steps_total:
            return 0.0
        return remaining(_step_s(forecast, live, pace), live.step_elapsed_s, pace_sigma)
    if live.phase == "decoding":
        sigma = forecast.sigma
        if forecast.confidence is not Confidence.NONE:
            sigma = min(sigma, sqrt(pace_sigma**2 + DECODING_NOISE**2))
        return remaining(_decoding_s(forecast, pace), live.phase_elapsed_s, sigma)
    return 0.0


def _sigma(forecast: Durations) -> float:
    """Spread of the present step or phase, before this task has shown its pace."""
    return UNMEASURED_SIGMA if forecast.confidence is Confidence.NONE else forecast.sigma


def _step_s(forecast: Durations, live: Live, pace: float) -> float:
    """Expected seconds of the present step."""
    if not live.step_s:
        return pace * (forecast.step_s + forecast.first_step_extra_s)
    number = max(live.steps_done, 1)
    return pace * forecast.steps_s(number, number + 1)


def _image_s(forecast: Durations) -> float:
    """Of each further image of the task."""
    text_s = forecast.text_encoding_s if forecast.text_each else 0.0
    return forecast.image_gpu_s + text_s


def _decoding_s(forecast: Durations, pace: float) -> float:
    """Follows the pace of the steps. After few tasks this shows errors of the law of a step, unless
    they are far off: then the machine is slow."""
    if forecast.confidence is Confidence.NONE:
        pace = max(pace, LEAST_UNMEASURED_PACE)
    if forecast.confidence is Confidence.LOW:
        sigma = abs(log(pace)) / 2
        pace **= _weight(sigma, DECODING_NOISE)
    return forecast.decoding_s * pace


def _pace(forecast: Durations, live: Live) -> _Pace:
    if not live.step_s or forecast.step_s <= 0.0:
        return _Pace(_pace_of_text(forecast, live.text_s), _sigma(forecast))
    own, noise = live.step_s[1:], STEPS_NOISE
    if own:
        expected_s = forecast.steps_s(1, len(own) + 1) / len(own)
    else:
        own, expected_s = live.step_s, forecast.step_s + forecast.first_step_extra_s
        noise = FIRST_STEP_NOISE
        if forecast.confidence is not Confidence.NONE:
            noise = LATE_FIRST_STEP_NOISE
            if own[0] <= expected_s:
                return _Pace(1.0, forecast.sigma)
    deviation = log(max(fmean(own) / expected_s, LEAST_S))
    sigma = max(forecast.sigma, abs(deviation) / 2)  # what deviates far was forecast badly
    weight = _weight(sigma, noise)
    return _Pace(exp(weight * deviation), sqrt(weight) * noise, len(live.step_s) - 1)


def _pace_of_text(forecast: Durations, text_s: float) -> float:
    """The pace of a picture after its prompt was encoded. A cached prompt says nothing, nor does
    any other one once the model was measured."""
    if forecast.confidence is not Confidence.NONE or text_s <= forecast.text_encoding_s:
        return 1.0
    ratio = text_s / max(forecast.text_encoding_s, LEAST_S)
    return max(exp(_weight(forecast.sigma, TEXT_NOISE) * log(ratio)), 1.0)


def _weight(sigma: float, noise: float) -> float:
    """Of a measurement with this noise, against a forecast with this sigma."""
    return sigma**2 / (sigma**2 + noise**2)
