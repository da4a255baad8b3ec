"""The routes about the server itself: its health, and what it has learned."""

import shutil
import time
from pathlib import Path

from flask import Blueprint, Response

from api.answers import json_response
from api.api_docs import documented, json_answer
from api.models_api import download_answer
from api.server_answers import HealthAnswer, MemoryAnswer, StatsAnswer, stats_answer
from queue_manager import QueueManager
from scheduler.health import ServerState
from workers.worker import Generator, Worker


def server_routes(
    queue: QueueManager, worker: Worker, generator: Generator, data_dir: Path
) -> Blueprint:
    routes = Blueprint("server", __name__)
    started_at = time.monotonic()

    @routes.get("/stats")
    @documented(
        "What was learned about time",
        tag="server",
        description="Learned seconds by size, the error of the forecasts so far, and how busy the "
        "GPU is.",
        answers={200: json_answer(StatsAnswer, "The figures.")},
        errors=(),
    )
    def stats() -> Response:
        return json_response(stats_answer(queue.stats()))

    @routes.get("/health")
    @documented(
        "Health of the server",
        tag="server",
        answers={
            200: json_answer(HealthAnswer, "loading, ready or busy."),
            503: json_answer(HealthAnswer, "draining or failed; `last_error` says why it failed."),
        },
        errors=(),
    )
    def tell_health() -> Response:
        health = queue.health()
        done, images_bytes = queue.images()
        memory = generator.memory
        answer = HealthAnswer(
            status=health.state,
            model=queue.allowed.default.name,
            loaded_models=[weights.key for weights in health.loaded],
            loading_model=health.loading.model.name if health.loading else None,
            download=download_answer(health),
            model_title=queue.allowed.default.title,
            quantize=health.quantize,
            uptime_s=time.monotonic() - started_at,
            worker_restarts=worker.restarts,
            last_error=health.last_error,
            memory=MemoryAnswer(
                active_bytes=memory.active_bytes,
                peak_bytes=memory.peak_bytes,
                cache_bytes=memory.cache_bytes,
            ),
            disk_free_bytes=_free_bytes(data_dir),
            waiting=health.waiting,
            running=health.running,
            done=done,
            images_bytes=images_bytes,
        )
        works = health.state not in (ServerState.DRAINING, ServerState.FAILED)
        return json_response(answer, 200 if works else 503)

    return routes


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
