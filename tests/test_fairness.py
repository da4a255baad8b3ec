"""Whose task runs next, in the real queue and in virtual time; a restart keeps the order."""

from pathlib import Path
from typing import Any

import pytest
from conftest import PlayedQueue, allow, forecast_of, params_for
from memory_stores import memory_store

from errors import WrongStatus
from scheduler.limits import QueueLimits
from storage.task_store import TaskStore
from task import Owner, Phase, Task
from timing_model import TimingModel


class Bench:
    """A queue whose worker and clock the test moves. A step takes 2 s; names are prompts."""

    def __init__(self, store: TaskStore | None = None, **limits: float) -> None:
        self.at = 1000.0
        self.queue = PlayedQueue(
            allow("noise-flux1", "noise-flux2"),
            TimingModel(),
            store or memory_store(),
            QueueLimits(**limits),  # type: ignore[arg-type]
            monotonic=self.clock,
            now=self.clock,
        )
        self.queue.load()

    def clock(self) -> float:
        return self.at

    def submit(
        self,
        name: str,
        client: str = "",
        *,
        priority: int = 0,
        steps: int = 4,
        weight: float = 1.0,
        end_user: str = "",
    ) -> Task:
        params = params_for(name, width=512, height=512, steps=steps)
        whose = Owner(client, end_user, weight)
        return self.queue.submit(params, priority=priority, owner=whose)[0]

    def waiting(self) -> list[str]:
        tasks, _ = self.queue.unfinished(1000, 0)
        return [task.params.prompt for task in tasks if task.status == "waiting"]

    def run(self) -> str:
        """The next task is claimed and finished; its name."""
        task = self.queue.claim()
        assert task
        self.queue.report(task.task_id, Phase.DENOISING, 0, task.params.steps)
        for step in range(1, task.params.steps + 1):
            self.at += 2.0
            self.queue.report(task.task_id, Phase.DENOISING, step, task.params.steps)
        self.queue.report(task.task_id, Phase.IMAGE_ENCODING, task.params.steps, task.params.steps)
        self.queue.finish(task.task_id, [b"image"])
        return task.params.prompt


def test_everybody_is_served_as_they_come_where_there_is_one_client() -> None:
    bench = Bench()
    for name in "abcdef":
        bench.submit(name, steps=1 + ord(name) % 7)
    assert [bench.run() for _ in range(6)] == list("abcdef")


def test_a_second_client_is_next_and_its_position_says_so() -> None:
    bench = Bench()
    for number in range(15):
        bench.submit(f"a{number}", "alice")
    bench.run()
    second = bench.submit("b", "bob")
    assert forecast_of(second).pos == 0
    assert bench.waiting()[:2] == ["b", "a1"]


def test_clients_take_turns_and_the_estimate_is_what_submit_then_says() -> None:
    bench = Bench()
    for number in range(4):
        bench.submit(f"a{number}", "alice")
    for number in range(3):
        params = params_for(f"b{number}", width=512, height=512)
        promised, _ = bench.queue.estimate(params, owner=Owner("bob"))
        assert forecast_of(bench.submit(f"b{number}", "bob")).pos == promised.pos
    assert bench.waiting() == ["a0", "b0", "a1", "b1", "a2", "b2", "a3"]
    assert [bench.run() for _ in range(7)] == ["a0", "b0", "a1", "b1", "a2", "b2", "a3"]


def test_a_client_with_twice_the_weight_gets_twice_the_turns() -> None:
    bench = Bench()
    for number in range(8):
        bench.submit(f"a{number}", "alice", weight=2.0)
        bench.submit(f"b{number}", "bob")
    first = [bench.run()[0] for _ in range(9)]
    assert (first.count("a"), first.count("b")) == (6, 3)


def test_users_of_one_client_take_turns_within_its_share() -> None:
    bench = Bench()
    for number in range(4):
        bench.submit(f"app-u{number}", "app", end_user="u")
    for number in range(4):
        bench.submit(f"other{number}", "other")
    bench.submit("app-v0", "app", end_user="v")
    order = bench.waiting()
    assert order.index("app-v0") < order.index("app-u2")
    assert [name for name in order if name.startswith("app")][:2] == ["app-u0", "app-v0"]


def test_background_tasks_run_when_nothing_else_waits() -> None:
    bench = Bench()
    bench.submit("background", "alice", priority=-1)
    bench.submit("a", "alice")
    bench.submit("b", "bob")
    bench.submit("urgent", "bob", priority=1)
    assert [bench.run() for _ in range(4)] == ["urgent", "a", "b", "background"]


def test_a_normal_task_that_urgent_ones_have_overtaken_for_long_counts_as_urgent() -> None:
    bench = Bench(max_overtaken_s=20.0)
    bench.submit("patient", "alice")
    ran = []
    for number in range(8):
        bench.submit(f"urgent{number}", "bob", priority=1)
        bench.submit(f"more{number}", "bob", priority=1)
        ran.append(bench.run())
        if "patient" in ran:
            break
    assert 1 < len(ran) < 8


def test_a_cancelled_task_gives_way_to_the_next_of_its_client() -> None:
    bench = Bench()
    first = bench.submit("a0", "alice", steps=40)
    bench.submit("b0", "bob", steps=10)
    bench.submit("a1", "alice", steps=10)
    bench.submit("b1", "bob", steps=10)
    bench.queue.delete(first.task_id)
    assert bench.waiting() == ["a1", "b0", "b1"] or bench.waiting() == ["b0", "a1", "b1"]


def test_a_restart_keeps_the_order(tmp_path: Path) -> None:
    store = TaskStore(tmp_path)
    bench = Bench(store)
    for number in range(5):
        bench.submit(f"a{number}", "alice", weight=2.0)
        bench.submit(f"b{number}", "bob", end_user="u")
    bench.submit("urgent", "bob", priority=1)
    before = bench.waiting()
    store.close()
    store = TaskStore(tmp_path)
    after = Bench(store)
    assert after.waiting() == before
    store.close()


def test_affinity_joins_others_within_its_bound_and_keeps_its_group() -> None:
    bench = Bench(max_delay_s=1000.0)
    bench.submit("a0", "alice")
    klein = params_for("k0", width=512, height=512, model="noise-flux2")
    bench.queue.submit(klein, owner=Owner("bob"))
    bench.submit("c0", "carol")
    bench.submit("d0", "dave")
    joined = params_for("k1", width=512, height=512, model="noise-flux2")
    bench.queue.submit(joined, owner=Owner("erin"))
    order = bench.waiting()
    assert order.index("k1") == order.index("k0") + 1


def test_a_claim_takes_its_task_though_another_one_is_first_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The encoder finishes a task between the two halves of a claim: on disk and in memory. What
    was measured puts another client's task first."""
    bench = Bench()
    names = ("b0", "a0", "b1", "a1", "b2", "a2")
    ids = {bench.submit(name, {"a": "alice", "b": "bob"}[name[0]]).task_id: name for name in names}
    store = bench.queue.scheduler.store
    claim_on_disk = store.claim
    running: list[Task] = []

    def start() -> Task:
        task = bench.queue.claim()
        assert task
        bench.at += 0.05
        bench.queue.report(task.task_id, Phase.IMAGE_ENCODING, 4, 4)
        return task

    def claim_while_the_encoder_finishes(task: Task, **fields: Any) -> bool:
        claimed = claim_on_disk(task, **fields)
        if running:
            bench.queue.finish(running.pop().task_id, [b"image"])
        return claimed

    bench.queue.finish(start().task_id, [b"image"])
    running.append(start())
    monkeypatch.setattr(store, "claim", claim_while_the_encoder_finishes)
    ran = []
    while bench.waiting():
        task = start()
        ran.append(ids[task.task_id])
        bench.queue.finish(task.task_id, [b"image"])
    assert sorted(ran) == ["a1", "a2", "b1", "b2"]
    assert bench.queue.length == 0


def test_a_task_whose_prompt_is_being_written_is_not_moved_to_the_front() -> None:
    bench = Bench()
    expanding, _ = bench.queue.submit(params_for("expanding", expand=True))
    bench.submit("a")
    bench.submit("b")
    with pytest.raises(WrongStatus):
        bench.queue.control.move_to_front(expanding.task_id)
    assert [bench.run() for _ in range(2)] == ["a", "b"]
    assert bench.queue.status(expanding.task_id).status == "waiting"
