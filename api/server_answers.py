"""Answers about the server: its health, and measured durations."""

from pydantic import Field

from api.answers import Answer, Seconds
from api.model_answers import DownloadAnswer
from monitoring.stats import BusyHours, Stats, StepSeconds
from scheduler.health import ServerState
from timing_model import Confidence


class MemoryAnswer(Answer):
    """Bytes, as MLX counts them now."""

    active_bytes: int = Field(description="In use.", examples=[12_000_000_000])
    peak_bytes: int = Field(description="During the latest picture.", examples=[14_000_000_000])
    cache_bytes: int = Field(description="Freed, and kept for reuse.", examples=[1_000_000_000])


class HealthAnswer(Answer):
    status: ServerState = Field(
        description="loading, ready and busy answer 200; draining and failed (the model cannot be "
        "loaded, or the disk refuses) answer 503."
    )
    model: str = Field(description="The server's own model.", examples=["schnell"])
    loaded_models: list[str] = Field(
        description="In memory, the latest used first. Empty: freed, or not loaded yet.",
        examples=[["schnell"]],
    )
    loading_model: str | None = Field(None, description="What is being loaded.")
    download: DownloadAnswer | None = Field(None, description="While weights are being downloaded.")
    model_title: str = Field(description="In words.", examples=["FLUX.1 schnell, 12 B"])
    quantize: int | None = Field(
        None, description="Bits of the loaded weights. Absent: not quantized.", examples=[8]
    )
    uptime_s: Seconds = Field(description="Seconds since the start.", examples=[86400.0])
    worker_restarts: int = Field(
        description="How often the worker thread died and was replaced.", examples=[0]
    )
    version: str | None = Field(
        None,
        description="Of the server; not without a key, where keys are needed.",
        examples=["2.0"],
    )
    commit: str | None = Field(
        None, description="Of its checkout, if it runs from one.", examples=["4be1a2f"]
    )
    last_error: str | None = Field(
        None,
        description="The latest failure that is not over: of loading or the disk in words, of a "
        "task its id and its error's code. It is over when the same succeeds (the disk, a load, a "
        "download, a task), or after an hour.",
    )
    last_error_at: Seconds | None = Field(
        None, description="Unix seconds at which it happened.", examples=[1725311496.5]
    )
    machines: int = Field(description="How many draw, this one included.", examples=[1])
    broker_away_since: Seconds | None = Field(
        None,
        description="Unix seconds since which the broker cannot be reached, so that other machines "
        "get no tasks. Absent: it can, or there is none.",
        examples=[1725311496.5],
    )
    memory: MemoryAnswer = Field(description="Of MLX.")
    disk_free_bytes: int = Field(description="In the data dir.", examples=[100_000_000_000])
    paused: bool = Field(description="Whether the operator has paused the queue.")
    waiting: int = Field(description="Tasks that wait.", examples=[3])
    running: int = Field(description="Tasks on the GPU or being encoded.", examples=[1])
    done: int = Field(description="Images that can be fetched.", examples=[2])
    images_bytes: int = Field(description="Size of these images.", examples=[500_000])


class LearnedSize(Answer):
    width: int = Field(description="Pixels.", examples=[1024])
    height: int = Field(description="Pixels.", examples=[1024])
    step_s: Seconds = Field(description="Seconds of one step.", examples=[13.9])
    steps: int = Field(description="The model's default.", examples=[4])
    total_s: Seconds = Field(description="Seconds of a whole task, JPEG.", examples=[61.2])
    confidence: Confidence = Field(description="none, low or high.")


class LastTask(Answer):
    """The forecast of a task when it was submitted, and what came."""

    model: str | None = Field(None, description="Absent: not known.", examples=["schnell"])
    machine: str | None = Field(None, description="Where it was drawn.", examples=["local"])
    ended_at: Seconds | None = Field(None, description="Unix seconds.", examples=[1725311496.5])
    forecast_s: Seconds = Field(description="Forecast seconds until it ends.", examples=[61.2])
    p90_s: Seconds = Field(description="The wait_p90_s of the forecast.", examples=[70.5])
    actual_s: Seconds = Field(description="Seconds until it ended.", examples=[62.8])


class StepSecondsAnswer(Answer):
    machine: str = Field(description="Where it was measured.", examples=["local"])
    model: str = Field(
        description="With its quantization, and what else changes the work of a step.",
        examples=["schnell/q8"],
    )
    width: int = Field(description="Pixels.", examples=[1024])
    height: int = Field(description="Pixels.", examples=[1024])
    step_s: Seconds = Field(description="Median seconds of one step.", examples=[13.9])
    pictures: int = Field(description="How many it is the median of.", examples=[12])


class BusyHoursAnswer(Answer):
    machine: str = Field(description="Its name.", examples=["local"])
    starts_at: int = Field(
        description="Unix seconds of the beginning of the first hour.", examples=[1725310800]
    )
    shares: list[Seconds] = Field(
        description="For each of 24 hours, the present one last: part of the time for which the "
        "GPU worked, 0 to 1."
    )


class StatsAnswer(Answer):
    """What was learned about durations, and the accuracy of the forecasts. What is about single
    tasks and machines is for operators only, and absent for others."""

    model: str = Field(description="With its quantization.", examples=["schnell/q8"])
    tasks_learned_from: int = Field(description="Finished tasks.", examples=[120])
    load_s: Seconds = Field(description="Seconds to load the model.", examples=[31.0])
    sizes: list[LearnedSize] = Field(description="Forecasts for square images.")
    forecasts_compared: int = Field(
        description="Tasks whose forecast at submit was compared with what came.", examples=[100]
    )
    median_error: Seconds | None = Field(
        None, description="Of |forecast - truth| / truth: 0.02 is 2 %.", examples=[0.02]
    )
    share_inside_p90: Seconds | None = Field(
        None, description="Part of the tasks that were ready within wait_p90_s.", examples=[0.9]
    )
    tasks_last_hour: int = Field(description="Done in the last hour.", examples=[57])
    busy_share: Seconds = Field(
        description="Part of the last hour, or since the start, for which the GPU worked, 0 to 1.",
        examples=[0.93],
    )
    last_tasks: list[LastTask] | None = Field(
        None,
        description="Of the last 200 tasks whose forecast was compared with what came, oldest "
        "first.",
    )
    drift: dict[str, float] | None = Field(
        None,
        description="By machine, how many times slower it is now than in the middle of its latest "
        "100 pictures, by the model that it has run last.",
        examples=[{"local": 1.02}],
    )
    step_seconds: list[StepSecondsAnswer] | None = Field(
        None, description="What a step took in the last 500 pictures."
    )
    busy_hours: list[BusyHoursAnswer] | None = Field(
        None, description="How busy each machine was in the last 24 hours."
    )


def stats_answer(stats: Stats, *, operator: bool) -> StatsAnswer:
    answer = _figures(stats)
    if operator:
        answer.last_tasks = [
            LastTask(
                model=outcome.model or None,
                machine=outcome.machine or None,
                ended_at=outcome.ended_at or None,
                forecast_s=outcome.forecast_s,
                p90_s=outcome.p90_s,
                actual_s=outcome.actual_s,
            )
            for outcome in stats.last_tasks
        ]
        answer.drift = stats.drift
        answer.step_seconds = [_step_seconds(row) for row in stats.step_seconds]
        answer.busy_hours = [_busy_hours(row) for row in stats.busy_hours]
    return answer


def _step_seconds(row: StepSeconds) -> StepSecondsAnswer:
    return StepSecondsAnswer(
        machine=row.machine,
        model=row.timing_key,
        width=row.width,
        height=row.height,
        step_s=row.step_s,
        pictures=row.pictures,
    )


def _busy_hours(row: BusyHours) -> BusyHoursAnswer:
    return BusyHoursAnswer(machine=row.machine, starts_at=row.starts_at, shares=row.shares)


def _figures(stats: Stats) -> StatsAnswer:
    return StatsAnswer(
        model=stats.timing_key,
        tasks_learned_from=stats.samples,
        load_s=stats.load_s,
        sizes=[
            LearnedSize(
                width=side,
                height=side,
                step_s=forecast.step_s,
                steps=forecast.steps,
                total_s=forecast.total_s,
                confidence=forecast.confidence,
            )
            for side, forecast in stats.durations
        ],
        forecasts_compared=stats.outcomes,
        median_error=stats.median_error,
        share_inside_p90=stats.share_inside_p90,
        tasks_last_hour=stats.tasks_last_hour,
        busy_share=stats.busy_share,
    )
