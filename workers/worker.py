"""The worker loop: claim, load what the task needs, generate, finish.

It depends on two Protocols (protocols.py): a source of tasks, which is scheduler/worker_api.py, and
a generator. MLX ties arrays to the thread that made them, so loading and generating happen on this
one thread; finished images go to the encoder's. A task that preempts another one is claimed and
drawn inside the report of a step of that one, which is mflux's in-loop callback. Both threads are
supervised: if one dies, its task is tried once more; a worker that died loads the model again.
"""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from errors import (
    LoadStopped,
    ModelLoadError,
    ServerError,
    StorageUnavailable,
    StoredOtherwise,
)
from images import on_white, to_png
from models.hub_cache import is_present
from models.model_catalog import LoadSpec
from supervision import SupervisedThread
from task import Drawn, InputImage, Phase, Progress, Stage, Task, Verdict
from timing_model import Measured
from workers.encoder import Encoder, Picture
from workers.endings import Endings
from workers.protocols import Generator, TaskSource
from workers.stopwatch import Stopwatch

log = logging.getLogger(__name__)

IDLE_S = 10.0
"""An idle worker prunes and checks for idle models this often."""


class _StopTask(Exception):
    """Leaves a generation between two steps, or a load between two parts."""


class Worker:
    """Owns the worker thread and the encoder thread.

    Args:
        on_load_failure: called on the worker thread when the server's own model cannot be loaded.
        unload_after_s: seconds without a task after which all weights are freed; 0: never.
        turn_to: called with the id of the task that is drawn next, on the worker thread.
        mark_generated: as for the Encoder.
        before_loading: called on the worker thread before it loads anything.
    """

    def __init__(
        self,
        source: TaskSource,
        generator: Generator,
        on_load_failure: Callable[[ModelLoadError], None],
        *,
        unload_after_s: float = 0.0,
        turn_to: Callable[[str], None] = lambda task_id: None,
        mark_generated: bool = True,
        before_loading: Callable[[], None] = lambda: None,
    ) -> None:
        self._source = source
        self._generator = generator
        self._on_load_failure = on_load_failure
        self._unload_after_s = unload_after_s
        self._turn_to = turn_to
        self._before_loading = before_loading
        self._idle_since = time.monotonic()
        self._tasks: list[Task] = []
        """On the GPU: the task that is drawn, after the one that it preempted."""
        self._progress: Progress | None = None
        """Of the task that is drawn, as it was claimed or reported last."""
        self._thread = SupervisedThread("worker", self._run, self._recover)
        self._endings = Endings(source)
        self._encoder = Encoder(source, self._endings, mark_generated=mark_generated)

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
        self._endings.stop(drain_s)
        if self._thread.is_alive():
            self._thread.join(drain_s + timeout_s)
        if self._thread.is_alive():
            return False
        return self._encoder.stop(max(deadline - time.monotonic(), 0.1))

    def load(self) -> bool:
        """Load what the server starts with; returns whether it is ready."""
        try:
            with suppress(StoredOtherwise):  # its bits are known since it was downloaded
                self._load(self._source.first_spec, fatal=True)
                return True
            self._load(self._source.first_spec, fatal=True)
        except ModelLoadError as error:
            self._on_load_failure(error)
            return False
        except _StopTask:  # the server stops
            return False
        return True

    def run_once(self, timeout_s: float | None = None) -> bool:
        """Claim one task and bring it to its end, or load what the operator ordered; returns
        whether there was one."""
        if spec := self._source.next_load_order():
            with suppress(ModelLoadError, _StopTask):
                self._follow(spec)
        elif task := self._source.claim(timeout_s):
            self._run_task(task)
        else:
            return False
        self._idle_since = time.monotonic()
        return True

    def _follow(self, ordered: LoadSpec) -> None:
        try:
            self._make_ready(ordered)
        except ServerError as error:  # an order of the head that its options do not allow
            log.warning("%s was ordered and is not loaded: %s", ordered.key, error)

    def save_copies(self) -> None:
        """Save copies of quantized weights, until there is something else to do."""
        if self._generator.save_copies(lambda: not self._source.has_work):
            self._source.copies_saved()

    def unload_if_idle(self) -> None:
        """Free the weights when no task has come for unload_after_s."""
        idle_s = time.monotonic() - self._idle_since
        if 0.0 < self._unload_after_s <= idle_s and self._generator.resident:
            log.info("no task for %.0f s: the weights are freed", idle_s)
            self._generator.unload()
            self._source.now_resident(())

    def _run_task(self, task: Task) -> None:
        self._tasks.append(task)
        self._progress = task.progress
        try:
            self._draw(task)
        except _StopTask:
            if self._source.stopping:  # then what is drawn already need not be drawn again
                self._encoder.drain()
            self._endings.release(task)
        except Exception as error:
            if not isinstance(error, ServerError | ModelLoadError):
                log.exception("task %s failed", task.task_id)
            self._endings.fail(task, error)
        self._source.left(task.task_id)
        self._tasks.remove(task)

    def _draw(self, task: Task) -> None:
        """All images of a task that are not stored yet: each stage for all of them, so that
        weights change as seldom as possible."""
        inputs = self._source.inputs_of(task.task_id)
        indices = range(task.images_done, task.params.count)
        drawn: dict[int, tuple[Drawn, tuple[tuple[int, Measured], ...]]] = {}
        stages = list(task.stages)
        helped: tuple[tuple[int, Measured], ...] = ()
        with ExitStack() as until_drawn:
            for number, stage in enumerate(stages):
                self._make_ready(stage.load_spec, task, Progress(Phase.LOADING, stage=number))
                if stage.load_spec.model.makes:
                    folder = Path(until_drawn.enter_context(TemporaryDirectory()))
                    helped = (*helped, *self._help(task, stages, number, inputs, folder))
                    continue
                before, drawn = drawn, {}
                if before:
                    inputs = Path(until_drawn.enter_context(TemporaryDirectory()))
                for index in indices:
                    one = stage.image(index)
                    picture_before, measured_before = before.get(index, (None, helped))
                    helped = ()
                    if picture_before:
                        one = one.starting_from(_keep(picture_before.picture, inputs))
                    picture, measured = self._draw_one(task, one, number, index, inputs)
                    if picture_before:
                        upscaled = {"upscale": stage.params.upscale}
                        metadata = {**(picture_before.metadata or {}), **upscaled}
                        picture = replace(picture, metadata=metadata)
                    drawn[index] = picture, (*measured_before, (number, measured))
                    if number == len(stages) - 1:
                        self._start_encoding(task, index, *drawn.pop(index))

    def _help(
        self, task: Task, stages: list[Stage], number: int, inputs: Path, folder: Path
    ) -> tuple[tuple[int, Measured], ...]:
        """Runs a helper model, once for each prompt that it writes, and gives the results to the
        stage that draws.

        Args:
            folder: where a control image is written.
        """
        stage, results, measured = stages[number], [], []
        for index in range(stage.params.count):
            stopwatch = Stopwatch(time.monotonic)

            def report(
                phase: Phase, steps_done: int, steps_total: int, watch: Stopwatch = stopwatch
            ) -> None:
                watch.reached(phase, steps_done)
                self._report(task, Progress(phase, steps_done, steps_total, number))

            result: object = self._generator.prepare(stage.image(index), inputs, report)
            results.append(_keep(result, folder) if isinstance(result, Image.Image) else result)
            measured.append((number, stopwatch.measured()))
        draws = number + 1
        while stages[draws].load_spec.model.makes:
            draws += 1
        stages[draws] = stages[draws].helped(stage, results)
        return tuple(measured)

    def _draw_one(
        self, task: Task, one: Stage, stage: int, index: int, inputs: Path
    ) -> tuple[Drawn, Measured]:
        stopwatch = Stopwatch(time.monotonic)

        def report(phase: Phase, steps_done: int, steps_total: int) -> None:
            stopwatch.reached(phase, steps_done)
            progress = Progress(phase, steps_done, steps_total, stage, index)
            while self._report(task, progress) is Verdict.PAUSE:
                with stopwatch.stopped():
                    if not self._draw_preempting(task):
                        break

        begins = Progress(Phase.TEXT_ENCODING, 0, one.params.steps_run, stage, index)
        if begins != self._progress:  # a claimed task begins so
            self._report(task, begins)
        self._turn_to(task.task_id)
        drawn = self._generator.generate(one, inputs, report)
        return drawn, stopwatch.measured()

    def _draw_preempting(self, task: Task) -> bool:
        """Between two steps of a task, brings the one that preempts it to its end. Returns whether
        there was one."""
        other: Task | None = None
        with suppress(StorageUnavailable):  # the next step tries again
            other = self._source.claim_preempting(task.task_id, task.attempt)
        if other:
            self._run_task(other)
        return other is not None

    def _report(self, task: Task, progress: Progress) -> Verdict:
        """Raises: _StopTask."""
        self._progress = progress
        verdict = self._source.report(task.task_id, task.attempt, progress)
        if verdict is Verdict.STOP:
            raise _StopTask
        return verdict

    def _start_encoding(
        self, task: Task, index: int, drawn: Drawn, measured: tuple[tuple[int, Measured], ...]
    ) -> None:
        """Raises: _StopTask."""
        if index == task.params.count - 1:
            steps = task.stages[-1].params.steps_run
            stage = len(task.stages) - 1
            progress = Progress(Phase.IMAGE_ENCODING, steps, steps, stage, index)
            verdict = self._source.report(task.task_id, task.attempt, progress)
            if verdict is Verdict.STOP and not self._source.stopping:
                raise _StopTask
        self._encoder.put(Picture(task, index, drawn, measured))

    def _make_ready(
        self, spec: LoadSpec, task: Task | None = None, progress: Progress | None = None
    ) -> None:
        if spec.key not in self._generator.resident:
            if task and progress:
                self._report(task, progress)
            self._load(spec, fatal=False)
        self._generator.apply_adapters(spec)

    def _load(self, spec: LoadSpec, *, fatal: bool) -> None:
        self._source.load_started(spec)
        downloads = not is_present(spec.model)
        try:
            bits = self._generator.load(spec, self._report_load)
        except LoadStopped:
            log.info("%s is not needed any more: loading it is stopped", spec.key)
            self._source.now_resident(self._generator.resident)
            raise _StopTask from None
        except (ServerError, StoredOtherwise):  # only the task's client gets a ServerError
            self._source.now_resident(self._generator.resident)
            raise
        except ModelLoadError as error:
            self._source.load_failed(str(error), self._generator.resident, fatal=fatal)
            raise
        generator = self._generator
        self._source.load_finished(
            spec, bits, generator.resident, learn=not downloads, memory=generator.memory
        )
        self._idle_since = time.monotonic()

    def _report_load(self, share: float) -> None:
        """Raises: LoadStopped."""
        if not self._source.load_reported(share):
            raise LoadStopped

    def _recover(self) -> None:
        for task in reversed(self._tasks):  # only the last one can be the cause
            self._endings.release(task, interrupted=task is self._tasks[-1])
        self._tasks.clear()

    def _run(self) -> None:
        self._generator.unload()
        pause_s = min(IDLE_S, self._unload_after_s or IDLE_S)
        if not self._source.stopping:
            self._before_loading()
        if not self._source.stopping and self.load():
            while not self._source.stopping:
                try:
                    if not self.run_once(pause_s):
                        self._source.prune()
                        self.save_copies()
                        self.unload_if_idle()
                except StorageUnavailable:
                    self._endings.pause()


def _keep(picture: Image.Image, folder: Path) -> InputImage:
    """A picture as the input of the next stage, with the whole path as its file."""
    file = folder / "drawn"
    file.with_suffix(".png").write_bytes(to_png(on_white(picture)))
    return InputImage(str(file), picture.width, picture.height)
