"""What Prometheus reads: correct figures, few labels, nothing private, and the dashboard."""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, ROOT, ServerProcess
from played_app import KEYS, PlayedApp
from prometheus_client.parser import text_string_to_metric_families

from timing.spread import Outcome

DEPLOY = ROOT / "deploy"
PROMETHEUS = shutil.which("prometheus")
Labels = dict[str, str]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[PlayedApp]:
    bench = PlayedApp(tmp_path)
    yield bench
    bench.store.close()


def figures(bench: PlayedApp) -> list[tuple[str, Labels, float]]:
    """Name, labels and value of each sample."""
    answer = bench.ask("root", "GET", "/metrics")
    assert answer.status_code == 200, answer.text
    families = list(text_string_to_metric_families(answer.text))
    assert all(family.documentation for family in families)
    return [(s.name, s.labels, s.value) for family in families for s in family.samples]


def value(bench: PlayedApp, name: str, **labels: str) -> float:
    found = [v for n, own, v in figures(bench) if n == name and labels.items() <= own.items()]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def test_waiting_tasks_are_counted_by_level_with_the_age_of_the_oldest(bench: PlayedApp) -> None:
    bench.submit("root", priority=1)
    bench.at += 30.0
    bench.submit("root", priority=1)
    bench.submit("alice")
    bench.at += 10.0
    assert value(bench, "mflux_tasks_waiting", level="urgent") == 2
    assert value(bench, "mflux_oldest_waiting_task_age_seconds", level="urgent") == 40.0
    assert value(bench, "mflux_tasks_waiting", level="normal") == 1
    assert value(bench, "mflux_oldest_waiting_task_age_seconds", level="normal") == 10.0
    assert value(bench, "mflux_tasks_waiting", level="background") == 0
    assert value(bench, "mflux_oldest_waiting_task_age_seconds", level="background") == 0.0
    bench.claim()
    assert value(bench, "mflux_tasks_running") == 1
    assert value(bench, "mflux_tasks_waiting", level="urgent") == 1


def test_ended_tasks_are_counted_by_their_end(bench: PlayedApp) -> None:
    for _ in range(2):
        bench.submit("alice")
        bench.run()
    bench.submit("alice")
    bench.fail()
    bench.json("alice", "DELETE", "/delete", query_string={"task_id": bench.submit("alice")})
    for status, count in (("done", 2), ("failed", 1), ("cancelled", 1)):
        assert value(bench, "mflux_tasks_ended_total", status=status) == count


def test_the_busy_seconds_of_the_gpu_and_the_forecasts_follow_the_tasks(bench: PlayedApp) -> None:
    for _ in range(3):
        bench.submit("alice")
        bench.run()
    assert value(bench, "mflux_gpu_busy_seconds_total", machine="local") == pytest.approx(24.0)
    bench.submit("alice")
    bench.claim()
    bench.at += 5.0
    assert value(bench, "mflux_gpu_busy_seconds_total", machine="local") == pytest.approx(29.0)


def test_the_error_of_the_forecasts_and_the_coverage_of_the_p90_are_there_once_known(
    bench: PlayedApp,
) -> None:
    names = {name for name, _, _ in figures(bench)}
    assert "mflux_forecast_error_ratio" not in names
    for actual_s in (8.0, 10.0, 16.0):
        bench.queue._scheduler.spread.learn(Outcome(0, 10.0, 12.0, actual_s))
    assert value(bench, "mflux_forecasts_compared") == 3
    assert value(bench, "mflux_forecast_error_ratio") == pytest.approx(0.25)
    assert value(bench, "mflux_forecast_p90_coverage_ratio") == pytest.approx(2 / 3)


def test_phases_are_histograms_by_model(bench: PlayedApp) -> None:
    bench.submit("alice")
    bench.run()
    for phase in ("text_encoding", "denoising", "decoding", "image_encoding"):
        assert value(bench, "mflux_phase_seconds_count", model="noise-flux1", phase=phase) == 1
    assert value(bench, "mflux_phase_seconds_bucket", phase="denoising", le="+Inf") == 1


def test_requests_are_counted_by_route_without_what_clients_write(bench: PlayedApp) -> None:
    task_id = bench.submit("alice")
    for _ in range(3):
        bench.ask("alice", "GET", "/status", query_string={"task_id": task_id})
    bench.ask("alice", "GET", "/api/status", query_string={"task_id": "f" * 16})
    bench.ask("root", "POST", f"/tasks/{task_id}/front")
    bench.ask("alice", "GET", "/no/such/route")
    bench.ask("alice", "BREW", "/pot")
    of_status = {"method": "GET", "route": "/status"}
    assert value(bench, "mflux_http_answers_total", status="2xx", **of_status) == 3
    assert value(bench, "mflux_http_answers_total", status="4xx", **of_status) == 1
    assert value(bench, "mflux_http_request_seconds_count", **of_status) == 4
    assert value(bench, "mflux_http_answers_total", route="/tasks/<task_id>/front") == 1
    assert value(bench, "mflux_http_answers_total", route="other", method="other") == 2


def test_figures_contain_no_prompts_ids_or_clients(bench: PlayedApp) -> None:
    ids = [bench.submit("alice", "a secret lighthouse", user="walter") for _ in range(2)]
    bench.run()
    text = bench.ask("root", "GET", "/metrics").text
    assert "mflux_tasks_ended_total" in text
    private = ("lighthouse", "walter", "alice", "root", *KEYS.values(), *ids)
    assert [word for word in private if word in text] == []


def test_more_tasks_and_requests_make_no_more_series(bench: PlayedApp) -> None:
    def play(number: int) -> int:
        task_id = bench.submit("alice", f"prompt {number}")
        bench.run()
        bench.json("alice", "GET", "/status", query_string={"task_id": task_id})
        bench.ask("alice", "GET", f"/web/none-{number}.js")
        bench.ask("alice", "GET", f"/none-{number}")
        bench.ask("alice", f"M{number}", "/status")
        return len(figures(bench))

    play(0)
    before = play(1)
    assert [play(number) for number in range(2, 6)] == [before] * 4


def dashboard_queries() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_dashboard_shows_figures_that_the_server_has(bench: PlayedApp) -> None:
    bench.submit("alice")
    bench.run()
    bench.queue._scheduler.spread.learn(Outcome(0, 10.0, 12.0, 11.0))
    there = {name for name, _, _ in figures(bench) if name.startswith("mflux_")}
    shown = set(re.findall(r"\bmflux_\w+", " ".join(dashboard_queries())))
    assert len(shown) >= 15
    assert shown <= there


@pytest.mark.skipif(not PROMETHEUS, reason="there is no Prometheus here")
def test_a_real_prometheus_reads_the_figures_and_evaluates_the_dashboard(
    server: ServerProcess, tmp_path: Path
) -> None:
    server.wait_until_ended(server.submit()["task_id"])
    config = (DEPLOY / "prometheus.yml").read_text(encoding="utf-8")
    config = config.replace("127.0.0.1:4030", server.url.removeprefix("http://"))
    file = tmp_path / "prometheus.yml"
    file.write_text(config.replace("interval: 15s", "interval: 1s"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    process = subprocess.Popen(
        [
            str(PROMETHEUS),
            f"--config.file={file}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address={address}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_samples(f"http://{address}")
        queries = dashboard_queries()
        assert queries
        for expression in queries:
            filled = expression.replace("$__rate_interval", "1m").replace("$job", ".+")
            query(f"http://{address}", filled)
    finally:
        process.terminate()
        process.wait(GIVE_UP_S)


def wait_for_samples(url: str) -> None:
    until, pause = time.monotonic() + GIVE_UP_S, Event()
    while time.monotonic() < until:
        try:
            found = query(url, "sum(mflux_tasks_ended_total)")
        except requests.ConnectionError:
            found = []
        if found:
            assert float(found[0]["value"][1]) >= 1
            return
        pause.wait(0.1)  # Prometheus reports no event
    raise AssertionError("Prometheus has read nothing")


def query(url: str, expression: str) -> list[Any]:
    answer = requests.get(f"{url}/api/v1/query", params={"query": expression}, timeout=GIVE_UP_S)
    if answer.status_code == 503:  # it is starting
        return []
    assert answer.status_code == 200, (expression, answer.text)
    found: list[Any] = answer.json()["data"]["result"]
    return found
