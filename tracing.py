"""OpenTelemetry: a span for each task that has ended (--traces).

The variables OTEL_* say where the spans go, as for every program with OpenTelemetry: see
OTEL_EXPORTER_OTLP_ENDPOINT. They hold no prompt and no name of a client.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import errors
from queue_manager import QueueManager
from scheduler.events import ENDS
from supervision import SupervisedThread
from task import Task, TaskStatus

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

LISTEN_S = 60.0
FLUSH_MS = 1000


def exporting_provider() -> "TracerProvider":
    """Sends spans with OTLP over HTTP. Raises: BadOption: a package is missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as missing:
        raise errors.BadOption(
            f"--traces needs packages: {sys.executable} -m pip install opentelemetry-sdk "
            "opentelemetry-exporter-otlp-proto-http"
        ) from missing
    resource = Resource.create({"service.name": "mflux-server"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Traces:
    """Owns a thread that waits for the ends of tasks.

    Args:
        provider: where the spans go.
    """

    def __init__(self, queue: QueueManager, provider: "TracerProvider") -> None:
        self._queue, self._provider = queue, provider
        self._tracer = provider.get_tracer("mflux-server")
        self._latest = queue.events.last_id
        self._thread = SupervisedThread("traces", self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """To be called when the events are closed."""
        self._thread.let_end()
        if self._thread.is_alive():
            self._thread.join(FLUSH_MS / 1000)
        if not self._thread.is_alive():
            self.run_once(0.0)  # what has ended in the last moment
        self._provider.force_flush(FLUSH_MS)

    def run_once(self, timeout_s: float = LISTEN_S) -> None:
        """Make the spans of tasks that have ended since the last call; wait for events."""
        for event in self._queue.events.wait(self._latest, timeout_s):
            self._latest = event.id
            if event.kind in ENDS:
                with suppress(errors.ServerError):  # it is removed already
                    self._add(self._queue.status(event.task_id))

    def _run(self) -> None:
        while not self._queue.events.closed:
            self.run_once()

    def _add(self, task: Task) -> None:
        """A span from submit to end; inside it one for the time in which the task waited, and one
        for that in which it ran, with the seconds of its phases."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        params, ended_at = task.params, task.ended_at or task.created_at
        span = self._tracer.start_span(
            "task",
            start_time=_ns(task.created_at),
            attributes={
                "mflux.task_id": task.task_id,
                "mflux.status": task.status.value,
                "mflux.model": params.model,
                "mflux.width": params.width,
                "mflux.height": params.height,
                "mflux.steps": params.steps,
                "mflux.images": task.images_done,
                "mflux.priority": task.priority,
            },
        )
        if task.status is TaskStatus.FAILED:
            span.set_status(Status(StatusCode.ERROR, task.error_code))
        inside, started_at = set_span_in_context(span), task.started_at or ended_at
        waiting = self._tracer.start_span("waiting", inside, start_time=_ns(task.created_at))
        waiting.end(_ns(started_at))
        if task.started_at is not None:
            seconds = dict(_phases(task))
            running = self._tracer.start_span(
                "running", inside, start_time=_ns(started_at), attributes=seconds
            )
            running.end(_ns(ended_at))
        span.end(_ns(ended_at))


def _phases(task: Task) -> Iterator[tuple[str, float]]:
    """Attributes: the seconds of each phase, of all images together."""
    yield "mflux.text_encoding_s", sum(measured.text_encoding_s for measured in task.measured)
    yield "mflux.denoising_s", sum(sum(measured.step_s) for measured in task.measured)
    yield "mflux.decoding_s", sum(measured.decoding_s for measured in task.measured)
    yield "mflux.image_encoding_s", sum(measured.image_encoding_s for measured in task.measured)


def _ns(seconds: float) -> int:
    """Unix nanoseconds, as spans have them."""
    return int(seconds * 1e9)
