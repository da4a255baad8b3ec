"""The arithmetic of forecasts, against hidden laws of time."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from statistics import median

import pytest
from hidden_law import law, total, work
from hypothesis import given, settings
from hypothesis import strategies as st

from timing.live import remaining_s
from timing.spread import Outcome, Spread
from timing.work import Phases, Place
from timing_laws import GpuLaws
from timing_model import Confidence, Durations, Live, Measured, TimingModel, Work


def test_before_anything_was_measured_the_forecast_is_a_prior_and_says_so() -> None:
    small = TimingModel().durations(Work("klein", 4.0, 4096, 4, "JPEG"))
    large = TimingModel().durations(Work("schnell", 12.0, 4096, 4, "JPEG"))
    assert small.confidence is Confidence.NONE
    assert 0 < small.total_s < large.total_s


def test_one_task_is_enough_to_forecast_similar_ones_and_to_count_steps() -> None:
    timing = TimingModel()
    timing.learn(work(steps=4), law(work(steps=4)))
    forecast = timing.durations(work(steps=4))
    assert forecast.confidence is Confidence.LOW
    assert forecast.total_s == pytest.approx(total(law(work(steps=4))), rel=0.15)
    assert timing.durations(work(steps=40)).total_s == pytest.approx(
        total(law(work(steps=40))), rel=0.1
    )


def test_many_tasks_teach_the_law_for_sizes_never_seen() -> None:
    timing, dice = TimingModel(), random.Random(1)
    for _ in range(60):
        seen = work(side=dice.choice([512, 768, 1024, 1280]), steps=dice.randint(2, 30))
        timing.learn(seen, law(seen, noise=dice.lognormvariate(0, 0.03)))
    unseen = [work(side=side, steps=20) for side in (384, 640, 896, 1152, 1536)]
    errors = [abs(timing.durations(w).total_s / total(law(w)) - 1) for w in unseen]
    assert median(errors) < 0.04
    assert max(errors) < 0.15


@pytest.mark.parametrize("speed", [0.5, 1.2, 2.0])
def test_the_model_follows_a_change_of_speed_within_a_few_tasks(speed: float) -> None:
    timing, dice = TimingModel(), random.Random(3)
    for _ in range(50):
        timing.learn(work(), law(work(), noise=dice.lognormvariate(0, 0.03)))
    for _ in range(6):
        timing.learn(work(), law(work(), noise=dice.lognormvariate(0, 0.03), speed=speed))
    unseen = work(side=768, steps=10)
    assert timing.durations(unseen).gpu_s == pytest.approx(law(unseen, speed=speed).gpu_s, rel=0.1)


def test_single_outliers_change_little() -> None:
    timing, dice = TimingModel(), random.Random(4)
    for number in range(100):
        noise = dice.lognormvariate(0, 0.03) * (3 if number % 30 == 29 else 1)
        timing.learn(work(), law(work(), noise=noise))
    assert timing.durations(work()).gpu_s == pytest.approx(law(work()).gpu_s, rel=0.03)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1.0, 0.0, 1e9])
def test_an_impossible_sample_is_not_learned(poison: float) -> None:
    timing = TimingModel()
    for _ in range(20):
        timing.learn(work(), law(work()))
    before = timing.durations(work()).total_s
    timing.learn(work(), Measured(poison, [poison] * 4, poison, poison))
    assert timing.durations(work()).total_s == pytest.approx(before, rel=0.25)


def test_models_do_not_learn_from_each_other_but_formats_are_shared() -> None:
    timing = TimingModel()
    prior = timing.durations(work(model="other")).gpu_s
    timing.learn(work(model="m"), law(work()))
    assert timing.durations(work(model="other")).gpu_s == prior
    assert timing.durations(work(format="PNG")).image_encoding_s > 0


def test_a_forecast_grows_with_steps_and_pixels_and_is_never_negative() -> None:
    timing, dice = TimingModel(), random.Random(2)
    for _ in range(30):
        seen = work(side=dice.choice([64, 512]), steps=dice.randint(1, 8))
        timing.learn(seen, law(seen, noise=dice.lognormvariate(0, 0.3)))
    sides = [16, 256, 512, 1024, 4096]
    by_size = [timing.durations(work(side=side)).total_s for side in sides]
    assert by_size == sorted(by_size)
    assert by_size[0] >= 0
    by_steps = [timing.durations(work(steps=steps)).total_s for steps in (1, 2, 10, 100)]
    assert by_steps == sorted(by_steps)


FORECAST = Durations(1.0, 0.5, 2.0, 4, 3.0, 0.1, 0.05, Confidence.HIGH)


def remaining(phase: str, elapsed: float = 0.0, done: int = 0, own: float = 2.0) -> float:
    live = Live(phase, elapsed, done, 4, [own] * done, elapsed)
    return remaining_s(FORECAST, live)


def test_the_remaining_time_counts_down_through_the_phases() -> None:
    assert remaining("text_encoding") == 12.5
    assert remaining("text_encoding", elapsed=0.4) == pytest.approx(12.1, abs=0.01)
    assert remaining("denoising") == 11.5
    assert remaining("denoising", elapsed=1.5, done=1) == pytest.approx(7.5, abs=0.01)
    assert remaining("denoising", done=4) == pytest.approx(3.0)
    assert remaining("decoding") == 3.0
    assert remaining("image_encoding") == 0.0


def test_a_phase_that_takes_longer_than_forecast_is_not_reported_as_over() -> None:
    left = [remaining("decoding", elapsed=elapsed) for elapsed in (3.5, 4.0, 20.0, 600.0)]
    assert left[0] > 0.05
    assert left == sorted(left)
    assert left[-1] < 1200.0
    assert remaining("denoising", elapsed=4.0, done=3) > 3.0


def test_a_running_task_is_corrected_by_its_own_pace() -> None:
    assert remaining("denoising", done=3, own=6.0) > 2 * remaining("denoising", done=3, own=2.0)
    assert remaining("denoising", done=3, own=1.0) < remaining("denoising", done=3, own=2.0)


def test_confidence_grows_with_samples_and_ends_far_from_the_sizes_seen() -> None:
    timing = TimingModel()
    seen = [timing.durations(work()).confidence]
    for _ in range(3):
        timing.learn(work(), law(work()))
        seen.append(timing.durations(work()).confidence)
    assert seen == [Confidence.NONE, Confidence.LOW, Confidence.LOW, Confidence.HIGH]
    assert timing.durations(work(side=4096)).confidence is Confidence.LOW


anything = st.floats(allow_nan=True, allow_infinity=True)

works = st.builds(
    Work,
    model=st.sampled_from(["m", "n"]),
    parameters_b=st.floats(0.001, 100),
    tokens=st.integers(1, 2**18),
    steps=st.integers(1, 1000),
    format=st.sampled_from(["JPEG", "PNG"]),
)

samples = st.lists(
    st.tuples(
        works,
        st.builds(
            Measured,
            text_encoding_s=anything,
            step_s=st.lists(anything, max_size=5),
            decoding_s=anything,
            image_encoding_s=anything,
        ),
    ),
    max_size=20,
)


@settings(deadline=None, max_examples=50)
@given(samples, works)
def test_forecasts_are_always_finite_and_never_negative(
    learned: list[tuple[Work, Measured]], asked: Work
) -> None:
    timing = TimingModel()
    for seen, measured in learned:
        timing.learn(seen, measured)
    forecast = timing.durations(asked)
    assert 0 <= forecast.total_s < math.inf
    (gpu_s,) = timing.gpu_s([asked])
    assert gpu_s == pytest.approx(forecast.gpu_s, rel=1e-6, abs=1e-9)
    more = replace(asked, steps=asked.steps + 1, tokens=asked.tokens + 1)
    assert timing.durations(more).total_s >= forecast.total_s


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 1000), st.integers(0, 2**32))
def test_the_model_does_not_depend_on_the_unit_of_time(scale: float, seed: int) -> None:
    """A machine that is twice as slow gets forecasts that are twice as long, from the start."""
    dice, slow, fast = random.Random(seed), TimingModel(), TimingModel()
    for _ in range(10):
        seen = work(side=dice.choice([512, 1024]), steps=dice.randint(1, 20))
        noise = dice.lognormvariate(0, 0.05)
        fast.learn(seen, law(seen, noise=noise))
        measured = law(seen, noise=noise, speed=scale)
        slow.learn(seen, replace(measured, image_encoding_s=measured.image_encoding_s))
    ratio = slow.durations(work()).gpu_s / fast.durations(work()).gpu_s
    assert ratio == pytest.approx(scale, rel=0.02)


def test_samples_replayed_from_text_teach_the_same() -> None:
    first, second = TimingModel(), TimingModel()
    for steps in (1, 4, 9):
        seen, measured = work(steps=steps), law(work(steps=steps))
        first.learn(seen, measured)
        second.learn(Work.from_json(seen.to_json()), Measured.from_json(measured.to_json()))
    assert first.durations(work()) == second.durations(work())


def test_the_p90_covers_nine_of_ten_waits_and_knows_its_own_quality() -> None:
    spread, dice, inside = Spread(), random.Random(5), []
    for _ in range(1000):
        wait_s = dice.uniform(10, 300)
        actual_s = wait_s * dice.lognormvariate(0, 0.1) * (1.5 if dice.random() < 0.2 else 1)
        p90_s = wait_s * spread.p90_factor(0)
        inside.append(actual_s <= p90_s)
        spread.learn(Outcome(0, wait_s, p90_s, actual_s))
    assert 0.86 < sum(inside[200:]) / 800 < 0.94
    assert 0.82 < (spread.share_inside_p90() or 0) < 0.97
    assert 0.03 < (spread.median_error() or 0) < 0.15


def test_impossible_outcomes_are_passed_over() -> None:
    spread = Spread()
    for value in (0.0, -1.0, float("nan"), float("inf")):
        spread.learn(Outcome(1, 10.0, 12.0, value))
        spread.learn(Outcome(1, value, 12.0, 10.0))
    assert spread.count == 0
    assert spread.median_error() is None
    assert spread.share_inside_p90() is None


def test_loading_is_forecast_from_the_size_and_then_from_the_last_time() -> None:
    timing = TimingModel()
    assert timing.load_s("m", 12.0) > timing.load_s("m", 4.0) > 0
    timing.learn_load("m", 5.0)
    timing.learn_load("m", float("nan"))
    assert timing.load_s("m", 12.0) == 5.0


@pytest.mark.parametrize("confidence", Confidence)
@pytest.mark.parametrize("phase", ["text_encoding", "denoising", "decoding"])
def test_a_countdown_past_its_forecast_moves_smoothly_and_does_not_end(
    confidence: Confidence, phase: str
) -> None:
    sigma = 0.05 if confidence is Confidence.HIGH else 0.86
    forecast = Durations(6.9, 0.5, 6.9, 1, 6.9, 0.1, sigma, confidence)
    times = [0.1 * tick for tick in range(1, 5000)]
    left = [remaining_s(forecast, Live(phase, at, 0, 1, (), at)) for at in times]
    jumps = [abs(after - before) for before, after in pairwise(left)]
    assert max(jumps) < 0.5
    assert min(left) > 0.1
    assert all(now > 0.2 * at for now, at in zip(left, times, strict=True) if at > 69.0)


def drawn(count: int, seed: int) -> list[tuple[Work, Measured]]:
    dice = random.Random(seed)
    works = [
        work(dice.choice((512, 768, 1024)), dice.randint(1, 20), dice.choice("mn"))
        for _ in range(count)
    ]
    return [(seen, law(seen, noise=dice.lognormvariate(0, 0.05))) for seen in works]


def test_what_is_learned_beside_the_model_changes_it_only_when_it_is_taken() -> None:
    one, other = TimingModel(), TimingModel()
    for sample in drawn(12, 1):
        one.learn(*sample)
        other.learn(*sample)
    asked = [work(768, 9), work(768, 9, "n"), work(640, 5)]
    before = [one.durations(seen) for seen in asked]
    later = drawn(3, 2)
    learned = one.learned(later)
    assert [one.durations(seen) for seen in asked] == before
    one.take(learned)
    for sample in later:
        other.learn(*sample)
    for seen in asked:  # apart from rounding: several places are predicted in one product
        own, others = asdict(one.durations(seen)), asdict(other.durations(seen))
        for exact in ("confidence", "course"):
            assert own.pop(exact) == others.pop(exact)
        assert own == pytest.approx(others, rel=1e-12)
    assert [one.durations(seen) for seen in asked] != before


def test_laws_are_fitted_again_only_when_a_picture_was_not_predicted_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timing, fits, predictions = TimingModel(), list[int](), list[Sequence[Place]]()
    fit, predict = GpuLaws._fit, GpuLaws._predicted

    def counted_fit(law: GpuLaws) -> None:
        fits.append(law.samples)
        fit(law)

    def counted_prediction(law: GpuLaws, places: Sequence[Place]) -> list[Phases]:
        predictions.append(places)
        return predict(law, places)

    monkeypatch.setattr(GpuLaws, "_fit", counted_fit)
    monkeypatch.setattr(GpuLaws, "_predicted", counted_prediction)

    def draw(speed: float, times: int) -> float:
        """Returns the forecast."""
        for _ in range(times):
            timing.take(timing.learned([(work(), law(work(), speed=speed))]))
        return timing.durations(work()).total_s

    draw(1.0, 20)
    fits.clear()
    predictions.clear()
    assert draw(1.0, 20) == pytest.approx(total(law(work())), rel=0.01)
    assert 2 <= len(fits) <= 6, "now and then, for samples that the fit does not know"
    assert len(predictions) == len(fits), "laws that stay predict nothing again"
    fits.clear()
    draw(1.5, 3)
    assert len(fits) >= 3
    assert draw(1.5, 20) == pytest.approx(total(law(work(), speed=1.5)), rel=0.03)


def test_what_was_asked_before_is_not_computed_again_after_a_lesson_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timing = TimingModel()
    for sample in drawn(12, 1):
        timing.learn(*sample)
    asked = [work(side) for side in (512, 768, 1024)]
    timing.gpu_s(asked)
    timing.take(timing.learned(drawn(2, 2)))
    for name in ("_fit", "_predicted"):
        monkeypatch.delattr(GpuLaws, name)
    assert all(seconds > 0.0 for seconds in timing.gpu_s(asked))
    assert all(timing.durations(seen).gpu_s > 0.0 for seen in asked)


def test_nothing_is_lost_if_two_threads_learn_at_once() -> None:
    timing = TimingModel()
    first, second = drawn(2, 1), drawn(3, 2)
    slow, quick = timing.learned(first), timing.learned(second)
    timing.take(quick)
    timing.take(slow)
    assert timing.samples("m") + timing.samples("n") == 5
    other = TimingModel()
    for sample in second + first:
        other.learn(*sample)
    assert timing.durations(work()) == other.durations(work())


@pytest.mark.parametrize("confidence", [Confidence.LOW, Confidence.HIGH])
@pytest.mark.parametrize("slow", ["text_encoding", "first_step", "steps", "decoding"])
def test_one_phase_that_takes_ten_times_its_forecast_is_soon_expected_to_last(
    confidence: Confidence, slow: str
) -> None:
    forecast = Durations(5.0, 5.0, 5.0, 8, 20.0, 0.1, 0.05, confidence)
    text_s, first_s, step_s, decoding_s = (
        10.0 * usual if name == slow else usual
        for name, usual in zip(
            ("text_encoding", "first_step", "steps", "decoding"),
            (5.0, 10.0, 5.0, 20.0),
            strict=True,
        )
    )
    steps = (first_s, *[step_s] * 7)
    ends = [text_s, *(text_s + sum(steps[: n + 1]) for n in range(8))]
    total_s, low = ends[-1] + decoding_s, 0
    known_s = ends[-1] if slow == "decoding" else 0.0  # nothing is late before that
    times = [known_s + 0.5 * tick for tick in range(1, int(2 * (total_s - known_s)))]
    for at in times:
        done = sum(at >= end for end in ends)
        since = at - ends[done - 1] if done else at
        phase = "text_encoding" if not done else "denoising" if done < 9 else "decoding"
        known = steps[: max(done - 1, 0)]
        live = Live(phase, since, len(known), 8, known, since, text_s=text_s if done else 0.0)
        low += remaining_s(forecast, live) < (total_s - at) / 3
    assert low < 0.35 * len(times)
