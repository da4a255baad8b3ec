"""Laws in which the seconds of a step depend on its number, or on how many there are."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from timing.course import MOST_STEPS, Course, Growth
from timing.live import remaining_s
from timing_model import Live, Measured, TimingModel, Work

SIDES = range(512, 1537, 64)
Factor = Callable[[int, int], float]
"""(number of a step, from 0; number of steps) -> seconds / usual seconds."""


def work(side: int, steps: int) -> Work:
    return Work("m", 12.0, (side // 16) ** 2, steps, "JPEG")


def law(work: Work, factor: Factor, noise: float = 1.0, own: float = 0.0) -> Measured:
    """Args: own: spread of the noise that each step has of its own."""
    x, dice = work.tokens / 4096, random.Random(work.steps)
    usual = (0.3 + 2.2 * x + 0.4 * x * x) * noise
    steps = [
        usual * factor(i, work.steps) * dice.lognormvariate(0.0, own) for i in range(work.steps)
    ]
    return Measured(0.5 * noise, steps, (0.3 + 1.1 * x) * noise, 0.0)


def taught(factor: Factor, tasks: int, own: float = 0.0) -> TimingModel:
    timing, dice = TimingModel(), random.Random(4)
    for _ in range(tasks):
        seen = work(dice.choice(SIDES), dice.randint(1, 40))
        timing.learn(seen, law(seen, factor, dice.lognormvariate(0.0, 0.02), own))
    return timing


LAWS: dict[str, Factor] = {
    "every eighth step": lambda i, n: 4.0 if i % 8 == 0 else 1.0,
    "quicker after the sixth": lambda i, n: 0.4 if i > 5 else 1.0,
    "hotter and hotter": lambda i, n: min(1.0 + 0.03 * i, 1.6),
    "with the number of steps": lambda i, n: float(n**0.3),
    "less with the number of steps": lambda i, n: float(n**-0.4),
}


@pytest.mark.parametrize("name", LAWS)
def test_thirty_pictures_show_how_a_step_depends_on_the_steps(name: str) -> None:
    timing = taught(LAWS[name], 30)
    for side in (576, 960, 1344):
        for steps in (2, 5, 13, 27, 39):
            asked = work(side, steps)
            truth_s = law(asked, LAWS[name]).gpu_s
            assert timing.durations(asked).gpu_s == pytest.approx(truth_s, rel=0.07)


def test_one_picture_shows_the_factors_of_its_steps() -> None:
    timing, factor = TimingModel(), LAWS["quicker after the sixth"]
    timing.learn(work(1024, 30), law(work(1024, 30), factor))
    for steps in (4, 7, 12, 30):
        truth_s = law(work(1024, steps), factor).gpu_s
        assert timing.durations(work(1024, steps)).gpu_s == pytest.approx(truth_s, rel=0.05)


def test_steps_that_are_alike_but_for_noise_have_neither_course_nor_growth() -> None:
    timing = taught(lambda i, n: 1.0, 60, own=0.02)
    asked = work(960, 30)
    assert all(0.98 < factor < 1.02 for factor in timing.durations(asked).course)
    assert timing._laws["m"].growth.power == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("done", [1, 3, 8, 9, 17, 29])
def test_the_countdown_knows_which_steps_are_still_to_come(done: int) -> None:
    factor = LAWS["every eighth step"]
    asked = work(1024, 30)
    measured = law(asked, factor)
    live = Live("denoising", 0.0, done, 30, measured.step_s[:done], 0.0)
    forecast = taught(factor, 30).durations(asked)
    truth_s = sum(measured.step_s[done:]) + measured.decoding_s
    assert remaining_s(forecast, live) == pytest.approx(truth_s, rel=0.05)


def test_slow_steps_of_the_course_are_no_slower_machine() -> None:
    factor = LAWS["quicker after the sixth"]
    timing, asked = taught(factor, 30), work(1024, 30)
    assert timing.pace(asked, law(asked, factor).step_s[:5]) == pytest.approx(1.0, abs=0.02)


def test_the_seconds_of_the_steps_add_up_to_those_of_the_picture() -> None:
    forecast = taught(LAWS["hotter and hotter"], 10).durations(work(768, 25))
    assert forecast.steps_s(1, 25) == pytest.approx(24 * forecast.step_s)
    assert forecast.steps_s(1, 9) + forecast.steps_s(9, 25) == pytest.approx(24 * forecast.step_s)
    assert forecast.steps_s(1, 9) < forecast.steps_s(17, 25)


def test_steps_beyond_those_seen_take_as_long_as_the_last_ones() -> None:
    course = Course()
    for _ in range(20):
        course.learn([1.0] * 10 + [2.0] * 10)
    course.settle()
    last = course.mean(41) * 40 - course.mean(21) * 20
    assert last / 20 == pytest.approx(2.0 * course.mean(11), rel=0.01)
    assert not course.relative(MOST_STEPS + 1)


def test_a_gap_in_one_step_hardly_changes_its_factor() -> None:
    course = Course()
    for _ in range(20):
        course.learn([1.0] * 9)
    course.learn([1.0] * 4 + [900.0] + [1.0] * 4)
    course.settle()
    assert course.mean(10) == pytest.approx(1.0, abs=0.02)


def test_one_slow_picture_with_more_steps_says_nothing_about_the_number_of_steps() -> None:
    growth = Growth()
    steps = np.array([4.0] * 18 + [50.0])
    growth.fit(steps, np.array([0.0] * 18 + [np.log(3.0)]))
    assert growth.power == 0
    steps = np.append(steps, [20.0, 50.0])
    growth.fit(steps, 0.4 * np.log(steps))
    assert growth.power == pytest.approx(0.4, abs=0.02)


def test_one_late_step_says_nothing_about_longer_pictures() -> None:
    course = Course()
    course.learn([1.0, 9.0])
    course.settle()
    assert course.mean(50) == 1
    for _ in range(3):
        course.learn([1.0, 1.0, 1.0])
    course.settle()
    assert course.mean(50) < 1.3
