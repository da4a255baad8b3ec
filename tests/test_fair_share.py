"""Whose turn it is: shares of GPU time, on random histories of joining, running and ending."""

from dataclasses import dataclass, field
from itertools import combinations
from random import Random

import numpy as np
import pytest

from scheduler.fair_share import FairShare, Share, Waiting
from task import ANYBODY, Owner


class Shares(FairShare):
    """Knows the shares and levels of the waiting tasks, as the schedule does."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[str, tuple[Share, int]] = {}
        self._levels: dict[str, int] = {}

    def enter(self, task_id: str, seconds: float, owner: Owner = ANYBODY, level: int = 0) -> None:
        preview = self.preview(owner, self._rows, level)
        share, changed = self.join(seconds, owner, level)
        self.waiting[task_id], self._levels[task_id] = (share, level), level
        if not changed:
            assert self.tag(task_id) == pytest.approx(share.tag, abs=2e-6)
        assert self.tag(task_id) == pytest.approx(preview, abs=2e-6)

    def claim(self, task_id: str) -> None:
        share, level = self.waiting[task_id]
        before = self.all_tags()
        share = share._replace(tag=before.pop(task_id))
        del self.waiting[task_id]
        if not self.start(task_id, share, level):
            assert self.all_tags() == pytest.approx(before, abs=2e-6)

    def put_back(self, task_id: str, used_s: float, left_s: float) -> None:
        level = self._levels[task_id]
        self.waiting[task_id] = self.release(task_id, used_s, left_s, level), level

    def cancel(self, task_id: str) -> None:
        share, level = self.waiting[task_id]
        before = self.all_tags()
        share = share._replace(tag=before.pop(task_id))
        del self.waiting[task_id]
        if not self.leave(share, level):
            assert self.all_tags() == pytest.approx(before, abs=2e-6)

    def tag(self, task_id: str) -> float:
        return self.all_tags()[task_id]

    def all_tags(self) -> dict[str, float]:
        return dict(zip(self.waiting, self.tags(self._rows()).tolist(), strict=True))

    def _rows(self) -> Waiting:
        rows = [
            (-level, share.client, share.user, share.number, share.seconds)
            for share, level in self.waiting.values()
        ]
        return Waiting(*np.array(rows, np.float64).reshape(-1, 5).T)


@dataclass
class World:
    """One GPU that always runs the waiting task with the least tag."""

    random: Random
    error: float = 0.0
    """Forecasts are wrong by up to this share."""
    shares: Shares = field(default_factory=Shares)
    waiting: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    joined: int = 0
    had_s: dict[str, float] = field(default_factory=dict)
    user_had_s: dict[tuple[str, str], float] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)

    def join(
        self, client: str, seconds: float, weight: float = 1.0, user: str = "", level: int = 0
    ) -> str:
        task_id = f"{client}-{user}-{self.joined}"
        self.joined += 1
        owner = Owner(client, user, weight)
        self.shares.reweigh(owner)
        self.shares.enter(task_id, seconds, owner, level)
        self.waiting[task_id] = client, user, level
        self._seconds[task_id] = seconds
        return task_id

    _seconds: dict[str, float] = field(default_factory=dict)

    def turns(self) -> dict[str, tuple[int, float, int]]:
        """Of each waiting task what decides when it runs: the least is next."""
        tags = self.shares.all_tags()
        return {
            task_id: (-level, tags[task_id], int(task_id.rpartition("-")[2]))
            for task_id, (_, _, level) in self.waiting.items()
        }

    def run_one(self) -> str:
        turns = self.turns()
        task_id = min(turns, key=turns.__getitem__)
        client, user, _ = self.waiting.pop(task_id)
        self.shares.claim(task_id)
        took = self._seconds[task_id] * (1 + self.random.uniform(-self.error, self.error))
        self.had_s[client] = self.had_s.get(client, 0.0) + took
        self.user_had_s[client, user] = self.user_had_s.get((client, user), 0.0) + took
        self.shares.end(task_id, took)
        self.ran.append(task_id)
        return task_id


def jain(values: list[float]) -> float:
    """Jain's index of fairness: 1 when all are equal, 1/n when one has all."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def test_tasks_of_one_client_run_first_come_first_served() -> None:
    world = World(Random(1))
    asked = [world.join("a", world.random.uniform(1, 60)) for _ in range(50)]

    assert [world.run_one() for _ in asked] == asked


def test_a_second_client_is_next_however_much_the_first_one_has_waiting() -> None:
    world = World(Random(1))
    for _ in range(15):
        world.join("a", 10)
    world.run_one()
    second = world.join("b", 10)

    assert world.run_one() == second


@pytest.mark.parametrize("seed", range(6))
def test_clients_that_always_wait_get_equal_time_but_for_one_task_each(seed: int) -> None:
    """The bound of Goyal, Vin, Cheng 1996, theorem 1: the weighted times of two clients that
    wait all the time differ by no more than one of the longest tasks of each."""
    world = World(Random(seed))
    weights = {name: world.random.choice([0.5, 1, 2, 5]) for name in "abcd"}
    longest = {name: world.random.uniform(5, 100) for name in weights}
    for name, weight in weights.items():
        for _ in range(60):
            world.join(name, world.random.uniform(1, longest[name]), weight)
    while all(any(c == name for c, *_ in world.waiting.values()) for name in weights):
        world.run_one()
        had = {name: world.had_s.get(name, 0.0) / weights[name] for name in weights}
        for (a, had_a), (b, had_b) in combinations(had.items(), 2):
            most = longest[a] / weights[a] + longest[b] / weights[b]
            assert abs(had_a - had_b) <= most + 1e-6
    assert sum(world.had_s.values()) > 0


@pytest.mark.parametrize("seed", range(5))
def test_measured_seconds_correct_the_forecast_ones(seed: int) -> None:
    """One client's forecasts are three times too short; its share is right all the same."""
    world = World(Random(seed))
    for _ in range(60):
        for name in "abc":
            world.join(name, world.random.uniform(5, 15))
    for task_id in list(world._seconds):
        if task_id.startswith("a"):
            world._seconds[task_id] *= 3
    for _ in range(75):
        world.run_one()

    assert jain(list(world.had_s.values())) >= 0.98


def test_an_idle_client_collects_no_credit() -> None:
    world = World(Random(1))
    for _ in range(100):
        world.join("busy", 10)
    world.join("idle", 10)
    for _ in range(51):
        world.run_one()
    for _ in range(50):
        world.join("idle", 10)
    world.ran.clear()
    for _ in range(40):
        world.run_one()

    assert sum(task_id.startswith("idle") for task_id in world.ran) in (20, 21)


def test_what_was_used_is_not_forgotten_by_pausing_for_a_moment() -> None:
    """A client that has just had much waits, even if it had no task for a moment."""
    world = World(Random(1))
    for _ in range(5):
        world.join("patient", 10)
    world.join("greedy", 100)
    world.run_one(), world.run_one()  # one of each
    again = world.join("greedy", 1)

    assert [world.run_one() for _ in range(5)].index(again) == 4


@pytest.mark.parametrize("seed", range(5))
def test_the_users_of_a_client_share_its_time(seed: int) -> None:
    world = World(Random(seed), error=0.3)
    for _ in range(100):
        world.join("app", world.random.uniform(5, 15), user="greedy")
    for _ in range(100):
        world.join("other", world.random.uniform(5, 15))
    for name in ("u1", "u2", "u3"):
        for _ in range(30):
            world.join("app", world.random.uniform(5, 15), user=name)
    for _ in range(100):
        world.run_one()

    users = [seconds for (client, _), seconds in world.user_had_s.items() if client == "app"]
    assert len(users) == 4
    assert jain(users) >= 0.98
    assert jain(list(world.had_s.values())) >= 0.98


def test_a_higher_level_runs_first_and_counts() -> None:
    world = World(Random(1))
    for _ in range(4):
        world.join("a", 10)
        world.join("b", 10)
    urgent = world.join("a", 10, level=1)

    assert world.run_one() == urgent
    assert [task_id[0] for task_id in (world.run_one() for _ in range(4))] == ["b", "a", "b", "a"]


def test_a_released_task_is_the_next_of_its_client_and_costs_no_share() -> None:
    world = World(Random(1))
    first = world.join("a", 10)
    world.join("a", 10)
    world.join("b", 10)
    tags = {task_id: world.shares.tag(task_id) for task_id in world.waiting}
    world.shares.claim(first)
    world.shares.put_back(first, 0, 10)

    assert {task_id: world.shares.tag(task_id) for task_id in tags} == tags
    assert world.run_one() == first


def test_a_cancelled_task_gives_its_place_to_the_next_one_of_its_client() -> None:
    world = World(Random(1))
    first = world.join("a", 60)
    second = world.join("a", 60)
    third = world.join("b", 50)
    fourth = world.join("b", 50)
    del world.waiting[first]
    world.shares.cancel(first)

    assert [world.run_one() for _ in range(3)] == [second, third, fourth]


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_remembered_when_nothing_waits(seed: int) -> None:
    """Random histories with everything that can happen to a task."""
    random = Random(seed)
    shares, waiting, running = Shares(), set[str](), set[str]()
    for number in range(600):
        chance = random.random()
        if chance < 0.4:
            task_id = str(number)
            owner = Owner(random.choice("abc"), random.choice("xy"), random.choice([1, 2]))
            shares.reweigh(owner)
            shares.enter(task_id, random.uniform(0, 60), owner, random.choice([-1, 0, 1]))
            waiting.add(task_id)
        elif chance < 0.6 and waiting:
            task_id = random.choice(sorted(waiting))
            shares.claim(task_id)
            waiting.remove(task_id)
            running.add(task_id)
        elif chance < 0.8 and running:
            task_id = random.choice(sorted(running))
            running.remove(task_id)
            if random.random() < 0.3:
                shares.put_back(task_id, random.uniform(0, 5), 5)
                waiting.add(task_id)
            else:
                shares.end(task_id, random.uniform(0, 60))
        elif waiting:
            task_id = random.choice(sorted(waiting))
            shares.cancel(task_id)
            waiting.remove(task_id)
        assert all(tag >= 0 for tag in shares.all_tags().values())
    for task_id in waiting:
        shares.cancel(task_id)
    for task_id in running:
        shares.end(task_id, 1)

    assert vars(shares)["_clients"] == {}
    assert vars(shares)["_running"] == vars(shares)["_by_number"] == {}


@pytest.mark.parametrize("at_a_time", [1, 3])
@pytest.mark.parametrize("whose", ["client", "user"])
def test_new_names_for_each_task_do_not_keep_the_others_waiting(whose: str, at_a_time: int) -> None:
    world = World(Random(1))

    def join_as_somebody_new(number: int) -> None:
        if whose == "client":
            world.join(f"new{number}", 10)
        else:
            world.join("honest", 10, user=f"new{number}")

    for _ in range(20):
        world.join("honest", 10, user="one")
    for number in range(at_a_time):
        join_as_somebody_new(number)
    for number in range(at_a_time, 40):
        if not world.run_one().startswith("honest-one-"):
            join_as_somebody_new(number)
    honest = sum(task_id.startswith("honest-one-") for task_id in world.ran)
    assert honest >= len(world.ran) // (at_a_time + 1) - 1


def test_clients_who_are_gone_are_forgotten_while_others_wait() -> None:
    world = World(Random(1))
    world.join("busy", 10)
    for number in range(200):
        world.join("busy", 10)
        world.join(f"once{number}", 10)
        world.run_one()
        world.run_one()
    world.join("busy", 10)
    assert len(world.shares._clients) <= 3


@pytest.mark.parametrize("seed", range(20))
def test_tasks_run_in_the_order_of_their_tags_when_nothing_new_comes(seed: int) -> None:
    world = World(Random(seed))
    dice = world.random
    weights = {client: dice.choice([1.0, 2.0, 3.0]) for client in "abcd"}

    def order() -> list[str]:
        return sorted(world.waiting, key=world.turns().__getitem__)

    for _ in range(40):
        for _ in range(dice.randint(0, 5)):
            client, user = dice.choice("abcd"), dice.choice(["", "u", "v"])
            level = dice.choice([0, 0, -1, 1])
            world.join(client, dice.choice([1, 2, 4, 8, 16]), weights[client], user, level)
        expected = order()[: dice.randint(0, 4)]
        assert [world.run_one() for _ in expected] == expected
    assert world.ran
