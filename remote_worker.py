"""The entry point of a worker: it draws tasks of a head on another machine (docs/cluster.md).

It takes the options of server.py, and builds its generator from them. What the head sends is looked
up in what these options allow.
"""

import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

if find_spec("celery") is None:
    sys.exit(
        "remote_worker.py: Celery is not installed for this Python: run 'make worker', or "
        "'pip install --no-deps -r requirements.txt -r requirements-cluster.txt'."
    )

import errors
import log_output
from allowed import Allowed
from cluster.carrier import Carrier
from cluster.messages import Model, Registration
from cluster.source import RemoteSource
from configuration import allow, generator_of
from generation import machine_speed
from generation.previews import Previews
from models.hub_cache import bytes_on_disk, is_present, needs_download
from models.mlx_setup import MlxMissing, prepare_mlx
from models.weights_cache import WeightsCache
from settings import Settings
from storage.data_dir import WORKER_INPUTS, own, worker_id_of
from supervision import end_process
from timing.speeds import Speeds
from workers.worker import Worker

log = logging.getLogger("mflux-worker")

STOP_S = 5.0
"""Seconds that a running step may still take when the worker stops."""
PACKAGES = ("mflux", "mlx", "celery")
"""Whose versions the head lists."""
MOST_LORAS = 1_000


class WorkerProcess:
    """Source, generator and worker, connected. Nothing runs before run().

    Args:
        inputs: folder for the input pictures of its tasks.
    """

    def __init__(self, settings: Settings, allowed: Allowed, inputs: Path) -> None:
        self._settings = settings
        self._allowed = allowed
        self._carrier = Carrier(settings.broker)
        self._id = worker_id_of(settings.data_dir)
        self._failed = False
        self._speeds: Speeds = {}
        """Of this machine; empty: not measured yet."""
        self._hardware, self._versions = _hardware(), _versions()
        self._missing = {model.name for model in (*allowed.models, *allowed.helpers)}
        """Names of models whose weights were not on this machine when it was last looked."""
        previews = Previews(on=settings.previews)
        weights_cache = WeightsCache(settings.data_dir / "weights", settings.weights_cache)
        self._generator = generator_of(settings, allowed, previews, weights_cache)
        self._source = RemoteSource(
            self._id,
            self._carrier,
            allowed,
            registration=self._registration,
            resident=lambda: self._generator.resident,
            downloaded=lambda model: None if is_present(model) else bytes_on_disk(model),
            folder=inputs,
            refused=self._end_with,
            watched=previews.look,
        )
        previews.on_new = lambda task_id: self._source.preview_made(
            task_id, previews.latest(task_id)
        )
        self._worker = Worker(
            self._source,
            self._generator,
            on_load_failure=lambda error: self._end_with(str(error)),
            unload_after_s=settings.unload_after_s,
            turn_to=previews.turn_to,
            mark_generated=settings.mark_generated,
            before_loading=self._measure,
        )

    def run(self) -> int:
        """Draws until SIGTERM or SIGINT; returns the exit code."""
        try:
            self._source.outbox.start()
            self._worker.start()
            code = self._carrier.work(self._id, self._source.handle)
        except SystemExit:
            code = 0
        # It is stopping already. A signal that arrives while SIG_IGN is set prints a traceback.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        log.info("stopping")
        if not self._worker.stop(STOP_S, self._settings.drain_s):
            log.info("the running step did not end in time: leaving it")
        self._source.close(STOP_S)
        return 1 if self._failed else code

    def _measure(self) -> None:
        """Measure how fast this machine is, on the worker's thread."""
        self._speeds = machine_speed.measure()

    def _end_with(self, sentence: str) -> None:
        """Ends the process, because this cannot go on."""
        if self._failed:
            return
        log.error("%s", sentence)
        self._failed = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _registration(self) -> Registration:
        settings, allowed = self._settings, self._allowed
        models = [*allowed.models, *allowed.helpers]
        for model in models:  # those that are there are not looked for again
            if model.name in self._missing and not needs_download(settings.data_dir, model):
                self._missing.remove(model.name)
        return Registration(
            name=settings.worker_name or platform.node() or "worker",
            hardware=self._hardware,
            system=platform.platform(terse=True),
            memory_bytes=self._generator.memory.total_bytes,
            versions=self._versions,
            speeds=dict(self._speeds),
            models=[
                Model(
                    name=model.name,
                    missing=model.name in self._missing,
                    options=model.options.suffix,
                )
                for model in models
            ],
            bits=[allowed.quantize, *allowed.quantize_choices],
            loras=sorted(allowed.loras())[:MOST_LORAS],
            lora_repos=allowed.allow_lora_repos,
            models_in_memory=settings.models_in_memory,
        )


def _hardware() -> str:
    """The processor, as macOS names it."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if found:
            return found
    return f"{platform.machine()}, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextmanager
def empty_folder(path: Path) -> Iterator[Path]:
    """A folder that only this user can read, removed at the end. What an earlier process has left
    there, because it was killed, is removed first."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def main(argv: list[str]) -> int:
    settings = Settings.read(argv, os.environ, program="remote_worker.py")
    for number in (signal.SIGTERM, signal.SIGINT):  # until Celery has its own handlers
        signal.signal(number, lambda *_: sys.exit(0))
    log_output.configure(settings.log_level, settings.log_format, prompts=settings.log_prompts)
    try:
        if not settings.broker:
            raise errors.BadOption("--broker URL is needed: the broker of the head.")
        has_gpu = prepare_mlx(quiet=True)
        allowed = allow(settings, has_gpu)
        with own(settings.data_dir), empty_folder(settings.data_dir / WORKER_INPUTS) as inputs:
            log.info("a worker with %s; it draws when the head sends tasks", allowed.default.name)
            return WorkerProcess(settings, allowed, inputs).run()
    except (MlxMissing, errors.StoreError, OSError) as error:
        print(f"remote_worker.py: {error}", file=sys.stderr)
        return 1
    except errors.BadOption as error:
        print(f"remote_worker.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
