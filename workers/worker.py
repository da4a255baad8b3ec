"""The worker loop: claim, load what the task needs, generate, finish.

It depends on two Protocols: a source of tasks (scheduler/worker_api.py) and a generator. MLX ties
arrays to the thread that made them, so loading and generating happen on this one thread. A second
thread encodes and stores finished images, so that the next image starts at once. Both are
supervised: if one dies, its task is tried once more; a worker that died loads the model again.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
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
from models.model_catalog import LoadSpec
from supervision import SupervisedQueue, SupervisedThread
from task import (
    Drawn,
    Encoded,
    GenerationParams,
    InputImage,
    Memory,
    Phase,
    Progress,
    Report,
    Stage,
    Task,
    Verdict,
)
from timing_model import Measured

log = logging.getLogger(__name__)

PICTURES_WAITING = 1
"""Decoded pictures that wait for the encoder; the worker then waits too, which bounds memory."""
IDLE_S = 10.0
"""An idle worker prunes and checks for idle models this often."""
RETRY_S = 1.0
"""Pause before the disk is tried again."""
STORE_FOR_S = 600.0
"""A finished picture that the disk has refused for this long is given up, and its task fails."""


class Generator(Protocol):
    def load(self, spec: LoadSpec) -> int | None:
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

    def check_adapters(self, weights: LoadSpec) -> tuple[str, ...]:
        """Answer a warning for each adapter that fits the model in part; any thread may ask.

        Raises:
            UnusableAdapter, NotSupported: an adapter is broken, missing, or of another model.
        """


class TaskSource(Protocol):
    """scheduler/worker_api.py says what each does."""

    @property
    def stopping(self) -> bool: ...
    @property
    def first_spec(self) -> LoadSpec: ...
    def load_started(self, spec: LoadSpec) -> None: ...
    def load_finished(
        self, spec: LoadSpec, bits: int | None, resident: Sequence[str], *, learn: bool = True
    ) -> None: ...
    def load_failed(self, message: str, resident: Sequence[str], *, fatal: bool) -> None: ...
    def now_resident(self, resident: Sequence[str]) -> None: ...
    def next_load_order(self) -> LoadSpec | None: ...
    def claim(self, timeout_s: float | None = None) -> Task | None: ...
    def inputs_of(self, task_id: str) -> Path: ...
    def report(self, task_id: str, attempt: int, progress: Progress) -> Verdict: ...
    def store_image(self, task_id: str, attempt: int, encoded: Encoded) -> bool: ...
    def finish(self, task_id: str, attempt: int, encoded: Encoded) -> bool: ...
    def fail(self, task_id: str, attempt: int, code: str, message: str) -> bool: ...
    def release(self, task_id: str, attempt: int, *, interrupted: bool = False) -> bool: ...
    def left(self, task_id: str) -> None: ...
    def prune(self) -> None: ...
    def stop(self, drain_s: float = 0.0) -> None: ...


class _StopTask(Exception):
    """Leaves a generation at a step boundary."""


class Stopwatch:
    """Seconds of the phases and steps of one picture, from now on."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._phase = Phase.TEXT_ENCODING
        self._steps_done = 0
        self._phase_at = self._step_at = clock()
        self._phase_s: dict[Phase, float] = {}
        self._step_s: list[float] = []

    def reached(self, phase: Phase, steps_done: int) -> None:
        """A phase began or a step ended, at this moment."""
        at = self._clock()
        if phase is not self._phase:
            self._phase_s[self._phase] = at - self._phase_at
            self._phase, self._phase_at, self._step_at = phase, at, at
        elif steps_done > self._steps_done:
            self._step_s.append(at - self._step_at)
            self._step_at = at
        self._steps_done = steps_done

    def seconds_in_phase(self) -> float:
        return self._clock() - self._phase_at

    def measured(self) -> Measured:
        """The picture is drawn."""
        self.reached(Phase.IMAGE_ENCODING, self._steps_done)
        return Measured(
            text_encoding_s=self._phase_s.get(Phase.TEXT_ENCODING, 0.0),
            step_s=tuple(self._step_s),
            decoding_s=self._phase_s.get(Phase.DECODING, 0.0),
            image_encoding_s=0.0,
        )


@dataclass(frozen=True)
class _Picture:
    """A picture that is drawn, for the encoder."""

    task: Task
    index: int
    drawn: Drawn
    measured: tuple[tuple[int, Measured], ...]
    """Stage, and the seconds that it took."""


class Worker:
    """Owns the worker thread and the encoder thread.

    Args:
        on_load_failure: called on the worker thread when the server's own model cannot be loaded.
        unload_after_s: seconds without a task after which all weights are freed; 0: never.
        turn_to: called with the id of the task that is drawn next, on the worker thread.
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
        self._on_gpu: Task | None = None
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
            self._load(self._source.first_spec, fatal=True)
        except ModelLoadError as error:
            self._on_load_failure(error)
            return False
        return True

    def run_once(self, timeout_s: float | None = None) -> bool:
        """Claim one task and bring it to its end, or load what the operator ordered; returns
        whether there was one."""
        if spec := self._source.next_load_order():
            with suppress(ModelLoadError):
                self._make_ready(spec)
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
        task_id, attempt = task.task_id, task.attempt
        self._on_gpu = task
        try:
            self._draw(task)
        except _StopTask:
            self._insist(lambda: self._source.release(task_id, attempt))
        except ServerError as error:
            code, message = error.code, error.message
            self._insist(lambda: self._source.fail(task_id, attempt, code, message))
        except ModelLoadError as error:
            reason = without_folders(str(error))
            self._insist(lambda: self._source.fail(task_id, attempt, ModelLoadError.code, reason))
        except Exception as error:
            log.exception("task %s failed", task_id)
            self._fail(task, error)
        self._source.left(task_id)
        self._on_gpu = None

    def _draw(self, task: Task) -> None:
        """All images of a task that are not stored yet: each stage for all of them, so that
        weights change as seldom as possible."""
        inputs = self._source.inputs_of(task.task_id)
        indices = range(task.images_done, task.params.count)
        drawn: dict[int, tuple[Drawn, tuple[tuple[int, Measured], ...]]] = {}
        with ExitStack() as until_drawn:
            for number, stage in enumerate(task.stages):
                self._make_ready(stage.load_spec, task, Progress(Phase.LOADING, stage=number))
                before, drawn = drawn, {}
                if before:
                    inputs = Path(until_drawn.enter_context(TemporaryDirectory()))
                for index in indices:
                    one = stage.image(index)
                    picture_before, measured_before = before.get(index, (None, ()))
                    if picture_before:
                        one = one.starting_from(_keep(picture_before.picture, inputs))
                    picture, measured = self._draw_one(task, one, number, index, inputs)
                    if picture_before:
                        upscaled = {"upscale": stage.params.upscale}
                        metadata = {**(picture_before.metadata or {}), **upscaled}
                        picture = replace(picture, metadata=metadata)
                    drawn[index] = picture, (*measured_before, (number, measured))
                    if stage is task.stages[-1]:
                        self._start_encoding(task, index, *drawn.pop(index))

    def _draw_one(
        self, task: Task, one: Stage, stage: int, index: int, inputs: Path
    ) -> tuple[Drawn, Measured]:
        stopwatch = Stopwatch(time.monotonic)

        def report(phase: Phase, steps_done: int, steps_total: int) -> None:
            stopwatch.reached(phase, steps_done)
            self._report(task, Progress(phase, steps_done, steps_total, stage, index))

        self._report(task, Progress(Phase.TEXT_ENCODING, 0, one.params.steps_run, stage, index))
        self._turn_to(task.task_id)
        drawn = self._generator.generate(one, inputs, report)
        return drawn, stopwatch.measured()

    def _report(self, task: Task, progress: Progress) -> None:
        if self._source.report(task.task_id, task.attempt, progress) is Verdict.STOP:
            raise _StopTask

    def _start_encoding(
        self, task: Task, index: int, drawn: Drawn, measured: tuple[tuple[int, Measured], ...]
    ) -> None:
        if index == task.params.count - 1:
            steps = task.stages[-1].params.steps_run
            stage = len(task.stages) - 1
            progress = Progress(Phase.IMAGE_ENCODING, steps, steps, stage, index)
            verdict = self._source.report(task.task_id, task.attempt, progress)
            if verdict is Verdict.STOP and not self._source.stopping:
                return
        self._encoder.put(_Picture(task, index, drawn, measured))

    def _make_ready(
        self, spec: LoadSpec, task: Task | None = None, progress: Progress | None = None
    ) -> None:
        if spec.key in self._generator.resident:
            return
        if task and progress:
            self._report(task, progress)
        self._load(spec, fatal=False)

    def _load(self, spec: LoadSpec, *, fatal: bool) -> None:
        self._source.load_started(spec)
        downloads = not is_present(spec.model)
        try:
            bits = self._generator.load(spec)
        except UnusableAdapter:  # only the task's client gets it
            self._source.now_resident(self._generator.resident)
            raise
        except ModelLoadError as error:
            self._source.load_failed(str(error), self._generator.resident, fatal=fatal)
            raise
        self._source.load_finished(spec, bits, self._generator.resident, learn=not downloads)

    def _encode(self, picture: _Picture) -> None:
        task, params = picture.task, picture.task.params
        try:
            started_at = time.monotonic()
            image = _encoded(picture.drawn, params)
            *before, (stage, own) = picture.measured
            own = replace(own, image_encoding_s=time.monotonic() - started_at)
            encoded = Encoded(image, picture.index, (*before, (stage, own)))
            self._insist(self._storing(picture, encoded))
        except Exception as error:
            log.exception("task %s failed while an image was encoded", task.task_id)
            self._fail(task, error)

    def _encoding_died(self, picture: _Picture) -> None:
        self._release_interrupted(picture.task)

    def _storing(self, picture: _Picture, encoded: Encoded) -> Callable[[], object]:
        """A try to store an image; after STORE_FOR_S it fails the task where storing fails."""
        task, until = picture.task, time.monotonic() + STORE_FOR_S
        is_last = picture.index == task.params.count - 1
        store = self._source.finish if is_last else self._source.store_image

        def try_once() -> None:
            try:
                store(task.task_id, task.attempt, encoded)
            except StorageUnavailable as error:
                if time.monotonic() < until:
                    raise
                self._source.fail(
                    task.task_id,
                    task.attempt,
                    StorageUnavailable.code,
                    f"The finished picture could not be stored for {STORE_FOR_S:.0f} s: {error} "
                    "Submit the task again when there is room.",
                )

        return try_once

    def _fail(self, task: Task, error: Exception) -> None:
        message = without_folders(f"{type(error).__name__}: {error}")
        self._insist(lambda: self._source.fail(task.task_id, task.attempt, "task_failed", message))

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

    def _release_interrupted(self, task: Task) -> None:
        """A thread died with this task."""
        self._insist(lambda: self._source.release(task.task_id, task.attempt, interrupted=True))

    def _recover(self) -> None:
        if task := self._on_gpu:
            self._release_interrupted(task)
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
        log.exception("the metadata of a picture cannot be written: it is stored without")
        return encode_image(drawn.picture, params.format, params.quality, None)


def _keep(picture: Image.Image, folder: Path) -> InputImage:
    """A picture as the input of the next stage."""
    (folder / "drawn.png").write_bytes(to_png(picture))
    return InputImage("drawn", picture.width, picture.height)
