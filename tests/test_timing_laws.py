"""What the timing model learns of unknown laws: thresholds, squares, prompts, paces."""

import math
import random
from dataclasses import replace

import pytest
from hidden_law import law, work

from timing.speeds import Product
from timing.work import Phases, Prior
from timing_laws import GpuLaws
from timing_model import Measured, TimingModel, Work


def unlike_any(work: Work) -> Measured:
    """A law that is no function of anything but the very request."""
    dice = random.Random(f"{work.tokens} {work.width} {work.steps}")
    usual = law(work, speed=dice.lognormvariate(0, 0.7))
    return replace(usual, decoding_s=usual.decoding_s * dice.lognormvariate(0, 0.7))


def test_two_runs_of_a_request_are_enough_whatever_the_law() -> None:
    timing, dice = TimingModel(), random.Random(7)
    requests = [
        replace(work(side, steps), width=side) for side in (512, 768, 1024) for steps in (4, 9)
    ]
    for seen in requests:
        for _ in range(2):
            timing.learn(seen, unlike_any(seen))
        other = work(dice.choice(range(512, 1537, 64)), dice.randint(1, 30))
        timing.learn(other, unlike_any(other))
    errors = [timing.durations(seen).gpu_s / unlike_any(seen).gpu_s - 1 for seen in requests]
    assert max(map(abs, errors)) < 0.05


def test_a_threshold_is_learned_and_the_law_beside_it_stays() -> None:
    timing, dice = TimingModel(), random.Random(8)

    def pressure(asked: Work) -> Measured:
        return law(asked, speed=2.5 if asked.tokens > 5000 else 1.0)

    for _ in range(80):
        seen = work(dice.choice(range(512, 1537, 64)), dice.randint(1, 30))
        timing.learn(seen, pressure(seen))
    sides = [512, 704, 960, 1216, 1408, 1536]
    asked = [work(side, 20) for side in sides]
    errors = [timing.durations(w).gpu_s / pressure(w).gpu_s - 1 for w in asked]
    assert max(map(abs, errors)) < 0.08


def test_decoding_with_the_square_of_the_tokens_is_learned() -> None:
    timing, dice = TimingModel(), random.Random(9)

    def attention(asked: Work) -> Measured:
        x = asked.tokens / 4096
        return Measured(0.5, [0.2 * x] * asked.steps, 0.3 + x + 3.0 * x * x, 0.01)

    for _ in range(20):
        seen = work(dice.choice([512, 768, 1024]), dice.randint(1, 8))
        timing.learn(seen, attention(seen))
    unseen = work(1536, 4)
    assert timing.durations(unseen).gpu_s == pytest.approx(attention(unseen).gpu_s, rel=0.1)


def test_outliers_among_others_are_no_shift_of_the_machine() -> None:
    timing, dice = TimingModel(), random.Random(10)
    for number in range(60):
        noise = dice.lognormvariate(0, 0.03) * (3 if number % 2 == 1 and number > 50 else 1)
        timing.learn(work(), law(work(), noise=noise))
    assert timing.durations(work()).gpu_s == pytest.approx(law(work()).gpu_s, rel=0.05)


def test_the_pace_of_a_running_picture_is_that_of_the_latest_samples() -> None:
    laws, own, seen = GpuLaws(Prior(1.0)), work(), set()
    for number in range(30):
        step_s = 1.0 + 0.01 * number
        laws.learn(own.place, Phases(0.5, step_s + 0.1, step_s, 0.7))
        laws.phases([own.place])
        pace = laws.pace(own.place, step_s + 0.03, 4)
        assert pace == laws.pace(own.place, step_s + 0.03, 4)
        assert pace == laws.copy().pace(own.place, step_s + 0.03, 4), (
            "a copy has computed none before"
        )
        seen.add(pace)
    assert len(seen) > 3


def test_a_step_with_a_gap_counts_as_the_others() -> None:
    timing = TimingModel()
    for _ in range(5):
        timing.learn(work(steps=8), law(work(steps=8)))
    before = timing.durations(work(steps=8)).step_s
    measured = law(work(steps=8))
    slept = [*measured.step_s]
    slept[4] = 900.0
    timing.learn(work(steps=8), replace(measured, step_s=slept))
    assert timing.durations(work(steps=8)).step_s == pytest.approx(before, rel=0.02)


def test_text_encoding_depends_on_the_prompt_and_costs_nothing_when_it_is_cached() -> None:
    timing = TimingModel()

    def encoding(asked: Work) -> Measured:
        return replace(law(asked), text_encoding_s=2.0 + 0.04 * asked.prompt_tokens)

    for tokens in (20, 600, 2500, 40, 900):
        seen = replace(work(), prompt_tokens=tokens)
        timing.learn(seen, encoding(seen))
    long = replace(work(), prompt_tokens=1500)
    assert timing.durations(long).text_encoding_s == pytest.approx(62.0, rel=0.1)
    cached = replace(long, prompt_cached=True)
    timing.learn(cached, replace(law(cached), text_encoding_s=0.001))
    assert timing.durations(cached).text_encoding_s < 0.1
    assert timing.durations(long).text_encoding_s == pytest.approx(62.0, rel=0.1)


def test_a_model_that_keeps_no_prompts_is_noticed() -> None:
    timing, again = TimingModel(), replace(work(), prompt_cached=True)
    timing.learn(work(), law(work()))
    for _ in range(2):
        timing.learn(again, law(again))
    assert timing.durations(again).text_encoding_s == pytest.approx(0.8, rel=0.1)


def test_the_prior_scales_with_the_measured_speed_of_the_machine() -> None:
    fast, slow = (TimingModel({Product.BF16: s}) for s in (20e12, 0.02e12))
    ratio = slow.durations(work()).gpu_s / fast.durations(work()).gpu_s
    assert ratio == pytest.approx(1000.0, rel=0.01)
    assert slow.durations(work()).step_s == pytest.approx(1000.0 * fast.durations(work()).step_s)


def test_the_pace_of_a_picture_moves_forecasts_as_learning_it_does() -> None:
    timing, dice, slower = TimingModel(), random.Random(11), 1.0
    for number in range(40):
        slower = 1.0 + 0.25 * math.sin(number / 6)
        timing.learn(work(), law(work(), noise=dice.lognormvariate(0, 0.02), speed=slower))
    before = timing.durations(work(768)).gpu_s
    measured = law(work(), speed=slower * 1.05)
    pace = timing.pace(work(), measured.step_s)
    timing.learn(work(), measured)
    assert timing.durations(work(768)).gpu_s / before == pytest.approx(pace, rel=0.02)
    assert pace > 1.01


def test_the_noise_of_one_picture_moves_the_forecasts_of_others_little() -> None:
    timing, dice = TimingModel(), random.Random(12)
    for _ in range(40):
        timing.learn(work(), law(work(), noise=dice.lognormvariate(0, 0.03)))
    assert timing.pace(work(), law(work(), noise=1.05).step_s) == pytest.approx(1.0, abs=0.01)
    assert timing.pace(work(), law(work(), noise=3.0).step_s) == 1.0
    assert timing.pace(work(model="other"), law(work(model="other")).step_s) == 1.0
