"""The routes about the server itself: its health, and what it has learned."""

import shutil
import time
from pathlib import Path

from flask import Response

import errors
from api.answers import json_response
from api.api_docs import documented, json_answer
from api.identity import client, public
from api.models_api import download_answer
from api.routes import route
from api.server_answers import HealthAnswer, MemoryAnswer, StatsAnswer, stats_answer
from key_file import NOBODY
from queue_manager import QueueManager
from scheduler.health import ServerState
from version import VERSION, commit
from workers.protocols import Generator
from workers.worker import Worker


class ServerRoutes:
    def __init__(
        self, queue: QueueManager, worker: Worker, generator: Generator, data_dir: Path
    ) -> None:
        self._queue = queue
        self._worker = worker
        self._generator = generator
        self._data_dir = data_dir
        self._started_at = time.monotonic()

    @route("GET", "/stats")
    @documented(
        "Learned durations and the accuracy of forecasts",
        tag="server",
        description="Learned seconds by size, the error of the forecasts so far, and how busy the "
        "GPU is. Operators also get the forecasts of the last tasks with what came, and figures of "
        "each machine.",
        answers={200: json_answer(StatsAnswer, "The figures.")},
        errors=(errors.StorageUnavailable,),
    )
    def stats(self) -> Response:
        return json_response(stats_answer(self._queue.stats(), operator=client().operator))

    @public
    @route("GET", "/health")
    @documented(
        "Health of the server",
        tag="server",
        answers={
            200: json_answer(HealthAnswer, "loading, ready or busy."),
            503: json_answer(HealthAnswer, "draining or failed; `last_error` says why it failed."),
        },
        errors=(),
    )
    def health(self) -> Response:
        health = self._queue.health()
        error = None if client() is NOBODY else health.last_error
        default = self._queue.allowed.default
        done, images_bytes = self._queue.images()
        memory = self._generator.memory
        answer = HealthAnswer(
            status=health.state,
            model=default.name,
            loaded_models=[weights.key for weights in health.loaded],
            loading_model=health.loading.model.name if health.loading else None,
            download=download_answer(health),
            model_title=default.title,
            quantize=health.quantize,
            uptime_s=time.monotonic() - self._started_at,
            worker_restarts=self._worker.restarts,
            version=None if client() is NOBODY else VERSION,
            commit=None if client() is NOBODY else commit() or None,
            last_error=error.message if error else None,
            last_error_at=error.at if error else None,
            broker_away_since=health.broker_away_since,
            machines=health.machines,
            memory=MemoryAnswer(
                active_bytes=memory.active_bytes,
                peak_bytes=memory.peak_bytes,
                cache_bytes=memory.cache_bytes,
            ),
            disk_free_bytes=_free_bytes(self._data_dir),
            paused=health.paused,
            waiting=health.waiting,
            running=health.running,
            done=done,
            images_bytes=images_bytes,
        )
        works = health.state not in (ServerState.DRAINING, ServerState.FAILED)
        return json_response(answer, 200 if works else 503)


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
