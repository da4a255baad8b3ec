"""What a worker does in random histories of the queue."""

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from queue_model import DONE, RUNNING, TINY, ModelTask, QueueModel

from scheduler.limits import ENDED_TOO_OFTEN, MAX_INTERRUPTIONS
from task import Encoded, Phase
from timing_model import Measured


class WorkerRules(QueueModel):
    @precondition(lambda self: not self.loaded)
    @rule()
    def the_model_is_loaded(self) -> None:
        self.queue.loaded(self.queue.scheduler.allowed.first_spec, None)
        self.loaded = True
        self.timing.learn_load(TINY.name, self.clock() - self.load_started_at)
        self.improve_baselines()

    @precondition(lambda self: self.may_claim and len(self.running) < 3)
    @rule()
    def claim(self) -> None:
        claimed = self.queue.claim(0)
        if not self.waiting:
            assert claimed is None
            return
        task = self.waiting[0]
        assert claimed is not None
        assert (claimed.task_id, claimed.params) == (task.task_id, task.params)
        assert claimed.images_done == len(task.images)
        if self.newest_claimed > self.baselines[task.task_id].newest:
            self.overtaken.add(task.task_id)
        task.status, self.newest_claimed = RUNNING, max(self.newest_claimed, task.number)
        task.started_at, task.marks = self.clock(), [(Phase.TEXT_ENCODING, self.clock())]
        self.running.append(task)
        self.reported(task)

    @precondition(lambda self: self.on_gpu)
    @rule(reports=st.integers(1, 8), each_s=st.sampled_from([0.0, 0.25, 1.0, 3.0]))
    def report(self, reports: int, each_s: float) -> None:
        """The task on the GPU goes on by so many reports, or until its last image is decoded."""
        for _ in range(reports):
            if task := self.on_gpu:
                self.clock.at += each_s
                steps = task.params.steps
                if task.phase is Phase.TEXT_ENCODING or (
                    task.phase is Phase.DENOISING and task.steps_done < steps
                ):
                    phase = Phase.DENOISING
                elif task.phase is Phase.DENOISING:
                    phase = Phase.DECODING
                elif len(task.images) < task.params.count - 1:
                    self.next_image(task)
                    continue
                else:
                    phase = Phase.IMAGE_ENCODING
                task.marks.append((phase, self.clock()))
                assert self.queue.report(task.task_id, phase, task.steps_done, steps)
                self.reported(task)
                if phase is not Phase.IMAGE_ENCODING:
                    self.improve_baselines()

    def next_image(self, task: ModelTask) -> None:
        """One of several images is decoded: it is encoded at once, and the next one begins."""
        now, index = self.clock(), len(task.images)
        measured = self.measured(task, decoded_at=now, image_encoding_s=0.0)
        image = f"{task.task_id} {index}".encode()
        encoded = Encoded(image, index, ((0, measured),))
        attempt = self.queue.attempt(task.task_id)
        assert self.queue.worker.store_image(task.task_id, attempt, encoded)
        assert not self.queue.worker.store_image(task.task_id, attempt, encoded), "only once"
        self.stored(task, image, measured)
        self.improve_baselines()
        assert self.queue.next_image(task.task_id, 0, index + 1)
        task.marks = [(Phase.TEXT_ENCODING, now)]
        self.reported(task)
        self.improve_baselines()

    def measured(self, task: ModelTask, *, decoded_at: float, image_encoding_s: float) -> Measured:
        return Measured(
            text_encoding_s=task.began(Phase.DENOISING) - task.began(Phase.TEXT_ENCODING),
            step_s=task.step_s,
            decoding_s=decoded_at - task.began(Phase.DECODING),
            image_encoding_s=image_encoding_s,
        )

    def stored(self, task: ModelTask, image: bytes, measured: Measured) -> None:
        task.images.append(image)
        task.measured.append(measured)
        self.samples += measured.gpu_s > 0
        self.timing.learn(replace(task.work, images=1), measured)

    @precondition(lambda self: self.encoding)
    @rule(
        choice=st.integers(0, 99),
        size=st.integers(1, 60),
        spent_s=st.sampled_from([None, 0.0, 0.5]),
    )
    def finish(self, choice: int, size: int, spent_s: float | None) -> None:
        task = self.encoding[choice % len(self.encoding)]
        image = (task.task_id.encode() * 4)[:size]
        assert self.finish_last(task, image, spent_s)
        now = self.clock()
        if spent_s is None:
            spent_s = now - task.began(Phase.IMAGE_ENCODING)
        decoded_at = task.began(Phase.IMAGE_ENCODING)
        measured = self.measured(task, decoded_at=decoded_at, image_encoding_s=spent_s)
        self.stored(task, image, measured)
        outcomes = self.queue.stats().outcomes  # those that can be compared at all
        assert self.outcomes <= outcomes <= self.outcomes + task.promised
        self.outcomes = outcomes
        task.end(DONE, now)
        self.running.remove(task)
        self.improve_baselines()
        self.prune()

    def finish_last(self, task: ModelTask, image: bytes, spent_s: float | None) -> bool:
        self.queue._drawn[task.task_id] = []  # those before are stored
        return self.queue.finish(
            task.task_id, [image], image_encoding_s=spent_s, first=len(task.images)
        )

    @precondition(lambda self: self.running)
    @rule(choice=st.integers(0, 99))
    def fail(self, choice: int) -> None:
        task = self.running[choice % len(self.running)]
        message = f"ValueError: number {choice}"
        assert self.queue.fail(task.task_id, "task_failed", message)
        task.fail("task_failed", message, self.clock())
        self.running.remove(task)
        self.improve_baselines()

    @precondition(lambda self: self.on_gpu)
    @rule(interrupted=st.booleans())
    def release(self, interrupted: bool) -> None:
        task = self.running.pop()  # a worker releases the one on the GPU
        assert self.queue.release(task.task_id, interrupted=interrupted)
        if interrupted and task.interruptions + 1 >= MAX_INTERRUPTIONS:
            task.fail(*ENDED_TOO_OFTEN, at=self.clock())
        else:
            task.wait(interrupted=interrupted)
            self.reported(task)
        self.improve_baselines()
        if interrupted:  # the worker died, and the one that replaces it loads again
            self.begin_to_load()

    @precondition(lambda self: self.leaving)
    @rule()
    def the_worker_leaves_the_cancelled_task(self) -> None:
        assert self.leaving
        assert not self.queue.report(self.leaving.task_id, Phase.DENOISING, 1, 2)
        assert not self.queue.release(self.leaving.task_id)
        self.leaving = None
        self.improve_baselines()

    @precondition(lambda self: self.leaving)
    @rule()
    def the_worker_dies_of_the_cancelled_task(self) -> None:
        assert self.leaving
        assert not self.queue.release(self.leaving.task_id, interrupted=True)
        self.leaving = None
        self.improve_baselines()
        self.begin_to_load()
        self.the_model_is_loaded()

    @precondition(lambda self: self.may_claim and not self.running and self.waiting)
    @rule(each_s=st.sampled_from([0.0, 0.25, 1.0]), size=st.integers(20, 60))
    def a_task_runs_to_its_end(self, each_s: float, size: int) -> None:
        self.claim()
        self.report(99, each_s)
        self.finish(0, size, None)

    def tidy_up(self) -> None:
        """As an idle worker does."""
        self.queue.worker.prune()
        self.prune()
