"""The thread that owns the GPU: load the model once, then claim, generate, finish, for ever.

It asks for two shapes and imports neither: a source of tasks (the QueueManager) and a generator.
MLX ties arrays to the thread that made them, so loading and generating happen on this one thread.
Encoding a finished picture does not need the GPU: a second thread does it, so that the next task
starts at once. A third one watches the first: should it end by an error that nothing here catches,
another one is started, which loads the model anew.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event, Semaphore, Thread
from typing import Protocol

from PIL import Image

from errors import ModelLoadError, ServerError, StorageUnavailable
from images import encode_image
from task import GenerationParams, Memory, Phase, Report, Task

log = logging.getLogger(__name__)

PICTURES_WAITING = 2
"""Decoded pictures that may wait to be encoded; the worker then waits too, which bounds memory."""
IDLE_S = 10.0
"""An idle worker looks up this often, to let the source tidy up."""
RETRY_S = 1.0
"""Pause before the disk is tried again, and before a dead worker thread is replaced."""


class Generator(Protocol):
    def load(self) -> int | None:
        """Load the model; returns the bits its weights are quantized to, or None.

        Raises:
            ModelLoadError: with what the operator can do.
        """

    def generate(self, params: GenerationParams, report: Report) -> Image.Image: ...

    @property
    def memory(self) -> Memory:
        """After the latest step; any thread may ask."""

    def refusal(self, params: GenerationParams) -> str | None:
        """Why this picture cannot be made on this machine, or None; any thread may ask."""


class TaskSource(Protocol):
    @property
    def stopping(self) -> bool: ...
    def load_started(self) -> None: ...
    def load_finished(self, quantize: int | None) -> None: ...
    def load_failed(self, message: str) -> None: ...
    def claim(self, timeout_s: float | None = None) -> Task | None: ...
    def report(self, task_id: str, phase: Phase, steps_done: int, steps_total: int) -> bool: ...
    def finish(
        self, task_id: str, image: bytes, *, image_encoding_s: float | None = None
    ) -> bool: ...
    def fail(self, task_id: str, code: str, message: str) -> bool: ...
    def release(self, task_id: str, *, count_attempt: bool = False) -> bool: ...
    def prune(self) -> None: ...
    def stop(self, drain_s: float = 0.0) -> None: ...


class _StopTask(Exception):
    """Leaves a generation at a step boundary."""


class Worker:
    """Owns the worker thread, its watch and the encoder thread.

    Args:
        on_load_failure: called on the worker thread when the model cannot be loaded.
    """

    def __init__(
        self,
        source: TaskSource,
        generator: Generator,
        on_load_failure: Callable[[ModelLoadError], None],
    ) -> None:
        self.restarts = 0
        """How often the worker thread died and was replaced."""
        self._source = source
        self._generator = generator
        self._on_load_failure = on_load_failure
        self._died = False
        self._on_gpu: str | None = None
        self._stopping = Event()
        self._watch = Thread(target=self._watch_worker, name="worker-watch", daemon=True)
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._room_to_encode = Semaphore(PICTURES_WAITING)

    def start(self) -> None:
        self._watch.start()

    def stop(self, timeout_s: float, drain_s: float = 0.0) -> bool:
        """End after the current step, or after the current task if that takes no longer than
        drain_s; returns whether the threads have ended drain_s + timeout_s from now."""
        deadline = time.monotonic() + drain_s + timeout_s
        self._source.stop(drain_s)
        self._stopping.set()
        if self._watch.is_alive():
            self._watch.join(drain_s + timeout_s)
        if self._watch.is_alive():
            self._encoder.shutdown(wait=False)
            return False
        encoding = Thread(target=self._encoder.shutdown, name="encoder-stop", daemon=True)
        encoding.start()
        encoding.join(max(deadline - time.monotonic(), 0.1))
        return not encoding.is_alive()

    def load(self) -> bool:
        """Load the model; returns whether it is ready."""
        self._source.load_started()
        try:
            quantize = self._generator.load()
        except ModelLoadError as error:
            self._source.load_failed(str(error))
            self._on_load_failure(error)
            return False
        self._source.load_finished(quantize)
        return True

    def run_once(self, timeout_s: float | None = None) -> bool:
        """Claim one task and bring it to its end; returns whether there was one."""
        task = self._source.claim(timeout_s)
        if task is None:
            return False
        task_id, params = task.task_id, task.params
        steps = params.steps
        self._on_gpu = task_id

        def report(phase: Phase, steps_done: int, steps_total: int) -> None:
            nonlocal steps
            steps = steps_total
            if not self._source.report(task_id, phase, steps_done, steps_total):
                raise _StopTask

        try:
            picture = self._generator.generate(params, report)
        except _StopTask:
            self._insist(lambda: self._source.release(task_id))
        except ServerError as error:
            code, message = error.code, error.message
            self._insist(lambda: self._source.fail(task_id, code, message))
        except Exception as error:
            log.exception("task %s failed", task_id)
            self._fail(task_id, error)
        else:
            goes_on = self._source.report(task_id, Phase.IMAGE_ENCODING, steps, steps)
            if goes_on or self._source.stopping:
                self._room_to_encode.acquire()
                with suppress(RuntimeError):  # the process ends: what still runs is released
                    self._encoder.submit(self._encode, task_id, params, picture)
        self._on_gpu = None
        return True

    def _encode(self, task_id: str, params: GenerationParams, picture: Image.Image) -> None:
        try:
            started_at = time.monotonic()
            image = encode_image(picture, params.format, params.quality)
            spent_s = time.monotonic() - started_at
            self._insist(lambda: self._source.finish(task_id, image, image_encoding_s=spent_s))
        except Exception as error:
            log.exception("task %s failed while its image was encoded", task_id)
            self._fail(task_id, error)
        finally:
            self._room_to_encode.release()

    def _fail(self, task_id: str, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}"
        self._insist(lambda: self._source.fail(task_id, "task_failed", message))

    def _insist(self, change: Callable[[], object]) -> None:
        """Try until the disk takes the change or the server stops: a full disk loses no work."""
        while True:
            try:
                change()
            except StorageUnavailable:
                if self._stopping.wait(RETRY_S):
                    return
            else:
                return

    def _watch_worker(self) -> None:
        while True:
            worker = Thread(target=self._run, name="worker", daemon=True)
            self._died = True
            worker.start()
            worker.join()
            if not self._died or self._source.stopping:
                return
            self.restarts += 1
            log.critical("the worker thread died: starting another one")
            if task_id := self._on_gpu:
                self._insist(lambda: self._source.release(task_id, count_attempt=True))
                self._on_gpu = None
            self._stopping.wait(RETRY_S)

    def _run(self) -> None:
        if self.load():
            while not self._source.stopping:
                try:
                    if not self.run_once(IDLE_S):
                        self._source.prune()
                except StorageUnavailable:
                    self._stopping.wait(RETRY_S)
        self._died = False
