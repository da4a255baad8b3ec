"""Laws of time with a jump above a size, and the level of the p90."""

import random
from statistics import fmean, median

import numpy as np
import pytest

from timing.corrections import Floats
from timing.linear import SizeLaw
from timing.shapes import SMOOTH, Kind, Shape
from timing.spread import Outcome, Spread
from timing_model import Measured, TimingModel, Work


def work(side: int, steps: int) -> Work:
    return Work("m", 12.0, (side // 16) ** 2, steps, "JPEG")


def law(work: Work, above: float, factor: float, noise: float = 1.0) -> Measured:
    """Above a size everything takes longer by a factor."""
    x = work.tokens / 4096
    noise *= factor if x > above else 1.0
    step = (0.3 + 2.2 * x + 0.9 * x * x) * noise
    return Measured(1.4 * noise, [step] * work.steps, (0.3 + 1.6 * x) * noise, 0.0)


def taught(above: float, factor: float, tasks: int, *, outliers: float = 0.0) -> TimingModel:
    timing, dice = TimingModel(), random.Random(5)
    for _ in range(tasks):
        seen = work(dice.randrange(512, 1537, 64), dice.randint(1, 40))
        noise = dice.lognormvariate(0.0, 0.03) * (3 if dice.random() < outliers else 1)
        timing.learn(seen, law(seen, above, factor, noise))
    return timing


def errors(timing: TimingModel, above: float, factor: float) -> list[float]:
    unseen = [work(side, steps) for side in (528, 720, 880, 1200, 1360, 1520) for steps in (3, 33)]
    return [abs(timing.durations(w).gpu_s / law(w, above, factor).gpu_s - 1) for w in unseen]


@pytest.mark.parametrize("factor", [1.7, 2.5, 4.0])
def test_twenty_tasks_show_that_everything_takes_longer_above_a_size(factor: float) -> None:
    assert median(errors(taught(1.1, factor, 20), 1.1, factor)) < 0.06


def test_a_jump_is_found_among_outliers() -> None:
    assert median(errors(taught(1.1, 2.5, 40, outliers=0.08), 1.1, 2.5)) < 0.06


def test_where_there_is_no_jump_none_is_believed() -> None:
    dice = random.Random(1)
    for outliers in (0.0, 0.1):
        smooth = SizeLaw((1.0, 1.0, 0.1))
        x = [dice.uniform(0.2, 2.3) for _ in range(40)]
        noise = [dice.lognormvariate(0.0, 0.03) * (3 if dice.random() < outliers else 1) for _ in x]
        y = [(0.3 + 2 * a + 0.7 * a * a) * n for a, n in zip(x, noise, strict=True)]
        smooth.fit(np.array([(a**0.5, a**0.5) for a in x]), np.array(y))
        assert smooth.shape == SMOOTH
        assert smooth.factors == ()


JUMP = Shape(Kind.JUMP, 1.1, 2.5)


@pytest.mark.parametrize(
    "shapes",
    [
        (Shape(Kind.TILES, 0.375),),
        (Shape(Kind.COLUMNS, 0.5),),
        (Shape(Kind.ROWS, 0.3125),),
        (Shape(Kind.STAIRS, 0.5),),
        (Shape(Kind.FLOOR, 1.1),),
        (JUMP,),
        (Shape(Kind.ODD, 0.125, 1.4),),
        (Shape(Kind.ASPECT, 0.6),),
        (Shape(Kind.JUMP, 0.5, 1.6), JUMP),
        (Shape(Kind.STAIRS, 0.5), JUMP),
    ],
)
@pytest.mark.parametrize("outliers", [0.0, 0.08])
def test_eighty_pictures_show_what_their_seconds_grow_with(
    shapes: tuple[Shape, ...], outliers: float
) -> None:
    dice = random.Random(3)

    def seconds(sides: Floats) -> Floats:
        x = shapes[0].sizes(sides)
        total = 0.3 + 2.2 * x + 0.4 * x * x
        for shape in shapes:
            total = total * shape.factors(sides)
        return total

    places = range(512, 1537, 64)
    sides = np.array([(dice.choice(places), dice.choice(places)) for _ in range(80)]) / 1024
    noise = [dice.lognormvariate(0.0, 0.03) * (3 if dice.random() < outliers else 1) for _ in sides]
    law = SizeLaw((1.0, 1.0, 0.1))
    law.fit(sides, seconds(sides) * np.array(noise))
    unseen = np.array([(wide, high) for wide in places for high in places]) / 1024
    off = np.abs(law.at(unseen) / seconds(unseen) - 1)
    assert np.median(off) < 0.03
    assert np.mean(off > 0.2) < 0.06


def test_an_outlier_that_is_the_largest_picture_is_no_jump() -> None:
    timing = TimingModel()
    for side in 4 * (512, 640, 768, 896, 1024):
        timing.learn(work(side, 10), law(work(side, 10), 9.0, 1.0))
    timing.learn(work(1536, 10), law(work(1536, 10), 9.0, 1.0, noise=3.0))
    forecast = timing.durations(work(1280, 10)).gpu_s
    assert forecast == pytest.approx(law(work(1280, 10), 9.0, 1.0).gpu_s, rel=0.35)


@pytest.mark.parametrize("sigma", [0.02, 0.3, 1.0])
def test_nine_of_ten_tasks_take_less_than_their_p90_also_when_neighbours_have_one_fate(
    sigma: float,
) -> None:
    dice, spread, inside = random.Random(2), Spread(), []
    fate = 1.0
    for number in range(2000):
        if number % 6 == 0:
            fate = dice.lognormvariate(0.0, sigma)
        p90_s = 100.0 * spread.p90_factor(0)
        spread.learn(Outcome(0, 100.0, p90_s, 100.0 * fate))
        inside.append(100.0 * fate <= p90_s)
    assert 0.85 < fmean(inside[100:]) < 0.95


def test_the_p90_grows_beyond_what_was_seen_while_each_task_takes_longer() -> None:
    spread, truth = Spread(), 100.0
    for _ in range(100):
        truth *= 1.05
        spread.learn(Outcome(0, 100.0, 100.0 * spread.p90_factor(0), truth))
    assert 100.0 * spread.p90_factor(0) > truth


def test_outcomes_that_are_expected_count_until_others_are_expected() -> None:
    spread = Spread()
    usual, urgent = spread.p90_factor(0), spread.p90_factor(1)
    spread.expect({0: [True] * 3})
    late = spread.p90_factor(0)
    assert late > usual
    assert spread.p90_factor(1) == urgent
    spread.expect({0: [True]})
    assert usual < spread.p90_factor(0) < late
    spread.expect({})
    assert spread.p90_factor(0) == usual


@pytest.mark.parametrize("depth", [1, 8])
def test_with_expected_outcomes_few_tasks_suffice_for_nine_of_ten(depth: int) -> None:
    """Rows of tasks that have their delay in common, as those behind one that takes long."""
    dice, parts = random.Random(3), []
    for _ in range(20):
        spread, inside = Spread(), list[bool]()
        waiting: list[tuple[float, float]] = []
        fate = 1.0
        for number in range(190):
            if number % depth == 0:
                fate = 1.0 + (dice.random() < 0.2) * dice.uniform(0.2, 1.0)
            spread.expect({0: [fate > factor for factor, _ in waiting]})
            waiting.append((spread.p90_factor(0), fate))
            if len(waiting) == depth:
                factor, own = waiting.pop(0)
                spread.learn(Outcome(0, 100.0, 100.0 * factor, 100.0 * own))
                inside.append(own <= factor)
        parts.append(fmean(inside[50:]))
    assert fmean(0.85 <= part <= 0.95 for part in parts) >= 0.8
    assert 0.87 < fmean(parts) < 0.93
