"""What holds of the queue at any moment of a random history."""

import math

import pytest
from conftest import forecast_of
from hypothesis.stateful import invariant
from queue_model import ENDED, RUNNING, QueueModel, near, size_of

from errors import Gone, NotReady, ServerError, UnknownTask
from scheduler.baselines import STEADY_S, STEADY_SHARE
from scheduler.health import ServerState
from storage.file_store import image_name
from task import Phase, Reason


class QueueInvariants(QueueModel):
    @invariant()
    def the_order_is_urgent_first_then_first_come_first_served(self) -> None:
        views = self.listing()
        order = [task.task_id for task in self.running + self.waiting]
        assert [view.task_id for view in views] == order
        pos = [0] * len(self.running) + list(range(len(self.waiting)))
        assert [view.pos for view in views] == pos
        page, total = self.queue.unfinished(2, 1)
        assert (total, [view.task_id for view in page]) == (
            len(views),
            [view.task_id for view in views[1:3]],
        )
        ends = [forecast_of(view).end_s for view in views[1:3]]
        assert [forecast_of(view).end_s for view in page] == pytest.approx(ends)
        assert [self.ask(view.task_id).pos for view in views] == pos

    @invariant()
    def every_forecast_is_that_of_a_plain_simulation(self) -> None:
        """From the start of the first waiting task on: one GPU, task after task. Those that wait
        count the encoding of those that run, and not of one another."""
        forecasts = list(self.forecasts().values())
        running, waiting = forecasts[: len(self.running)], forecasts[len(self.running) :]
        encoder_free_s = 0.0
        for forecast in running:
            assert forecast.start_s == 0
            assert forecast.end_s >= encoder_free_s
            encoder_free_s = forecast.end_s
        gpu_free_s = waiting[0].start_s if waiting else 0.0
        if waiting and not running and not self.leaving:
            # of a load that is late, what is left depends on the last digits of its forecast
            assert gpu_free_s == pytest.approx(self.load_remaining_s(), rel=1e-4)
        for task, forecast in zip(self.waiting, waiting, strict=True):
            assert forecast.start_s == near(gpu_free_s)
            durations = self.timing.durations(task.work)
            gpu_free_s += durations.gpu_s
            end_s = max(gpu_free_s, encoder_free_s) + durations.image_encoding_s
            assert forecast.end_s == near(end_s)
            assert forecast.confidence is durations.confidence

    @invariant()
    def every_reader_gets_the_same_and_a_forecast_that_is_later_has_a_reason(self) -> None:
        """Later than when the task was submitted: a little is not reported, so that the
        countdown goes on; more comes with its reason."""
        forecasts, now = self.forecasts(), self.clock()
        for view in self.listing():
            shown, forecast = forecast_of(view), forecasts[view.task_id]
            assert forecast_of(self.ask(view.task_id)) == shown, "asking changes nothing"
            assert 0 <= shown.start_s <= shown.end_s + 1e-6
            assert shown.end_s <= shown.p90_s + 1e-6
            assert math.isfinite(shown.p90_s)
            assert (shown.pos, shown.p90_s) == (forecast.pos, forecast.p90_s)
            baseline = self.baselines[view.task_id]
            end_at = baseline.at + baseline.forecast.end_s
            late_s = now + forecast.end_s - end_at
            little_s = max(STEADY_S, STEADY_SHARE * forecast.end_s)
            if late_s < little_s - 1e-6:
                assert shown.reason is None
                assert shown.end_s == near(max(min(forecast.end_s, end_at - now), 0.0))
            elif late_s > little_s + 1e-6:
                assert shown.end_s == forecast.end_s
                overtaken = self.newest_before(view.task_id) > baseline.newest
                if view.status is RUNNING:
                    overtaken = view.task_id in self.overtaken
                assert shown.reason is (Reason.OVERTAKEN if overtaken else Reason.SLOWER)

    def newest_before(self, task_id: str) -> int:
        """The newest task that runs, or has run, before this one, if this one waits."""
        numbers = [0]
        for task in self.waiting:
            if task.task_id == task_id:
                return max(self.newest_claimed, *numbers)
            numbers.append(task.number)
        return 0

    @invariant()
    def every_task_has_the_status_that_it_should_have(self) -> None:
        for task in self.tasks:
            if reason := self.reason(task):
                with pytest.raises(Gone) as caught:
                    self.queue.status(task.task_id)
                assert caught.value.message == reason
                continue
            view = self.ask(task.task_id)
            assert (view.status, view.params) == (task.status, task.params)
            assert (view.priority, view.created_at) == (task.priority, task.created_at)
            assert view.image_sizes == tuple(map(len, task.images))
            assert view.started_at == task.started_at
            assert (view.error_code, view.error) == (task.error_code, task.error)
            if task.status in ENDED:
                assert view.ended_at == task.ended_at
                assert (view.pos, view.forecast, view.phase) == (None, None, None)
                assert view.measured == tuple(task.measured)
            if task.status is RUNNING:
                assert (view.phase, view.steps_done) == (task.phase, task.steps_done)

    @invariant()
    def every_image_is_there_exactly_as_long_as_it_should_be(self) -> None:
        for task in self.tasks:
            for index in range(task.params.count):
                if index < len(task.images) and not self.reason(task):
                    found = self.queue.image(task.task_id, index)
                    assert found == (task.images[index], task.params)
                    continue
                expected: type[ServerError] = Gone if task.status in ENDED else NotReady
                with pytest.raises(expected) as caught:
                    self.queue.image(task.task_id, index)
                assert (self.reason(task) or task.error or "") in str(caught.value)
        files = {path.name: path.read_bytes() for path in (self.folder / "images").iterdir()}
        assert files == {
            image_name(task.task_id, index): image
            for task in self.with_images
            for index, image in enumerate(task.images)
        }
        sizes = list(map(size_of, self.with_images))
        assert self.queue.images() == self.store.ended.images() == (len(sizes), sum(sizes))

    @invariant()
    def what_was_forgotten_or_never_was_is_unknown(self) -> None:
        for task_id in [*self.forgotten, "never known", "", "../lock"]:
            for call in (self.queue.status, self.queue.image, self.queue.delete):
                with pytest.raises(UnknownTask):
                    call(task_id)
            self.queue.fetched(task_id)

    @invariant()
    def a_worker_that_comes_too_late_is_refused(self) -> None:
        if self.leaving:
            return  # that is one who comes in time
        for task_id in {task.task_id for task in self.tasks if task not in self.running}:
            assert not self.queue.report(task_id, Phase.DENOISING, 1, 2)
            assert not self.queue.finish(task_id, [b"too late"])
            assert not self.queue.fail(task_id, "task_failed", "too late")
            assert not self.queue.release(task_id)

    @invariant()
    def health_counts_what_waits_and_runs(self) -> None:
        health = self.queue.health()
        assert (health.waiting, health.running) == (len(self.waiting), len(self.running))
        busy = self.running or self.leaving
        idle_or_busy = ServerState.BUSY if busy else ServerState.READY
        assert health.state is (idle_or_busy if self.loaded else ServerState.LOADING)

    @invariant()
    def what_was_learned_is_counted(self) -> None:
        stats = self.queue.stats()
        assert (stats.samples, stats.outcomes) == (self.samples, self.outcomes)
