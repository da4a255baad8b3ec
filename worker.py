"""The thread that owns the GPU: load the model once, then claim, generate, finish, for ever.

It asks for two shapes and imports neither: a source of tasks (the QueueManager) and a generator.
MLX ties arrays to the thread that made them, so loading and generating happen on this one thread.
Encoding a finished picture does not need the GPU: a second thread does it, so that the next task
starts at once.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore, Thread
from typing import Protocol

from PIL import Image

from errors import ModelLoadError
from images import encode_image
from task import GenerationParams, Phase, Report, Task

log = logging.getLogger(__name__)

PICTURES_WAITING = 2
"""Decoded pictures that may wait to be encoded; the worker then waits too, which bounds memory."""


class Generator(Protocol):
    def load(self) -> int | None:
        """Load the model; returns the bits its weights are quantized to, or None.

        Raises:
            ModelLoadError: with what the operator can do.
        """

    def generate(self, params: GenerationParams, report: Report) -> Image.Image: ...


class TaskSource(Protocol):
    def load_started(self) -> None: ...
    def load_finished(self, quantize: int | None) -> None: ...
    def load_failed(self) -> None: ...
    def claim(self, timeout_s: float | None = None) -> Task | None: ...
    def report(self, task_id: str, phase: Phase, steps_done: int, steps_total: int) -> bool: ...
    def finish(self, task_id: str, image: bytes) -> bool: ...
    def fail(self, task_id: str, message: str) -> bool: ...
    def release(self, task_id: str) -> bool: ...
    def stop(self) -> None: ...


class _StopTask(Exception):
    """Leaves a generation at a step boundary."""


class Worker:
    """Owns the worker thread and the encoder thread.

    Args:
        on_load_failure: called on the worker thread when the model cannot be loaded.
    """

    def __init__(
        self,
        source: TaskSource,
        generator: Generator,
        on_load_failure: Callable[[ModelLoadError], None],
    ) -> None:
        self._source = source
        self._generator = generator
        self._on_load_failure = on_load_failure
        self._thread = Thread(target=self._run, name="worker", daemon=True)
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._room_to_encode = Semaphore(PICTURES_WAITING)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End after the current step; returns whether the thread has ended in time."""
        self._source.stop()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        ended = not self._thread.is_alive()
        self._encoder.shutdown(wait=ended)
        return ended

    def load(self) -> bool:
        """Load the model; returns whether it is ready."""
        self._source.load_started()
        try:
            quantize = self._generator.load()
        except ModelLoadError as error:
            self._source.load_failed()
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

        def report(phase: Phase, steps_done: int, steps_total: int) -> None:
            nonlocal steps
            steps = steps_total
            if not self._source.report(task_id, phase, steps_done, steps_total):
                raise _StopTask

        try:
            picture = self._generator.generate(params, report)
        except _StopTask:
            self._source.release(task_id)
        except Exception as error:
            log.exception("task %s failed", task_id)
            self._source.fail(task_id, f"{type(error).__name__}: {error}")
        else:
            self._source.report(task_id, Phase.IMAGE_ENCODING, steps, steps)
            self._room_to_encode.acquire()
            self._encoder.submit(self._encode, task_id, params, picture)
        return True

    def _encode(self, task_id: str, params: GenerationParams, picture: Image.Image) -> None:
        try:
            self._source.finish(task_id, encode_image(picture, params.format, params.quality))
        except Exception as error:
            log.exception("task %s failed while its image was encoded", task_id)
            self._source.fail(task_id, f"{type(error).__name__}: {error}")
        finally:
            self._room_to_encode.release()

    def _run(self) -> None:
        if not self.load():
            return
        while self.run_once():
            pass
