"""GET /metrics: figures for Prometheus."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from flask import Response
from prometheus_client import CollectorRegistry, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

import errors
from api.api_docs import documented
from api.identity import check_operator
from api.request_log import RequestLog
from api.routes import route
from queue_manager import QueueManager
from workers.protocols import Generator
from workers.worker import Worker

TEXT = "text/plain; version=0.0.4; charset=utf-8"


class MetricsRoutes:
    def __init__(
        self,
        queue: QueueManager,
        worker: Worker,
        generator: Generator,
        data_dir: Path,
        requests: RequestLog,
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(queue.metrics)
        self._registry.register(ServerMetrics(queue, worker, generator, data_dir))
        self._registry.register(requests.seconds)
        self._registry.register(requests.answers)
        ProcessCollector(registry=self._registry)  # empty where there is no /proc

    @route("GET", "/metrics")
    @documented(
        "Figures for Prometheus",
        tag="operator",
        description="In its text format. They contain no prompts, no ids of tasks and no names of "
        "clients. Prometheus sends the operator's key with `authorization` in its configuration.",
        answers={
            200: {
                "description": "The figures.",
                "content": {"text/plain": {"schema": {"type": "string"}}},
            }
        },
        errors=(errors.OperatorOnly,),
    )
    def metrics(self) -> Response:
        check_operator()
        return Response(generate_latest(self._registry), content_type=TEXT)


class ServerMetrics(Collector):
    """Memory and disk, as they are when they are read."""

    def __init__(
        self, queue: QueueManager, worker: Worker, generator: Generator, data_dir: Path
    ) -> None:
        self._queue, self._worker = queue, worker
        self._generator, self._data_dir = generator, data_dir

    def collect(self) -> Iterator[Metric]:
        memory = self._generator.memory
        gauges = {
            "mflux_memory_active_bytes": ("Memory that MLX uses.", memory.active_bytes),
            "mflux_memory_peak_bytes": ("Its peak in the latest image.", memory.peak_bytes),
            "mflux_memory_cache_bytes": ("Freed memory that MLX keeps.", memory.cache_bytes),
            "mflux_memory_weights_bytes": ("Memory of loaded models.", memory.weights_bytes),
            "mflux_memory_total_bytes": ("Memory of the machine.", memory.total_bytes),
        }
        done, images_bytes = self._queue.images()
        gauges["mflux_kept_tasks"] = ("Ended tasks whose images are kept.", done)
        gauges["mflux_kept_images_bytes"] = ("Bytes of these images.", images_bytes)
        try:
            disk = shutil.disk_usage(self._data_dir)
        except OSError:
            pass
        else:
            gauges["mflux_disk_free_bytes"] = ("Free bytes of the data dir's disk.", disk.free)
            gauges["mflux_disk_total_bytes"] = ("Its size.", disk.total)
        for name, (help_text, value) in gauges.items():
            yield GaugeMetricFamily(name, help_text, value)
        yield CounterMetricFamily(
            "mflux_worker_restarts", "How often the worker thread died.", self._worker.restarts
        )
