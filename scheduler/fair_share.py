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

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

from task import ANYBODY, Owner


@dataclass(eq=False)
class _Entry:
    """A task that waits or runs."""

    task_id: str
    user: "_Share"
    client: "_Client"
    seconds: float
    level: int
    number: int
    """Counts the tasks that joined."""
    weight: float = 1.0
    """Of its client, when it started."""
    tag: float = 0.0
    """Virtual time, in GPU seconds per weight."""


@dataclass(eq=False)
class _Share:
    """What somebody has had."""

    served: float = 0.0
    """GPU seconds per weight, those of its running tasks included."""
    waiting: list[_Entry] = field(default_factory=list)
    running: int = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running


@dataclass(eq=False)
class _Client(_Share):
    """`waiting` is in the order in which its tasks run."""

    weight: float = 1.0
    virtual: float = 0.0
    """The virtual time between its users."""
    users: dict[str, _Share] = field(default_factory=dict)


class FairShare:
    """Tags of the waiting tasks."""

    def __init__(self) -> None:
        self.virtual = 0.0
        self._clients: dict[str, _Client] = {}
        self._entries: dict[str, _Entry] = {}
        self._joined = 0
        self._stale: set[_Client] = set()
        """Whose tags are those of before its latest measured seconds."""

    def tag(self, task_id: str) -> float:
        """Of a task that waits or runs. Tasks of one priority run in the order of their tags."""
        return self._entries[task_id].tag

    def waiting_of(self, name: str) -> list[tuple[str, float]]:
        """The waiting tasks of a client in the order in which they run, with forecast seconds."""
        account = self._clients.get(name)
        return [(entry.task_id, entry.seconds) for entry in account.waiting] if account else []

    def prepare(self, owner: Owner) -> bool:
        """Bring all tags up to date, before a task of this owner joins or is previewed.

        Returns:
            Whether tags have changed.
        """
        account, changed = self._clients.get(owner.name), False
        if account is not None and account.weight != owner.weight:
            account.weight = owner.weight
            self._stale.add(account)
        if self._stale and not self._only(owner):
            changed = self._update()
        return changed

    def preview(self, seconds: float, owner: Owner, level: int = 0) -> float:
        """The tag that a task would get if it joined now."""
        self.join("", seconds, owner, level)
        tag = self.tag("")
        self.leave("")
        return tag

    def had(self, owner: Owner) -> float:
        """GPU seconds per weight that a client has had, its running tasks as forecast. One that is
        idle counts as if it had always had its share."""
        account = self._clients.get(owner.name)
        if account is None or account.idle:
            return max(account.served if account else 0.0, self.virtual)
        return account.served

    def had_after_s(self, task_id: str, had: float) -> float:
        """GPU seconds of a running task after which its client has had this much."""
        entry = self._entries[task_id]
        return entry.seconds + (had - entry.client.served) * entry.weight

    def join(
        self,
        task_id: str,
        seconds: float,
        owner: Owner = ANYBODY,
        level: int = 0,
    ) -> bool:
        """A task begins to wait.

        Args:
            seconds: forecast GPU seconds.
            level: of several tasks of a client, those of a higher level run first.

        Returns:
            Whether tags of other tasks have changed.
        """
        account = self._clients.setdefault(owner.name, _Client(weight=owner.weight))
        if account.idle:
            account.served = max(account.served, self.virtual)
        share = account.users.setdefault(owner.end_user, _Share())
        if share.idle:
            share.served = max(share.served, account.virtual)
        entry = _Entry(task_id, share, account, seconds, level, self._joined)
        self._joined += 1
        self._entries[task_id] = entry
        share.waiting.append(entry)
        last = account.waiting[-1] if account.waiting else None
        if last is None or (last.user is share and last.level >= level) or self._only():
            self._insert(account, entry)
            return False
        return self._order(account)

    def raise_level(self, task_id: str, level: int) -> bool:
        """A waiting task gets a higher level. Returns whether tags have changed."""
        self._entries[task_id].level = level
        return self._order(self._entries[task_id].client)

    def start(self, task_id: str) -> bool:
        """A waiting task is claimed. Returns whether tags of other tasks have changed."""
        entry = self._entries[task_id]
        account, share = entry.client, entry.user
        was_first = account.waiting[0] is entry and share.waiting[0] is entry
        account.waiting.remove(entry)
        share.waiting.remove(entry)
        self.virtual = max(self.virtual, account.served)
        account.virtual = max(account.virtual, share.served)
        account.running += 1
        share.running += 1
        entry.weight = account.weight
        self._charge(entry, entry.seconds)
        return not was_first and self._reorder(account)

    def end(self, task_id: str, seconds: float) -> bool:
        """A running task has ended, after so many seconds on the GPU.

        Returns:
            Whether tags of other tasks have changed.
        """
        entry = self._stop(task_id)
        self._charge(entry, seconds - entry.seconds)
        del self._entries[task_id]
        if seconds != entry.seconds and entry.client.waiting:
            self._stale.add(entry.client)
        self._advance(entry, seconds)
        self._forget(entry.client)
        return bool(self._stale) and not self._only() and self._update()

    def release(self, task_id: str, used_s: float, left_s: float) -> bool:
        """A running task waits again, before the others of its user.

        Args:
            used_s: seconds that it was on the GPU.
            left_s: forecast GPU seconds of what is left of it.

        Returns:
            Whether tags of other tasks have changed.
        """
        entry = self._stop(task_id)
        self._charge(entry, used_s - entry.seconds)
        entry.seconds = left_s
        entry.user.waiting.insert(0, entry)
        if self._only():
            waiting = entry.client.waiting
            index = bisect_left(waiting, -entry.level, key=lambda other: -other.level)
            if index < len(waiting) and waiting[index].level == entry.level:
                entry.tag = min(entry.tag, waiting[index].tag)
            waiting.insert(index, entry)
        return self._reorder(entry.client)

    def leave(self, task_id: str) -> bool:
        """A waiting task waits no more. Returns whether tags of other tasks have changed."""
        entry = self._entries.pop(task_id)
        was_last = entry.client.waiting[-1] is entry
        entry.client.waiting.remove(entry)
        entry.user.waiting.remove(entry)
        changed = not was_last and self._reorder(entry.client)
        self._forget(entry.client)
        return changed

    # -- inside -----------------------------------------------------------------------------------

    def _only(self, owner: Owner | None = None) -> bool:
        """Whether all waiting tasks are of one user, and of this one: then their order is that in
        which they came, whatever their tags are."""
        waiting = [
            (name, user_name)
            for name, account in self._clients.items()
            if account.waiting
            for user_name, share in account.users.items()
            if share.waiting
        ]
        if owner is None:
            return len(waiting) <= 1
        return waiting in ([], [owner[:2]])

    def _update(self) -> bool:
        stale, self._stale = self._stale, set()
        changes = [self._order(account) for account in stale]
        return any(changes)

    def _insert(self, account: _Client, entry: _Entry) -> None:
        """A task joins behind the others of its level; all that wait are of its user."""
        index = bisect_right(account.waiting, -entry.level, key=lambda other: -other.level)
        before = account.waiting[index - 1] if index else None
        entry.tag = account.served
        if before is not None and before.level == entry.level:
            entry.tag = before.tag + before.seconds / account.weight
        if index < len(account.waiting):
            self._stale.add(account)
        account.waiting.insert(index, entry)

    def _reorder(self, account: _Client) -> bool:
        """Order the waiting tasks of a client, or later if all that wait are of one user.

        Returns:
            Whether tags have changed.
        """
        if self._only():
            self._stale.add(account)
            return False
        return self._order(account)

    def _order(self, account: _Client) -> bool:
        """Order the waiting tasks of a client and give them their tags.

        Returns:
            Whether one has changed.
        """
        ranked = [
            (-entry.level, user_tag, entry.number, entry)
            for share in account.users.values()
            for user_tag, entry in _chain(share)
        ]
        ranked.sort(key=lambda rank: rank[:3])
        account.waiting = [entry for *_, entry in ranked]
        tag, changed = account.served, False
        for entry in account.waiting:
            changed |= entry.tag != tag
            entry.tag = tag
            tag += entry.seconds / account.weight
        return changed

    def _charge(self, entry: _Entry, seconds: float) -> None:
        entry.user.served += seconds
        entry.client.served += seconds / entry.weight

    def _stop(self, task_id: str) -> _Entry:
        entry = self._entries[task_id]
        entry.client.running -= 1
        entry.user.running -= 1
        return entry

    def _advance(self, entry: _Entry, seconds: float) -> None:
        """The task of an entry has ended, after so many seconds on the GPU: if its user or client
        became idle by that, the others have waited for it."""
        account, share = entry.client, entry.user
        users = sum(not other.idle for other in account.users.values())
        if share.idle and users:
            grown = account.virtual + seconds / users
            account.virtual = min(grown, max(share.served, account.virtual))
        weights = sum(other.weight for other in self._clients.values() if not other.idle)
        if account.idle and weights:
            grown = self.virtual + seconds / weights
            self.virtual = min(grown, max(account.served, self.virtual))

    def _forget(self, account: _Client) -> None:
        """Forget who is idle and has had no more than others: it would join as if it were new."""
        if not self._entries:
            self._clients.clear()
            self._stale.clear()
            self.virtual = 0.0
            return
        if not account.idle:
            account.users = {
                name: share
                for name, share in account.users.items()
                if not share.idle or share.served > account.virtual
            }
        else:
            self._clients = {
                name: other
                for name, other in self._clients.items()
                if not other.idle or other.served > self.virtual
            }


def _chain(share: _Share) -> Iterator[tuple[float, _Entry]]:
    """The waiting tasks of a user in the order in which they will run, with their tags."""
    tag = share.served
    for entry in sorted(share.waiting, key=lambda entry: -entry.level):
        yield tag, entry
        tag += entry.seconds
