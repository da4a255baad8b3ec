"""The thread that owns the GPU: claim, load what the task needs, generate, finish, for ever.

It asks for two shapes and imports neither: a source of tasks (the QueueManager) and a generator.
MLX ties arrays to the thread that made them, so loading and generating happen on this one thread.
Encoding a finished picture does not need the GPU: a second thread does it, so that the next task
starts at once. Both are supervised: if one dies, its task is tried once more; a worker that died
loads the model again.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Protocol

from PIL import Image

from errors import (
    ModelLoadError,
    ServerError,
    StorageUnavailable,
    UnusableAdapter,
    without_folders,
)
from images import encode_image, to_png
from models.hub_cache import is_present
from models.model_catalog import Weights
from supervision import SupervisedQueue, SupervisedThread
from task import Drawn, GenerationParams, InputImage, Memory, Phase, Report, Stage, Task

log = logging.getLogger(__name__)

PICTURES_WAITING = 1
"""Decoded pictures that wait for the encoder; the worker then waits too, which bounds memory."""
IDLE_S = 10.0
"""An idle worker looks up this often, to let the source tidy up."""
RETRY_S = 1.0
"""Pause before the disk is tried again."""
STORE_FOR_S = 600.0
"""A finished picture that the disk has refused for so long is given up, and its task fails."""


class Generator(Protocol):
    def load(self, weights: Weights) -> int | None:
        """Load weights, making room first; returns the bits they are quantized to, or None.

        Raises:
            ModelLoadError: with what the operator can do.
            UnusableAdapter: one of the adapters is broken, or does not fit the model.
        """

    def unload(self) -> None:
        """Free all weights."""

    def generate(self, stage: Stage, inputs: Path, report: Report) -> Drawn:
        """Make one picture, with weights that are loaded.

        Args:
            inputs: folder of the pictures that the stage's params name.
        """

    @property
    def resident(self) -> tuple[str, ...]:
        """Keys of the weights in memory, the latest used first; any thread may ask."""

    @property
    def memory(self) -> Memory:
        """After the latest step; any thread may ask."""

    def refusal(self, params: GenerationParams) -> str | None:
        """Why this picture cannot be made on this machine, or None; any thread may ask."""

    def check_adapters(self, weights: Weights) -> tuple[str, ...]:
        """Answer a warning for each adapter that fits the model in part; any thread may ask.

        Raises:
            UnusableAdapter, NotSupported: an adapter is broken, missing, or of another model.
        """


class TaskSource(Protocol):
    @property
    def stopping(self) -> bool: ...
    @property
    def first_weights(self) -> Weights: ...
    def load_started(self, weights: Weights) -> None: ...
    def load_finished(
        self,
        weights: Weights,
        bits: int | None,
        resident: Sequence[str] | None = None,
        *,
        downloaded: bool = False,
    ) -> None: ...
    def left(self, task_id: str) -> None: ...
    def load_failed(self, message: str, *, fatal: bool) -> None: ...
    def now_resident(self, resident: Sequence[str]) -> None: ...
    def next_load_order(self) -> Weights | None: ...
    def claim(self, timeout_s: float | None = None) -> Task | None: ...
    def inputs_of(self, task_id: str) -> Path: ...
    def report(self, task_id: str, phase: Phase, steps_done: int, steps_total: int) -> bool: ...
    def next_image(self, task_id: str, stage: int, index: int) -> bool: ...
    def finish(
        self,
        task_id: str,
        images: Sequence[bytes],
        *,
        image_encoding_s: Sequence[float] | None = None,
    ) -> bool: ...
    def fail(self, task_id: str, code: str, message: str) -> bool: ...
    def release(self, task_id: str, *, count_attempt: bool = False) -> bool: ...
    def prune(self) -> None: ...
    def stop(self, drain_s: float = 0.0) -> None: ...


class _StopTask(Exception):
    """Leaves a generation at a step boundary."""


@dataclass
class _Encoded:
    """The images of one task, as they are encoded."""

    task_id: str
    params: GenerationParams
    images: list[bytes] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Worker:
    """Owns the worker thread and the encoder thread.

    Args:
        on_load_failure: called on the worker thread when the server's own model cannot be loaded.
        unload_after_s: seconds without a task after which all weights are freed; 0: never.
        turn_to: told whose picture is drawn next, on the worker thread.
    """

    def __init__(
        self,
        source: TaskSource,
        generator: Generator,
        on_load_failure: Callable[[ModelLoadError], None],
        *,
        unload_after_s: float = 0.0,
        turn_to: Callable[[str], None] = lambda task_id: None,
    ) -> None:
        self._source = source
        self._generator = generator
        self._on_load_failure = on_load_failure
        self._unload_after_s = unload_after_s
        self._turn_to = turn_to
        self._idle_since = time.monotonic()
        self._on_gpu: str | None = None
        self._stopping = Event()
        self._thread = SupervisedThread("worker", self._run, self._recover)
        self._encoder = SupervisedQueue(
            "encoder", self._encode, self._encoding_died, size=PICTURES_WAITING
        )

    @property
    def restarts(self) -> int:
        """How often the worker thread died and was started again."""
        return self._thread.restarts

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float, drain_s: float = 0.0) -> bool:
        """End after the current step, or after the current task if that takes no longer than
        drain_s; returns whether the threads have ended drain_s + timeout_s from now."""
        deadline = time.monotonic() + drain_s + timeout_s
        self._source.stop(drain_s)
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(drain_s + timeout_s)
        if self._thread.is_alive():
            return False
        return self._encoder.stop(max(deadline - time.monotonic(), 0.1))

    def load(self) -> bool:
        """Load what the server starts with; returns whether it is ready."""
        try:
            self._load(self._source.first_weights, fatal=True)
        except ModelLoadError as error:
            self._on_load_failure(error)
            return False
        return True

    def run_once(self, timeout_s: float | None = None) -> bool:
        """Claim one task and bring it to its end, or load what the operator ordered; returns
        whether there was one."""
        if weights := self._source.next_load_order():
            with suppress(ModelLoadError):
                self._make_ready(weights)
        elif task := self._source.claim(timeout_s):
            self._run_task(task)
        else:
            return False
        self._idle_since = time.monotonic()
        return True

    def unload_if_idle(self) -> None:
        """Free the weights when no task has come for unload_after_s."""
        idle_s = time.monotonic() - self._idle_since
        if 0.0 < self._unload_after_s <= idle_s and self._generator.resident:
            log.info("no task for %.0f s: the weights are freed", idle_s)
            self._generator.unload()
            self._source.now_resident(())

    def _run_task(self, task: Task) -> None:
        task_id = self._on_gpu = task.task_id
        try:
            self._draw(task)
        except _StopTask:
            self._insist(lambda: self._source.release(task_id))
        except ServerError as error:
            code, message = error.code, error.message
            self._insist(lambda: self._source.fail(task_id, code, message))
        except ModelLoadError as error:
            reason = without_folders(str(error))
            self._insist(lambda: self._source.fail(task_id, ModelLoadError.code, reason))
        except Exception as error:
            log.exception("task %s failed", task_id)
            self._fail(task_id, error)
        self._source.left(task_id)
        self._on_gpu = None

    def _draw(self, task: Task) -> None:
        """All pictures of a task: its stages one after the other, each of them for all pictures, so
        that weights change as seldom as possible."""
        inputs = self._source.inputs_of(task.task_id)
        encoded = _Encoded(task.task_id, task.params)
        pictures: list[Drawn] = []
        with ExitStack() as until_drawn:
            for number, stage in enumerate(task.stages):
                if number > 0:
                    self._next_image(task.task_id, number, 0)
                self._make_ready(stage.weights)
                drawn_before, pictures = pictures, []
                if drawn_before:
                    inputs = Path(until_drawn.enter_context(TemporaryDirectory()))
                last_stage = number == len(task.stages) - 1
                for index in range(stage.params.count):
                    if index > 0:
                        self._next_image(task.task_id, number, index)
                    one = stage.image(index)
                    if drawn_before:
                        one = one.starting_from(_keep(drawn_before[index].picture, inputs))
                    drawn = self._draw_one(task.task_id, one, inputs)
                    if drawn_before:
                        enlarged = {"upscale": stage.params.upscale}
                        drawn = replace(
                            drawn, metadata={**(drawn_before[index].metadata or {}), **enlarged}
                        )
                    if not last_stage:
                        pictures.append(drawn)
                    elif self._shall_encode(task, index):
                        self._encoder.put((encoded, drawn))

    def _draw_one(self, task_id: str, stage: Stage, inputs: Path) -> Drawn:
        def report(phase: Phase, steps_done: int, steps_total: int) -> None:
            if not self._source.report(task_id, phase, steps_done, steps_total):
                raise _StopTask

        self._turn_to(task_id)
        return self._generator.generate(stage, inputs, report)

    def _next_image(self, task_id: str, stage: int, index: int) -> None:
        if not self._source.next_image(task_id, stage, index):
            raise _StopTask

    def _shall_encode(self, task: Task, index: int) -> bool:
        if index < task.params.count - 1:
            return True
        steps = task.stages[-1].params.steps_run
        goes_on = self._source.report(task.task_id, Phase.IMAGE_ENCODING, steps, steps)
        return goes_on or self._source.stopping

    def _make_ready(self, weights: Weights) -> None:
        if weights.key not in self._generator.resident:
            self._load(weights, fatal=False)

    def _load(self, weights: Weights, *, fatal: bool) -> None:
        self._source.load_started(weights)
        downloads = not is_present(weights.model)
        try:
            bits = self._generator.load(weights)
        except UnusableAdapter:  # told to the client of the task alone
            self._source.now_resident(self._generator.resident)
            raise
        except ModelLoadError as error:
            self._source.now_resident(self._generator.resident)
            self._source.load_failed(str(error), fatal=fatal)
            raise
        self._source.load_finished(weights, bits, self._generator.resident, downloaded=downloads)

    def _encode(self, picture: tuple[_Encoded, Drawn]) -> None:
        encoded, drawn = picture
        task_id, params = encoded.task_id, encoded.params
        try:
            started_at = time.monotonic()
            image = _encoded(drawn, params)
            encoded.images.append(image)
            encoded.seconds.append(time.monotonic() - started_at)
            if len(encoded.images) == params.count:
                self._insist(self._storing(encoded))
        except Exception as error:
            log.exception("task %s failed while its image was encoded", task_id)
            self._fail(task_id, error)

    def _encoding_died(self, picture: tuple[_Encoded, Drawn]) -> None:
        self._release_at_fault(picture[0].task_id)

    def _storing(self, encoded: _Encoded) -> Callable[[], object]:
        """A try to store the images; after STORE_FOR_S it fails the task where storing fails."""
        until = time.monotonic() + STORE_FOR_S

        def store() -> None:
            try:
                self._source.finish(
                    encoded.task_id, encoded.images, image_encoding_s=encoded.seconds
                )
            except StorageUnavailable as error:
                if time.monotonic() < until:
                    raise
                self._source.fail(
                    encoded.task_id,
                    StorageUnavailable.code,
                    f"The finished picture could not be stored for {STORE_FOR_S:.0f} s: {error} "
                    "Submit the task again when there is room.",
                )

        return store

    def _fail(self, task_id: str, error: Exception) -> None:
        message = without_folders(f"{type(error).__name__}: {error}")
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

    def _release_at_fault(self, task_id: str) -> None:
        """A thread died with this task."""
        self._insist(lambda: self._source.release(task_id, count_attempt=True))

    def _recover(self) -> None:
        if task_id := self._on_gpu:
            self._release_at_fault(task_id)
            self._on_gpu = None

    def _run(self) -> None:
        self._generator.unload()
        pause_s = min(IDLE_S, self._unload_after_s or IDLE_S)
        if not self._source.stopping and self.load():
            while not self._source.stopping:
                try:
                    if not self.run_once(pause_s):
                        self._source.prune()
                        self.unload_if_idle()
                except StorageUnavailable:
                    self._stopping.wait(RETRY_S)


def _encoded(drawn: Drawn, params: GenerationParams) -> bytes:
    """The bytes of an image file; without metadata if these cannot be written."""
    metadata = drawn.metadata if params.metadata else None
    try:
        return encode_image(drawn.picture, params.format, params.quality, metadata)
    except Exception:
        if metadata is None:
            raise
        log.exception("the metadata of a picture cannot be written: it goes without")
        return encode_image(drawn.picture, params.format, params.quality, None)


def _keep(picture: Image.Image, folder: Path) -> InputImage:
    """A picture as the input of the next stage."""
    (folder / "drawn.png").write_bytes(to_png(picture))
    return InputImage("drawn", picture.width, picture.height)
