"""The entry point: main() builds the parts, starts and stops them."""

import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

if find_spec("flask") is None:
    sys.exit(
        "server.py: the packages it needs are not installed for this Python: run 'make serve', or "
        "'pip install --no-deps -r requirements.txt'."
    )

import errors
import log_output
from allowed import Allowed
from announcements import announce, bonjour, cannot_listen, show_links, warn
from api.client_queue import own_queue_of
from api.cors import Cors
from api.generate_request import Limits
from api.http_server import HttpServer, most_connections, most_waiting
from api.image_size import MOST_OUTPUT_PIXELS_FACTOR
from api.origin_check import AllowedHosts
from api.submission import Submission
from api.waiting_places import WaitingPlaces
from api.webhooks import Webhooks
from api.wildcards import Wildcards
from application import create_app
from checks import Checks
from clocks import RunningClock
from commands import download_command, run_command
from compat.install import ForeignOptions, foreign_error
from configuration import (
    allow,
    chat_endpoint,
    for_lan,
    generator_of,
    identity_of,
    queue_limits,
    request_limits,
)
from decoding.decoder import PictureDecoder
from generation import machine_speed
from generation.previews import Previews
from keep_awake import KeepAwake
from models.hub_cache import needs_download
from models.mlx_setup import MlxMissing, prepare_mlx
from models.weights_cache import WeightsCache
from queue_manager import QueueManager
from scheduler.download_api import DownloadApi, ExpansionApi
from scheduler.scheduler import Scheduler
from scheduler.worker_api import WorkerApi
from service_manager import READY, STOPPING, notify
from settings import Settings
from storage.task_store import TaskStore
from supervision import end_process
from timing.speeds import Speeds
from timing_model import TimingModel
from tracing import Traces, exporting_provider
from workers.downloader import Downloader
from workers.expander import Expander
from workers.protocols import Generator
from workers.worker import Worker

if TYPE_CHECKING:
    from cluster.head import Head

log = logging.getLogger("mflux-server")

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOAD_FAILED = b"\xff"
STDERR = 2
STOP_S = 2.0
"""Seconds that a running step may still take when the server stops."""
STOP_LIMIT_S = 60.0
"""A stop that takes so much longer than --drain-s hangs: the process ends, the log says where."""


class Server:
    """Queue, worker and HTTP server, connected. Nothing runs before start()."""

    measure_speed: Callable[[], Speeds] | None = None
    """Measures this machine; None: it is not measured."""
    traces: Traces | None = None

    def __init__(
        self,
        settings: Settings,
        allowed: Allowed,
        generator: Generator,
        previews: Previews | None = None,
        weights_cache: WeightsCache | None = None,
    ) -> None:
        """Opens the store and binds the port.

        Args:
            previews: receives the latents of the generator; None: no previews.
            weights_cache: that of the generator; None: it has none.

        Raises:
            StoreError: the data dir cannot be used.
            OSError: the port cannot be opened.
        """
        limits = request_limits(settings)
        self._drain_s, self._draws_here = settings.drain_s, settings.local_worker
        self._clock = RunningClock()
        self._store = TaskStore(settings.data_dir)
        self.scheduler = self._open_scheduler(settings, allowed, weights_cache)
        self.queue = QueueManager(self.scheduler)
        self.worker_api = WorkerApi(self.scheduler)
        self.download_api = DownloadApi(self.scheduler)
        self._end, self.end_fd = os.pipe()
        """A byte that is written here ends the server: the number of a signal, or LOAD_FAILED."""
        os.set_blocking(self.end_fd, False)
        connections = most_connections()
        places = most_waiting(settings.threads, connections)
        self.places = WaitingPlaces(places, for_changes=(settings.threads - places) // 2)
        previews = previews or Previews(on=False)
        previews.on_new = self.worker_api.preview_made
        self._worker = Worker(
            self.worker_api,
            generator,
            on_load_failure=self._load_failed,
            unload_after_s=settings.unload_after_s,
            turn_to=previews.turn_to,
            mark_generated=settings.mark_generated,
            before_loading=self._before_loading,
        )
        self._downloader = Downloader(
            self.download_api, partial(download_command, settings.data_dir)
        )
        endpoint = chat_endpoint(settings, os.environ)
        self._expander = Expander(ExpansionApi(self.scheduler), endpoint, limits.max_prompt_chars)
        self._awake = KeepAwake(lambda: self.queue.health().has_work, on=settings.keep_awake)
        checks = self.scheduler.check_storage, self.queue.control.cancel_overdue
        self._checks = Checks(*checks, self._awake.check)
        self._webhooks = Webhooks(self.queue, self._store.callbacks, limits, settings.callback_key)
        self._head = self._head_of(settings, previews)
        self._decoder = PictureDecoder(
            settings.max_input_pixels,
            self.places.place,
            own_pixels=settings.max_pixels * MOST_OUTPUT_PIXELS_FACTOR,
        )
        self._submission = self._submission_of(settings, allowed, limits, generator)
        self._http = self._http_server(settings, generator, previews, connections)

    def _before_loading(self) -> None:
        self.worker_api.calibrate(self.measure_speed, machine_speed.mlx_version())
        self.download_api.fetch_first()

    def _submission_of(
        self, settings: Settings, allowed: Allowed, limits: Limits, generator: Generator
    ) -> Submission:
        return Submission(
            own_queue_of(self.queue),
            allowed,
            limits,
            partial(generator.refusal, memory=not settings.broker),  # others may have room
            places=self.places,
            decoder=self._decoder,
            check_adapters=generator.check_adapters,
            metadata=settings.metadata,
            expands=bool(settings.expand_url),
            wildcards=Wildcards(settings.wildcards_dir),
        )

    def _head_of(self, settings: Settings, previews: Previews) -> "Head | None":
        """What works with machines beyond this one; None: there are none."""
        if not settings.broker:
            return None
        from cluster.head import Head  # Celery, which is an extra

        head = Head(self.scheduler, settings.broker, settings.lease_s, previews.put)
        previews.on_look = head.watch
        return head

    def _open_scheduler(
        self, settings: Settings, allowed: Allowed, weights_cache: WeightsCache | None
    ) -> Scheduler:
        try:
            return Scheduler(
                allowed,
                TimingModel(),
                self._store,
                queue_limits(settings),
                needs_download=partial(needs_download, settings.data_dir),
                has_copy=lambda key: weights_cache is not None and key in weights_cache.keys,
                monotonic=self._clock,
                gaps=lambda: self._clock.gaps,
            )
        except errors.StorageUnavailable as error:
            self._store.close()
            raise errors.StoreError(
                f"The data dir {settings.data_dir} cannot be used: {error}"
            ) from error

    def _http_server(
        self,
        settings: Settings,
        generator: Generator,
        previews: Previews,
        connections: int,
    ) -> HttpServer:
        cors = Cors(settings.cors_origins)
        app = create_app(
            self.queue,
            self._worker,
            generator,
            self._submission,
            places=self.places,
            previews=previews,
            data_dir=settings.data_dir,
            max_body_bytes=settings.max_body_bytes,
            allowed_hosts=AllowedHosts(settings.host, settings.allowed_hosts),
            identity=identity_of(settings),
            foreign=ForeignOptions(
                sync_max_wait_s=settings.sync_max_wait_s,
                clamp=settings.clamp,
                public_url=settings.public_url,
                model_switch=settings.sdapi_model_switch,
            ),
            cors=cors,
            trusted_proxies=settings.trusted_proxies,
        )
        return HttpServer(
            app,
            settings.host,
            settings.port,
            error_form=foreign_error,
            cors=cors,
            threads=settings.threads,
            connections=connections,
            max_body_bytes=settings.max_body_bytes,
        )

    @property
    def port(self) -> int:
        return self._http.port

    def start(self) -> None:
        self._clock.start()
        self._http.start()
        if self._draws_here:
            self._worker.start()
            self._downloader.start()
        if self._head:
            self._head.start()
        self._expander.start()
        self._checks.start()
        if self.traces:
            self.traces.start()
        self._webhooks.start()

    def wait(self) -> int:
        """Waits until the server has to end; returns the exit code."""
        return 1 if os.read(self._end, 1) == LOAD_FAILED else 0

    def stop(self) -> bool:
        """Stops accepting tasks, stops the running task (see --drain-s), closes port and store.

        Returns:
            Whether the worker ended in time.
        """
        self.scheduler.stop(self._drain_s)
        self._checks.stop(0.5)
        self._awake.release()
        self._downloader.stop(0.5)
        self._expander.stop(0.5)
        if self._head:
            self._head.stop(1.0)
        ended = self._worker.stop(STOP_S, self._drain_s)
        try:
            self.worker_api.release_all()
        except errors.StorageUnavailable as error:
            log.error("%s The running task counts this end as an attempt.", error)
        self.queue.events.close()
        if self.traces:
            self.traces.stop()
        self._webhooks.stop(0.5)
        self._http.stop(0.5)
        self._decoder.close()
        self._store.close()
        self._clock.stop()
        return ended

    def _load_failed(self, error: errors.ModelLoadError) -> None:
        log.error("%s", error)
        os.write(self.end_fd, LOAD_FAILED)


def main(argv: list[str]) -> int:
    settings = for_lan(Settings.read(argv, os.environ))
    log_output.configure(settings.log_level, settings.log_format, prompts=settings.log_prompts)
    try:
        if (ended := run_command(settings)) is not None:
            return ended
        has_gpu = prepare_mlx()
        allowed = allow(settings, has_gpu)
        previews = Previews(on=settings.previews)
        weights_cache = WeightsCache(settings.data_dir / "weights", settings.weights_cache)
        generator = generator_of(settings, allowed, previews, weights_cache)
        server = Server(settings, allowed, generator, previews, weights_cache)
        announcement = bonjour(settings, server.port)
        server.traces = Traces(server.queue, exporting_provider()) if settings.traces else None
        server.measure_speed = machine_speed.measure
        server.scheduler.estimates.count_tokens = generator.token_counts.count
        generator.guard.restore(server.scheduler.store.state)
    except (MlxMissing, errors.StoreError, errors.ModelLoadError, errors.BadOption) as error:
        print(f"server.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, errors.BadOption) else 1
    except OSError as error:
        print(f"server.py: {cannot_listen(settings, error)}", file=sys.stderr)
        return 1
    warn(settings, allowed)
    # A byte in a pipe needs no lock: signals may arrive at any time, several at once.
    signal.set_wakeup_fd(server.end_fd, warn_on_full_buffer=False)
    # These handlers are never exchanged: Python prints a traceback for a signal that arrives then.
    for number in ENDING_SIGNALS:
        signal.signal(number, lambda *_: None)
    show_links(settings, identity_of(settings), server.port)
    log_output.capture_prints()
    server.start()
    announce(settings, allowed, server.port)
    if announcement:
        announcement.start()
    notify(READY, os.environ)
    exit_code = server.wait()
    notify(STOPPING, os.environ)
    log.info("stopping")
    limit_s = settings.drain_s + STOP_LIMIT_S
    faulthandler.dump_traceback_later(limit_s, exit=True, file=STDERR)
    if announcement:
        announcement.stop()
    if not server.stop():
        log.info("the running step did not end in time: leaving it")
    faulthandler.cancel_dump_traceback_later()
    if unfinished := server.queue.length:
        log.info("tasks that wait for the next start: %d", unfinished)
    return exit_code


if __name__ == "__main__":
    # When main() returns, everything is stopped and saved. Python's own way out would take apart
    # what MLX's threads still use, which now and then ends in an abort.
    end_process(main(sys.argv[1:]))
