"""The wall clock is set forward and back, while the server runs and between two runs: on a real
store, with clocks that the test moves."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, ROOT, PlayedQueue, allow, params_for
from live import EventStream, SteppedServer

from api.generate_request import Limits
from api.webhooks import RETRY_AFTER_S, Webhooks
from errors import Gone
from scheduler.limits import QueueLimits
from scheduler.restart import RESERVED_IDS
from scheduler.scheduler import PRUNE_EVERY_S
from storage.ended_tasks import TOMBSTONE_S
from storage.task_store import TaskStore
from task import TaskStatus
from timing_model import TimingModel

HOUR_S, DAY_S, YEAR_S = 3600.0, 86400.0, 31_536_000.0
KEEP_S, REFETCH_S = 6 * HOUR_S, 300.0
JUMPS = [-DAY_S, -HOUR_S, HOUR_S, DAY_S, 50 * YEAR_S]
DISCARD_PORT = "http://127.0.0.1:9/"
"""Nobody listens there."""


class Machine:
    """Its clocks, its disk, and the server that runs on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wall, self.since_boot = 1_800_000_000.0, 1000.0
        self.start()

    def start(self) -> None:
        self.store = TaskStore(self.folder)
        self.queue = PlayedQueue(
            allow("noise-flux1"),
            TimingModel(),
            self.store,
            QueueLimits(keep_s=int(KEEP_S), refetch_s=int(REFETCH_S)),
            monotonic=lambda: self.since_boot,
            now=lambda: self.wall,
        )
        self.queue.worker.load_started(self.queue.scheduler.allowed.first_spec)
        self.queue.loaded(self.queue.scheduler.allowed.first_spec, None)

    def restart(self, down_s: float = 0.0) -> None:
        """The machine too: its monotonic clock begins again."""
        self.store.close()
        self.since_boot = 5.0
        self.wall += down_s
        self.start()

    def pass_s(self, seconds: float) -> None:
        """Time passes, and the worker is idle."""
        self.wall += seconds
        self.since_boot += seconds
        self.queue.scheduler.prune()

    def settle(self) -> None:
        self.pass_s(PRUNE_EVERY_S)

    def draw(self, **options: Any) -> str:
        task_id = self.queue.submit(params_for(), priority=0, **options)[0].task_id
        assert self.queue.claim(0)
        assert self.queue.finish(task_id, [b"image"])
        return task_id

    def is_kept(self, task_id: str) -> bool:
        try:
            return self.queue.image(task_id)[0] == b"image"
        except Gone:
            return False


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.store.close()


@pytest.mark.parametrize("jump_s", JUMPS)
def test_pictures_keys_and_ends_are_kept_for_their_time_whatever_the_wall_clock_does(
    machine: Machine, jump_s: float
) -> None:
    done = machine.draw(client_key="key")
    failed = machine.queue.submit(params_for(), priority=0)[0].task_id
    assert machine.queue.claim(0)
    assert machine.queue.fail(failed, "task_failed", "It was the test.")
    waiting = machine.queue.submit(params_for(), priority=0)[0].task_id
    cancelled = machine.queue.submit(params_for(), priority=0)[0].task_id
    machine.queue.delete(cancelled)
    machine.pass_s(KEEP_S / 2)
    machine.wall += jump_s
    machine.pass_s(KEEP_S / 2 - 60)
    assert machine.is_kept(done)
    assert machine.queue.submitted_as("key")
    assert machine.queue.status(failed).status is TaskStatus.FAILED
    assert machine.queue.status(cancelled).status is TaskStatus.CANCELLED
    machine.pass_s(120)
    for task_id in (done, failed, cancelled):
        with pytest.raises(Gone, match="expired"):
            machine.queue.status(task_id)
    assert machine.queue.submitted_as("key") is None
    assert machine.queue.status(waiting).status is TaskStatus.WAITING
    machine.wall -= jump_s
    machine.pass_s(TOMBSTONE_S - 60)
    assert machine.store.find(done) is not None
    machine.pass_s(120)
    assert machine.store.find(done) is None


@pytest.mark.parametrize("jump_s", JUMPS)
def test_a_fetched_picture_can_be_fetched_again_for_its_time(
    machine: Machine, jump_s: float
) -> None:
    done = machine.draw()
    machine.queue.fetched(done)
    machine.wall += jump_s
    machine.pass_s(REFETCH_S - 1)
    assert machine.is_kept(done)
    machine.pass_s(2)
    assert not machine.is_kept(done)


@pytest.mark.parametrize("jump_s", JUMPS)
def test_a_clock_that_was_set_while_running_ends_nothing_at_the_next_start(
    machine: Machine, jump_s: float
) -> None:
    done = machine.draw()
    machine.wall += jump_s
    machine.settle()
    machine.restart(down_s=HOUR_S)
    machine.settle()
    assert machine.is_kept(done)
    machine.restart(down_s=HOUR_S)  # the time between two runs counts as before
    machine.pass_s(KEEP_S - 2 * HOUR_S - 60)
    assert machine.is_kept(done)
    machine.pass_s(120)
    assert not machine.is_kept(done)


@pytest.mark.parametrize("jump_s", [-DAY_S, -50 * YEAR_S])
def test_a_task_that_ended_in_the_future_counts_as_ended_now(
    machine: Machine, jump_s: float
) -> None:
    done, fetched = machine.draw(), machine.draw()
    machine.queue.fetched(fetched)
    machine.restart(down_s=jump_s)
    machine.settle()
    machine.pass_s(REFETCH_S - 20)
    assert machine.is_kept(fetched)
    machine.pass_s(40)
    assert not machine.is_kept(fetched)
    machine.pass_s(KEEP_S - REFETCH_S - 60)
    assert machine.is_kept(done)
    machine.pass_s(120)
    assert not machine.is_kept(done)


def test_times_in_the_future_are_looked_for_once_after_a_start(machine: Machine) -> None:
    machine.draw()
    machine.restart(down_s=-DAY_S)
    updates: list[str] = []
    machine.store._database.connection.set_trace_callback(
        lambda statement: updates.append(statement) if statement.startswith("UPDATE") else None
    )
    machine.settle()
    assert len(updates) == 3  # when tasks ended, were fetched, were removed
    machine.settle()
    assert len(updates) == 3


def test_a_wrong_clock_that_is_set_right_between_two_runs_keeps_nothing_for_long(
    machine: Machine,
) -> None:
    machine.wall += DAY_S
    done = machine.draw()
    machine.settle()
    machine.restart(down_s=-DAY_S)
    machine.settle()
    assert machine.is_kept(done)
    machine.pass_s(KEEP_S + 1)
    assert not machine.is_kept(done)


def test_the_newest_picture_is_the_last_to_make_room_also_after_the_clock_went_back(
    machine: Machine,
) -> None:
    older = machine.draw()
    machine.wall -= DAY_S
    machine.pass_s(60)
    newer = machine.draw()
    assert machine.store.ended.oldest_images_over(5) == [older]
    machine.restart(down_s=-DAY_S)
    machine.settle()
    machine.pass_s(60)
    newest = machine.draw()
    assert machine.store.ended.oldest_images_over(10) == [older]
    assert sorted(machine.store.ended.oldest_images_over(5)) == sorted([older, newer])
    assert machine.is_kept(newest)


def test_clients_get_unix_seconds_of_the_wall_clock(machine: Machine) -> None:
    machine.wall += DAY_S
    before = machine.wall
    view = machine.queue.status(machine.draw())
    assert (view.created_at, view.started_at, view.ended_at) == (before, before, before)
    machine.wall -= 2 * DAY_S
    assert machine.queue.status(view.task_id).ended_at == before


@pytest.mark.parametrize("jump_s", JUMPS)
def test_a_forecast_does_not_follow_the_wall_clock(machine: Machine, jump_s: float) -> None:
    running = machine.queue.submit(params_for(), priority=0)[0].task_id
    waiting = machine.queue.submit(params_for(), priority=0)[0].task_id
    assert machine.queue.claim(0)
    machine.since_boot += 1.0
    before = [machine.queue.status(task_id) for task_id in (running, waiting)]
    machine.wall += jump_s
    assert [machine.queue.status(task_id) for task_id in (running, waiting)] == before


@pytest.mark.parametrize("jump_s", JUMPS)
def test_event_ids_only_grow_whatever_the_clock_does(machine: Machine, jump_s: float) -> None:
    ids = [machine.queue.events.last_id]
    for _ in range(4):
        machine.draw()
        machine.wall += jump_s / 4
        ids.append(machine.queue.events.last_id)
        machine.restart(down_s=jump_s / 4)
        ids.append(machine.queue.events.last_id)
    assert ids == sorted(set(ids))


def test_more_ids_are_reserved_before_the_reserved_ones_are_used(machine: Machine) -> None:
    machine.queue.events._last_id += RESERVED_IDS - 10
    machine.settle()
    machine.draw()
    last_id = machine.queue.events.last_id
    machine.restart(down_s=-DAY_S)
    assert machine.queue.events.last_id > last_id


@pytest.mark.parametrize("jump_s", JUMPS)
def test_a_callback_is_tried_again_after_its_pause_whatever_the_wall_clock_does(
    machine: Machine, jump_s: float
) -> None:
    limits = Limits(callback_hosts=frozenset({"127.0.0.1"}))

    def webhooks() -> Webhooks:
        return Webhooks(machine.queue, machine.store.callbacks, limits, "", now=lambda: 0.0)

    def tries() -> int:
        callback = machine.store.callbacks.next()
        assert callback is not None
        return callback.tries

    machine.draw(callback_url=DISCARD_PORT)
    assert webhooks().run_once() == 0.0
    machine.wall += jump_s
    assert 0 < webhooks().run_once() <= RETRY_AFTER_S[0]
    machine.pass_s(RETRY_AFTER_S[0])
    webhooks().run_once()
    assert tries() == 2
    machine.settle()
    machine.restart(down_s=-DAY_S)  # it would be due in a day
    webhooks().run_once()
    assert tries() == 3


@pytest.fixture
def after_the_clock_went_back(tmp_path: Path) -> Iterator[tuple[SteppedServer, int]]:
    """A server whose last run used higher ids than its clock gives, and the last of these ids."""
    last_id = 10**13
    store = TaskStore(tmp_path)
    store.state.reserve_event_ids(last_id)
    store.close()
    server = SteppedServer(tmp_path)
    yield server, last_id
    server.close()


def test_ids_from_before_are_answered_with_the_present_state(
    after_the_clock_went_back: tuple[SteppedServer, int],
) -> None:
    server, last_id = after_the_clock_went_back
    task_id = server.running()
    version = server.status(task_id)["version"]
    assert version > last_id
    for since in (0, last_id, 2 * 10**13):  # the last one was never given
        status = server.status(task_id, wait=60, since=since)
        assert (status["version"], status["status"]) == (version, "running")
    for header in (last_id, 2 * 10**13):
        stream = EventStream(server, f"?task_id={task_id}", f"Last-Event-ID: {header}")
        events = stream.until("running")
        assert events[0][0] == "queue"
        assert events[-1][2]["task_id"] == task_id
        stream.close()
    answer = requests.get(
        f"{server.url}/events?task_id={task_id}&last_event_id={2**64}", timeout=GIVE_UP_S
    )
    assert answer.status_code == 400


USES = {
    "announcements.py",
    "api/event_texts.py",
    "api/keep_api.py",
    "api/native_api.py",
    "api/pairing.py",
    "api/request_rate.py",
    "api/webhooks.py",
    "client/mflux_client.py",
    "cluster/source.py",
    "commands.py",
    "compat/install.py",
    "compat/ollama.py",
    "compat/openai_answers.py",
    "compat/openai_chat.py",
    "compat/openai_responses.py",
    "log_output.py",
    "models/hub_cache.py",
    "models/weights_cache.py",
    "scheduler/events.py",
    "scheduler/health.py",
    "clocks.py",
    "scheduler/scheduler.py",
}
"""They say times to clients or to other programs, compare them with the times of files, notice that
the computer slept, or pass the clock on to what does."""


def test_the_wall_clock_is_used_only_for_times_in_answers() -> None:
    """Durations are measured with the monotonic clock."""
    pattern = re.compile(r"\btime\.time\b|\bdatetime\.|\butcnow\b")
    sources = [
        path
        for path in ROOT.rglob("*.py")
        if path.relative_to(ROOT).parts[0] not in (".venv", "tests", "benchmarks", "docs", "deploy")
    ]
    using = {str(path.relative_to(ROOT)) for path in sources if pattern.search(path.read_text())}
    assert using == USES
