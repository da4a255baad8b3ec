"""--traces: the spans of tasks, in OpenTelemetry's memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import GIVE_UP_S
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from played_app import PlayedApp

from tracing import Traces, exporting_provider


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[PlayedApp]:
    bench = PlayedApp(tmp_path)
    yield bench
    bench.store.close()


class Recorded:
    """The traces of an application, and their spans."""

    def __init__(self, bench: PlayedApp) -> None:
        self._exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.traces = Traces(bench.queue, provider)

    def spans(self) -> dict[str, ReadableSpan]:
        """The new spans, by name."""
        self._exporter.clear()
        self.traces.run_once(0.0)
        return {span.name: span for span in self._exporter.get_finished_spans()}


def seconds(span: ReadableSpan) -> tuple[float, float]:
    """Its start and end."""
    assert span.start_time
    assert span.end_time
    return span.start_time / 1e9, span.end_time / 1e9


def test_a_task_is_a_span_with_the_time_it_waited_and_the_time_it_ran(bench: PlayedApp) -> None:
    recorded = Recorded(bench)
    task_id = bench.submit("alice", "a secret lighthouse")
    assert recorded.spans() == {}
    created_at = bench.at
    bench.at += 5.0
    started_at = bench.at
    bench.run()
    spans = recorded.spans()
    task, waiting, running = spans["task"], spans["waiting"], spans["running"]
    assert seconds(task) == pytest.approx((created_at, bench.at))
    assert seconds(waiting) == pytest.approx((created_at, started_at))
    assert seconds(running) == pytest.approx((started_at, bench.at))
    assert task.context
    for inside in (waiting, running):
        assert inside.parent
        assert inside.parent.span_id == task.context.span_id
    assert task.attributes
    assert task.attributes["mflux.task_id"] == task_id
    assert task.attributes["mflux.model"] == "noise-flux1"
    assert task.attributes["mflux.status"] == "done"
    assert running.attributes
    assert running.attributes["mflux.denoising_s"] == pytest.approx(8.0)
    for secret in ("alice", "lighthouse"):
        assert not any(secret in span.to_json() for span in spans.values())
    assert recorded.spans() == {}, "each task once"


def test_a_failed_task_is_an_error_and_a_cancelled_one_has_not_run(bench: PlayedApp) -> None:
    recorded = Recorded(bench)
    bench.submit("alice")
    bench.fail()
    task = recorded.spans()["task"]
    assert (task.status.is_ok, task.status.description) == (False, "task_failed")
    waiting = bench.submit("alice")
    bench.json("alice", "DELETE", "/delete", query_string={"task_id": waiting})
    spans = recorded.spans()
    assert set(spans) == {"task", "waiting"}
    assert spans["task"].status.is_unset


def test_a_task_that_ends_as_the_server_stops_has_its_span(bench: PlayedApp) -> None:
    recorded = Recorded(bench)
    bench.submit("alice")
    bench.run()
    bench.queue.events.close()
    recorded.traces.stop()
    assert "task" in [span.name for span in recorded._exporter.get_finished_spans()]


def test_the_thread_ends_with_the_events(bench: PlayedApp) -> None:
    recorded = Recorded(bench)
    recorded.traces.start()
    bench.queue.events.close()
    recorded.traces.stop()
    recorded.traces._thread.join(GIVE_UP_S)
    assert not recorded.traces._thread.is_alive()


def test_the_provider_sends_with_otlp_to_where_the_variables_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    provider = exporting_provider()
    assert provider.resource.attributes["service.name"] == "mflux-server"
    assert provider._active_span_processor._span_processors
    provider.shutdown()
