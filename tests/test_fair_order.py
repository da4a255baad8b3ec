"""The order of the schedule by fair shares, against a plain computation of it."""

from dataclasses import dataclass
from random import Random

import pytest
from bench import MODELS
from bench import Bench as SchedulerBench

from scheduler.fair_share import FairShare, Share
from scheduler.limits import QueueLimits
from scheduler.policy import key, level
from scheduler.schedule import Schedule
from task import Owner, Task


def plain_tags(rows: list[tuple[Task, Share]], shares: FairShare) -> dict[str, float]:
    """Tags as start-time fair queueing defines them: user by user, then client by client."""
    accounts = vars(shares)["_by_number"]
    user_tags, tags = {}, {}
    for user in {share.user for _, share in rows}:
        at = accounts[user].served
        own = [row for row in rows if row[1].user == user]
        for task, share in sorted(own, key=lambda row: (-level(row[0]), row[1].number)):
            user_tags[task.task_id] = at
            at += share.seconds
    for client in {share.client for _, share in rows}:
        at = accounts[client].served
        own = [row for row in rows if row[1].client == client]
        own.sort(key=lambda row: (-level(row[0]), user_tags[row[0].task_id], row[1].number))
        for task, share in own:
            tags[task.task_id] = at
            at += share.seconds / accounts[client].weight
    return tags


def plain_order(schedule: Schedule, shares: FairShare) -> list[str]:
    rows = [(task, schedule.share(position)) for position, task in enumerate(schedule)]
    tags = plain_tags(rows, shares)
    first_of = {task.group: task for task, _ in rows if task.group == task.sequence}

    def rank(task: Task) -> tuple[int, bool, float, int, int]:
        first = first_of.get(task.group)
        turn = tags[first.task_id] if first else task.turn
        return (
            -level(task),
            task.attempt == task.retried_after,
            round(turn, 6),
            task.group,
            task.sequence,
        )

    return [task.task_id for task in sorted((task for task, _ in rows), key=rank)]


@dataclass
class Queue:
    """The policy on random events."""

    dice: Random
    max_delay_s: float
    clients: str
    users: str

    def __post_init__(self) -> None:
        self.bench = SchedulerBench(max_delay_s=self.max_delay_s)
        self.bench.policy.limits = QueueLimits(max_delay_s=self.max_delay_s, max_overtaken_s=20.0)
        self.running: list[Task] = []
        self.number = 0

    def step(self) -> None:
        events = (self.submit, self.submit, self.start, self.end, self.release, self.leave)
        self.dice.choice((*events, self.to_front))()

    def submit(self) -> None:
        dice, bench = self.dice, self.bench
        self.number += 1
        weight = {"a": 1.0, "b": 2.0, "c": 0.5}[client := dice.choice(self.clients)]
        task = bench.task(
            str(self.number),
            dice.choice(MODELS),
            priority=dice.choice([0, 0, 0, 1, -1]),
            steps=dice.choice([1, 2, 4]),
        )
        task.owner = Owner(client, dice.choice(self.users), weight)
        place = bench.policy.place(task, self.seconds(), bench.forecaster.resident_at_start())
        place.give(task, self.number)
        bench.policy.join(task, place)

    def seconds(self) -> float:
        return self.dice.choice([0.25, 1.5, 4.0, 8.0])

    def start(self) -> None:
        if len(self.bench.schedule):
            number = self.dice.choice([0, 0, 0, self.dice.randrange(len(self.bench.schedule))])
            task = self.bench.schedule[number]
            self.bench.policy.start(task, self.seconds())
            task.attempt += 1
            self.running.append(task)

    def end(self) -> None:
        if self.running:
            task = self.running.pop(self.dice.randrange(len(self.running)))
            self.bench.policy.end(task, self.seconds())

    def release(self) -> None:
        if self.running:
            task = self.running.pop(self.dice.randrange(len(self.running)))
            self.bench.policy.release(task, self.seconds(), self.seconds())

    def leave(self) -> None:
        if len(self.bench.schedule):
            self.bench.policy.leave(self.dice.choice(list(self.bench.schedule)))

    def to_front(self) -> None:
        waiting = [task for task in self.bench.schedule if task.attempt == 0]
        if waiting and self.dice.random() < 0.2:
            self.number += 1
            group = self.bench.policy.front_group
            task = self.dice.choice(waiting)
            self.bench.policy.move_to_front(task, sequence=self.number, group=group)


@pytest.mark.parametrize("max_delay_s", [0.0, 1e6])
@pytest.mark.parametrize(("clients", "users"), [("abc", "-"), ("a", "xyz"), ("abc", "xy")])
@pytest.mark.parametrize("seed", range(4))
def test_the_order_equals_a_plain_computation_of_it_after_each_event(
    seed: int, clients: str, users: str, max_delay_s: float
) -> None:
    queue = Queue(Random(seed), max_delay_s, clients, users)
    schedule, shares = queue.bench.schedule, vars(queue.bench.policy)["_shares"]
    compared = 0
    for _ in range(150):
        queue.step()
        order = [task.task_id for task in schedule]
        keys = [key(task) for task in schedule]
        assert keys == sorted(keys)
        assert [schedule.position(task) for task in schedule] == list(range(len(order)))
        if len({task.owner[:2] for task in schedule}) > 1:
            assert order == plain_order(schedule, shares)
            compared += 1
    assert compared > 50


def test_tasks_of_one_user_keep_their_order_whatever_is_measured() -> None:
    queue = Queue(Random(3), 0.0, "a", "-")
    for _ in range(20):
        queue.submit()
    before = [task.task_id for task in queue.bench.schedule]
    for _ in range(5):
        queue.bench.policy.start(queue.bench.schedule[0], 1.0)
        queue.bench.policy.end(queue.bench.task(before.pop(0)), 30.0)
        assert [task.task_id for task in queue.bench.schedule] == before
