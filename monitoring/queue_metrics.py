"""What Prometheus reads about the queue and its machines.

Most of it is computed while it is read; only the seconds of phases are counted as they come. Labels
have few values: levels, statuses, phases, names of allowed models and of present machines.
"""

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from scheduler.events import ENDS
from scheduler.scheduler import Scheduler
from task import TaskStatus

LEVELS = {1: "urgent", 0: "normal", -1: "background"}


class QueueMetrics(Collector):
    """Thread-safe."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        yield from self._tasks()
        yield from self._forecasts()
        yield from self._machines()
        yield from self._downloads()
        yield from self._scheduler.phase_seconds.histogram.collect()

    def _tasks(self) -> Iterator[Metric]:
        scheduler = self._scheduler
        with scheduler.lock:
            tasks = scheduler.unfinished
            running = sum(len(machine.runs) for machine in scheduler.machines)
            paused, error = scheduler.paused, scheduler.health.storage_error
        now = scheduler.now()
        waiting = GaugeMetricFamily(
            "mflux_tasks_waiting", "Tasks that wait, also for a download.", labels=["level"]
        )
        oldest = GaugeMetricFamily(
            "mflux_oldest_waiting_task_age_seconds",
            "Age of the task that has waited longest; 0: none waits.",
            labels=["level"],
        )
        for priority, level in LEVELS.items():
            created = [
                task.created_at
                for task in tasks
                if task.priority == priority and task.status is TaskStatus.WAITING
            ]
            waiting.add_metric([level], len(created))
            oldest.add_metric([level], max(now - min(created), 0.0) if created else 0.0)
        yield waiting
        yield oldest
        yield GaugeMetricFamily("mflux_tasks_running", "Tasks that run.", running)
        yield GaugeMetricFamily("mflux_queue_paused", "Whether it is paused: 1 or 0.", paused)
        yield GaugeMetricFamily(
            "mflux_storage_refuses", "Whether the disk refuses: 1 or 0.", error is not None
        )
        ended = CounterMetricFamily(
            "mflux_tasks_ended", "Tasks that have ended since the start.", labels=["status"]
        )
        for kind in sorted(ENDS):
            ended.add_metric([kind], scheduler.events.counts[kind])
        yield ended

    def _forecasts(self) -> Iterator[Metric]:
        with self._scheduler.lock:
            spread = self._scheduler.spread
            figures = spread.count, spread.median_error(), spread.share_inside_p90()
        count, error, inside = figures
        yield GaugeMetricFamily(
            "mflux_forecasts_compared", "Latest tasks that the two figures below are of.", count
        )
        if error is not None:
            yield GaugeMetricFamily(
                "mflux_forecast_error_ratio",
                "Median of |forecast - truth| / truth, of waits as forecast at submit.",
                error,
            )
        if inside is not None:
            yield GaugeMetricFamily(
                "mflux_forecast_p90_coverage_ratio",
                "Share of tasks that took no longer than their p90, 0 to 1.",
                inside,
            )

    def _machines(self) -> Iterator[Metric]:
        busy = CounterMetricFamily(
            "mflux_gpu_busy_seconds",
            "Seconds in which the GPU had a task, loading included.",
            labels=["machine"],
        )
        takes = GaugeMetricFamily(
            "mflux_machine_takes_tasks",
            "Whether a machine is there and not drained: 1 or 0.",
            labels=["machine"],
        )
        scheduler = self._scheduler
        with scheduler.lock:
            now = scheduler.monotonic()
            for machine in scheduler.machines:
                busy.add_metric([machine.name], machine.busy_ended_s + machine.running_s(now))
                takes.add_metric([machine.name], machine.takes_tasks)
            lost = len(scheduler.machines.lost)
            away = scheduler.health.broker_away_since is not None
        yield busy
        yield takes
        yield GaugeMetricFamily(
            "mflux_machines_lost", "Machines that have left or are silent.", lost
        )
        yield GaugeMetricFamily(
            "mflux_broker_away", "Whether the broker cannot be reached: 1 or 0.", away
        )

    def _downloads(self) -> Iterator[Metric]:
        downloads = self._scheduler.downloads
        with self._scheduler.lock:
            waiting, current = len(self._scheduler.pending), downloads.current
            done, failed = downloads.done, downloads.failed
        yield GaugeMetricFamily(
            "mflux_tasks_waiting_for_download",
            "Tasks that wait for weights, or for their prompt to be written.",
            waiting,
        )
        ended = CounterMetricFamily(
            "mflux_downloads_ended", "Downloads of weights since the start.", labels=["result"]
        )
        ended.add_metric(["done"], done)
        ended.add_metric(["failed"], failed)
        yield ended
        yield GaugeMetricFamily(
            "mflux_download_bytes",
            "Bytes on disk of the weights that are being downloaded; 0: none are.",
            current.bytes_done if current else 0,
        )
