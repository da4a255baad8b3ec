"""Whose turn it is: GPU time is shared between clients, and between the users of one client.

Start-time fair queueing (Goyal, Vin, Cheng 1996, "Start-time fair queuing: a scheduling algorithm
for integrated services packet switching networks"). Each client has a `served` time: the GPU
seconds that it has had, divided by its weight. The tag of its first waiting task is that time, and
each further task adds its forecast seconds divided by the weight. Tasks run in the order of their
tags, so the next one is that of the client that has had least.

A client that comes back after an idle time starts at the virtual time, so idle clients collect no
credit. The virtual time is the tag of the task that started last. When a client becomes idle it
also grows by the time that the others have waited for its task, each for its part. Otherwise a
stream of new clients, each with one task, would run before the others for ever.

Forecast seconds are replaced by measured ones when a task ends. The users of one client share its
time in the same way, with equal weights.

Arithmetic only. Not thread-safe: its owner holds a lock.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from task import ANYBODY, Owner
from timing.corrections import Floats

DECIMALS = 6
"""Tags are rounded to microseconds, so that rounding errors decide nothing."""


class Share(NamedTuple):
    """A waiting task, as its client's share counts it."""

    client: int
    user: int
    """Numbers of the client and of its user."""
    number: int
    """Tasks of one user run in this order."""
    seconds: float
    """Forecast GPU seconds."""
    tag: float
    """Virtual time, in GPU seconds per weight."""


class Waiting(NamedTuple):
    """All waiting tasks, a value for each: the level, of which smaller ones run first, and the
    values of its Share."""

    level: Floats
    client: Floats
    user: Floats
    number: Floats
    seconds: Floats


@dataclass(eq=False)
class _Account:
    """What a client or one of its users has had, and has in the queue."""

    number: int
    served: float = 0.0
    """GPU seconds per weight, those of its running tasks included."""
    waiting: dict[int, int] = field(default_factory=dict)
    """Waiting tasks by level; levels without any are left out."""
    waiting_s: dict[int, float] = field(default_factory=dict)
    """Their forecast seconds."""
    running: int = 0
    users: "dict[str, _Account]" = field(default_factory=dict)
    """Of a client."""

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, level: int, seconds: float) -> None:
        self.waiting[level] = self.waiting.get(level, 0) + 1
        self.waiting_s[level] = self.waiting_s.get(level, 0.0) + seconds

    def remove(self, level: int, seconds: float) -> None:
        self.waiting[level] -= 1
        self.waiting_s[level] -= seconds
        if not self.waiting[level]:
            del self.waiting[level], self.waiting_s[level]

    def before_s(self, level: int) -> float:
        """Forecast seconds of the waiting tasks of this level and higher ones."""
        return sum(seconds for other, seconds in self.waiting_s.items() if other >= level)


@dataclass(eq=False)
class _Client(_Account):
    weight: float = 1.0
    virtual: float = 0.0
    """The virtual time between its users."""


@dataclass(eq=False)
class _Charged:
    """A running task, whose forecast seconds its client and user are charged."""

    client: _Client
    user: _Account
    seconds: float
    """Forecast GPU seconds."""
    weight: float
    """Of its client, when it started."""


class FairShare:
    """Tags of the waiting tasks. The values of these tasks are kept by its owner (Waiting)."""

    def __init__(self) -> None:
        self.virtual = 0.0
        self._clients: dict[str, _Client] = {}
        self._by_number: dict[int, _Account] = {}
        self._running: dict[str, _Charged] = {}
        self._waiting_users = 0
        self._numbers = 0
        self._joined = 0
        self._released = 0

    @property
    def several_wait(self) -> bool:
        """Whether tasks of several users wait. Else their order is that in which they came."""
        return self._waiting_users > 1

    def waits_alone(self, owner: Owner) -> bool:
        """Whether no task of another user waits."""
        client = self._clients.get(owner.name)
        user = client.users.get(owner.end_user) if client else None
        return self._waiting_users == (1 if user and user.waiting else 0)

    def number_of(self, name: str) -> int | None:
        """The number of a client; None: it has nothing in the queue."""
        client = self._clients.get(name)
        return client.number if client else None

    def reweigh(self, owner: Owner) -> bool:
        """Note the weight of a client. Returns whether tags may have changed."""
        client = self._clients.get(owner.name)
        if client is None or client.weight == owner.weight:
            return False
        client.weight = owner.weight
        return bool(client.waiting)

    def tags(self, waiting: Waiting) -> Floats:
        """The tags of all waiting tasks."""
        client = waiting.client
        weight = self._values(client, "weight")
        keys = waiting.number, self._user_tags(waiting), waiting.level
        tags = _chained(keys, client, self._values(client, "served"), waiting.seconds / weight)
        return np.round(tags, DECIMALS)

    def preview(self, owner: Owner, waiting: Callable[[], Waiting], level: int = 0) -> float:
        """The tag that a task would get if it joined now.

        Args:
            waiting: all waiting tasks; needed if several users of the client wait.
        """
        client = self._clients.get(owner.name)
        if client is None:
            return round(self.virtual, DECIMALS)
        served = self._served(client, self.virtual)
        user = client.users.get(owner.end_user)
        if client.waiting == (user.waiting if user else {}):
            before_s = client.before_s(level)
        else:
            of_all = waiting()
            own = of_all.client == client.number
            of_client = Waiting(*(values[own] for values in of_all))
            joins_at = self._served(user, client.virtual) + (user.before_s(level) if user else 0.0)
            is_earlier, levels = self._user_tags(of_client) <= joins_at, of_client.level
            is_before = (levels < -level) | ((levels == -level) & is_earlier)
            before_s = float(of_client.seconds[is_before].sum())
        return round(served + before_s / client.weight, DECIMALS)

    def had(self, owner: Owner) -> float:
        """GPU seconds per weight that a client has had, its running tasks as forecast. One that is
        idle counts as if it had always had its share."""
        return self._served(self._clients.get(owner.name), self.virtual)

    def had_after_s(self, task_id: str, had: float) -> float:
        """GPU seconds of a running task after which its client has had this much."""
        running = self._running[task_id]
        return running.seconds + (had - running.client.served) * running.weight

    def join(self, seconds: float, owner: Owner = ANYBODY, level: int = 0) -> tuple[Share, bool]:
        """A task begins to wait.

        Args:
            seconds: forecast GPU seconds.
            level: of several tasks of a client, those of a higher level run first.

        Returns:
            Its share, and whether tags have changed; then its own is not known yet.
        """
        client = self._clients.get(owner.name)
        if client is None:
            client = self._clients[owner.name] = _Client(self._number(), weight=owner.weight)
            self._by_number[client.number] = client
        client.served = self._served(client, self.virtual)
        user = client.users.get(owner.end_user)
        if user is None:
            user = client.users[owner.end_user] = _Account(self._number())
            self._by_number[user.number] = user
        user.served = self._served(user, client.virtual)
        moves = client.waiting != user.waiting or any(other < level for other in client.waiting)
        tag = round(client.served + client.before_s(level) / client.weight, DECIMALS)
        self._joined += 1
        share = Share(client.number, user.number, self._joined, seconds, tag)
        self._add(share, level)
        return share, moves

    def change_level(self, share: Share, was: int, level: int) -> None:
        """A waiting task gets another level: tags have changed."""
        self._remove(share, was)
        self._add(share, level)

    def start(self, task_id: str, share: Share, level: int = 0) -> bool:
        """A waiting task is claimed. Returns whether tags of other tasks have changed."""
        client, user = self._remove(share, level)
        is_first = share.tag <= round(client.served, DECIMALS)
        self.virtual = max(self.virtual, client.served)
        client.virtual = max(client.virtual, user.served)
        client.running += 1
        user.running += 1
        running = _Charged(client, user, share.seconds, client.weight)
        self._running[task_id] = running
        _charge(running, share.seconds)
        return not is_first

    def end(self, task_id: str, seconds: float) -> bool:
        """A running task has ended, after so many seconds on the GPU.

        Returns:
            Whether tags of waiting tasks have changed.
        """
        running = self._stop(task_id)
        _charge(running, seconds - running.seconds)
        self._advance(running, seconds)
        self._forget(running.client)
        return seconds != running.seconds and bool(running.client.waiting)

    def release(self, task_id: str, used_s: float, left_s: float, level: int = 0) -> Share:
        """A running task waits again, before the others of its user. Tags have changed.

        Args:
            used_s: seconds that it was on the GPU.
            left_s: forecast GPU seconds of what is left of it.
        """
        running = self._stop(task_id)
        _charge(running, used_s - running.seconds)
        self._released -= 1
        share = Share(
            running.client.number,
            running.user.number,
            self._released,
            left_s,
            round(running.client.served, DECIMALS),
        )
        self._add(share, level)
        return share

    def leave(self, share: Share, level: int = 0) -> bool:
        """A waiting task no longer waits. Returns whether tags of other tasks have changed."""
        client, _ = self._remove(share, level)
        last_tag = client.served + sum(client.waiting_s.values()) / client.weight
        self._forget(client)
        return share.tag < round(last_tag, DECIMALS)

    # -- inside -----------------------------------------------------------------------------------

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _add(self, share: Share, level: int) -> None:
        user = self._by_number[share.user]
        self._waiting_users += not user.waiting
        user.add(level, share.seconds)
        self._by_number[share.client].add(level, share.seconds)

    def _remove(self, share: Share, level: int) -> tuple[_Client, _Account]:
        client, user = self._by_number[share.client], self._by_number[share.user]
        client.remove(level, share.seconds)
        user.remove(level, share.seconds)
        self._waiting_users -= not user.waiting
        assert isinstance(client, _Client)
        return client, user

    def _served(self, account: _Account | None, virtual: float) -> float:
        """GPU seconds per weight of an account, as they count for a task that joins now.

        Args:
            virtual: the virtual time, where a new or idle account starts.
        """
        if account is None:
            return virtual
        return max(account.served, virtual) if account.idle else account.served

    def _values(self, numbers: Floats, name: str) -> Floats:
        """This value of the account of each number."""
        known, inverse = np.unique(numbers, return_inverse=True)
        values = [getattr(self._by_number[int(number)], name) for number in known]
        return np.array(values, np.float64)[inverse]

    def _user_tags(self, waiting: Waiting) -> Floats:
        """The virtual time of each task between the users of its client."""
        served = self._values(waiting.user, "served")
        return _chained((waiting.number, waiting.level), waiting.user, served, waiting.seconds)

    def _stop(self, task_id: str) -> _Charged:
        running = self._running.pop(task_id)
        running.client.running -= 1
        running.user.running -= 1
        return running

    def _advance(self, running: _Charged, seconds: float) -> None:
        """A task has ended, after so many seconds on the GPU: if its user or client became idle by
        that, the others have waited for it."""
        client, user = running.client, running.user
        users = sum(not other.idle for other in client.users.values())
        if user.idle and users:
            grown = client.virtual + seconds / users
            client.virtual = min(grown, max(user.served, client.virtual))
        weights = sum(other.weight for other in self._clients.values() if not other.idle)
        if client.idle and weights:
            grown = self.virtual + seconds / weights
            self.virtual = min(grown, max(client.served, self.virtual))

    def _forget(self, client: _Client) -> None:
        """Forget the idle accounts that have had no more than others: they equal new ones."""
        if not self._running and not self._waiting_users:
            self._clients.clear()
            self._by_number.clear()
            self.virtual = 0.0
        elif client.idle:
            self._drop(self._clients, self.virtual)
        else:
            self._drop(client.users, client.virtual)

    def _drop(self, accounts: dict[str, _Client] | dict[str, _Account], virtual: float) -> None:
        gone = [name for name, a in accounts.items() if a.idle and a.served <= virtual]
        for name in gone:
            account = accounts.pop(name)
            for dropped in (account, *account.users.values()):
                del self._by_number[dropped.number]


def _charge(running: _Charged, seconds: float) -> None:
    running.user.served += seconds
    running.client.served += seconds / running.weight


def _chained(keys: Iterable[Floats], group: Floats, start: Floats, amounts: Floats) -> Floats:
    """Of each task, the start of its group and the amounts of those of the group before it.

    Args:
        keys: the order within a group, the last key first.
    """
    order = np.lexsort((*keys, group))
    group, amounts = group[order], amounts[order]
    before = np.cumsum(amounts) - amounts
    firsts = np.flatnonzero(np.concatenate(([True], group[1:] != group[:-1])))[: len(group)]
    lengths = np.diff(np.append(firsts, len(group)))
    chained = np.empty(len(group))
    chained[order] = before - np.repeat(before[firsts], lengths)
    return chained + start
