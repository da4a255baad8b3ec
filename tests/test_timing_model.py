"""The arithmetic of forecasts, against hidden laws of time."""

import random
from statistics import median

import pytest

from timing_model import Forecast, Measured, TimingModel, Work


def work(side: int = 1024, steps: int = 4, model: str = "m", format: str = "JPEG") -> Work:
    return Work(model, 12.0, (side // 16) ** 2, steps, format)


def law(work: Work, noise: float = 1.0, speed: float = 1.0) -> Measured:
    """A machine with a text encoder, attention, a slow first step and a decoder."""
    x = work.tokens / 4096
    step = (0.3 + 2.0 * x + 0.7 * x * x) * noise * speed
    return Measured(
        text_encoding_s=0.8 * noise * speed,
        step_s=[step * 1.5] + [step] * (work.steps - 1),
        decoding_s=(0.2 + 1.1 * x) * noise * speed,
        image_encoding_s=0.01 * x,
    )


def total(measured: Measured) -> float:
    return (
        measured.text_encoding_s
        + sum(measured.step_s)
        + measured.decoding_s
        + measured.image_encoding_s
    )


def test_before_anything_was_measured_the_forecast_is_a_prior_and_says_so() -> None:
    small = TimingModel().forecast(Work("klein", 4.0, 4096, 4, "JPEG"))
    large = TimingModel().forecast(Work("schnell", 12.0, 4096, 4, "JPEG"))
    assert not small.learned
    assert 0 < small.total_s < large.total_s


def test_one_task_is_enough_to_forecast_its_like_and_to_count_steps() -> None:
    timing = TimingModel()
    timing.learn(work(steps=4), law(work(steps=4)))
    forecast = timing.forecast(work(steps=4))
    assert forecast.learned
    assert forecast.total_s == pytest.approx(total(law(work(steps=4))), rel=0.15)
    assert timing.forecast(work(steps=40)).total_s == pytest.approx(
        total(law(work(steps=40))), rel=0.1
    )


def test_many_tasks_teach_the_law_for_sizes_never_seen() -> None:
    timing, dice = TimingModel(), random.Random(1)
    for _ in range(60):
        seen = work(side=dice.choice([512, 768, 1024, 1280]), steps=dice.randint(2, 30))
        timing.learn(seen, law(seen, noise=dice.lognormvariate(0, 0.03)))
    unseen = [work(side=side, steps=20) for side in (384, 640, 896, 1152, 1536)]
    errors = [abs(timing.forecast(w).total_s / total(law(w)) - 1) for w in unseen]
    assert median(errors) < 0.04
    assert max(errors) < 0.15


def test_it_follows_a_machine_that_becomes_slower() -> None:
    timing = TimingModel()
    for _ in range(50):
        timing.learn(work(), law(work()))
    for _ in range(50):
        timing.learn(work(), law(work(), speed=1.5))
    assert timing.forecast(work()).total_s == pytest.approx(total(law(work(), speed=1.5)), rel=0.15)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1.0, 0.0, 1e9])
def test_a_poisoned_sample_spoils_nothing(poison: float) -> None:
    timing = TimingModel()
    for _ in range(20):
        timing.learn(work(), law(work()))
    before = timing.forecast(work()).total_s
    timing.learn(work(), Measured(poison, [poison] * 4, poison, poison))
    assert timing.forecast(work()).total_s == pytest.approx(before, rel=0.25)


def test_models_do_not_learn_from_each_other_but_formats_are_shared() -> None:
    timing = TimingModel()
    prior = timing.forecast(work(model="other")).gpu_s
    timing.learn(work(model="m"), law(work()))
    assert timing.forecast(work(model="other")).gpu_s == prior
    assert timing.forecast(work(format="PNG")).image_encoding_s > 0


def test_a_forecast_grows_with_steps_and_pixels_and_is_never_negative() -> None:
    timing, dice = TimingModel(), random.Random(2)
    for _ in range(30):
        seen = work(side=dice.choice([64, 512]), steps=dice.randint(1, 8))
        timing.learn(seen, law(seen, noise=dice.lognormvariate(0, 0.3)))
    sides = [16, 256, 512, 1024, 4096]
    by_size = [timing.forecast(work(side=side)).total_s for side in sides]
    assert by_size == sorted(by_size)
    assert by_size[0] >= 0
    by_steps = [timing.forecast(work(steps=steps)).total_s for steps in (1, 2, 10, 100)]
    assert by_steps == sorted(by_steps)


FORECAST = Forecast(1.0, 2.0, 4, 3.0, 0.1, learned=True)


def remaining(phase: str, elapsed: float = 0.0, done: int = 0, own: float = 2.0) -> float:
    return TimingModel().remaining_s(
        FORECAST,
        phase=phase,
        phase_elapsed_s=elapsed,
        steps_done=done,
        steps_total=4,
        step_s=[own] * done,
        step_elapsed_s=elapsed,
    )


def test_what_remains_counts_down_through_the_phases() -> None:
    assert remaining("text_encoding") == 12.0
    assert remaining("text_encoding", elapsed=0.4) == pytest.approx(11.6)
    assert remaining("text_encoding", elapsed=50) == 11.0
    assert remaining("denoising") == 11.0
    assert remaining("denoising", elapsed=1.5, done=1) == pytest.approx(7.5)
    assert remaining("denoising", elapsed=50, done=1) == pytest.approx(7.0)
    assert remaining("decoding") == 3.0
    assert remaining("decoding", elapsed=50) == 0.0
    assert remaining("image_encoding") == 0.0


def test_a_running_task_is_corrected_by_its_own_pace() -> None:
    slow = remaining("denoising", done=2, own=6.0)
    assert slow > remaining("denoising", done=2, own=2.0)
    assert slow == pytest.approx(2 * (2.0 + 6.0) / 2 + 3.0)


def test_loading_is_forecast_from_the_size_and_then_from_the_last_time() -> None:
    timing = TimingModel()
    assert timing.forecast_load_s("m", 12.0) > timing.forecast_load_s("m", 4.0) > 0
    timing.learn_load("m", 5.0)
    timing.learn_load("m", float("nan"))
    assert timing.forecast_load_s("m", 12.0) == 5.0
