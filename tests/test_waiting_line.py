"""The waiting line against two plain lists, over thousands of random changes."""

import math
import tracemalloc
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from queueing.waiting_line import Features, WaitingLine
from timing_model import FEATURES, Work

Entry = tuple[str, Features]


class PlainLine:
    """What the line must be equal to: a list for each level, summed up anew at every question."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.levels: dict[bool, list[Entry]] = {True: [], False: []}

    @property
    def entries(self) -> list[Entry]:
        return self.levels[True] + self.levels[False]

    def sums(self, entries: list[Entry]) -> Features:
        return tuple(math.fsum(f[column] for _, f in entries) for column in range(self.width))

    def remove(self, index: int) -> Entry:
        entry = self.entries[index]
        for level in self.levels.values():
            if entry in level:
                level.remove(entry)
        return entry


class Pair:
    """The line and its model, changed together."""

    def __init__(self, width: int) -> None:
        self.line = WaitingLine(width)
        self.plain = PlainLine(width)
        self.submitted = 0

    def join(self, features: Features, *, urgent: bool, at_front: bool = False) -> None:
        self.submitted += 1
        task_id = f"task-{self.submitted}"
        if at_front:
            self.line.insert(task_id, urgent=urgent, features=features, before=None)
            self.plain.levels[urgent].insert(0, (task_id, features))
        else:
            self.line.append(task_id, urgent=urgent, features=features)
            self.plain.levels[urgent].append((task_id, features))

    def leave(self, index: int) -> Entry:
        entry = self.plain.remove(index)
        self.line.remove(entry[0])
        assert entry[0] not in self.line
        return entry

    def change(self, index: int, features: Features) -> None:
        task_id = self.plain.entries[index][0]
        self.line.replace(task_id, features)
        for level in self.plain.levels.values():
            level[:] = [(t, features if t == task_id else f) for t, f in level]

    def claim_and_release(self) -> None:
        """The first one leaves and comes back, as a released task does."""
        urgent = bool(self.plain.levels[True])
        task_id, features = self.leave(0)
        self.line.insert(task_id, urgent=urgent, features=features, before=None)
        self.plain.levels[urgent].insert(0, (task_id, features))

    def check_ends(self) -> None:
        entries = self.plain.entries
        assert len(self.line) == len(entries)
        assert self.line.first() == (entries[0][0] if entries else None)
        for urgent, level in self.plain.levels.items():
            assert self.line.first(urgent=urgent) == (level[0][0] if level else None)
            assert self.line.last(urgent=urgent) == (level[-1][0] if level else None)
        assert self.line.urgent == len(self.plain.levels[True])
        assert_near(self.line.total(), self.plain.sums(entries))
        urgent_sums = self.plain.sums(self.plain.levels[True])
        assert_near(self.line.total(urgent_only=True), urgent_sums)

    def check_one(self, index: int) -> None:
        entries = self.plain.entries
        task_id = entries[index][0]
        assert task_id in self.line
        count, sums = self.line.ahead_of(task_id)
        assert count == index
        assert_near(sums, self.plain.sums(entries[:index]))

    def check_all(self) -> None:
        self.check_ends()
        entries = self.plain.entries
        assert list(self.line) == [task_id for task_id, _ in entries]
        running = [0.0] * self.plain.width
        for index, (task_id, features) in enumerate(entries):
            count, sums = self.line.ahead_of(task_id)
            assert count == index
            assert_near(sums, tuple(running))
            running = [a + b for a, b in zip(running, features, strict=True)]
        for level in self.plain.levels.values():
            ids = [task_id for task_id, _ in level]
            beside = zip([None, *ids], [*ids[1:], None], strict=False)
            assert [self.line.neighbours(task_id) for task_id in ids] == list(beside)[: len(ids)]


def assert_near(found: Features, expected: Features) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-6), (found, expected)


feature = st.floats(0, 1000, allow_subnormal=False)
changes = st.one_of(
    st.tuples(st.just("append"), st.booleans(), feature, st.integers(1, 60)),
    st.tuples(st.just("put back"), st.booleans(), feature, st.integers(1, 2)),
    st.tuples(st.just("claim"), st.integers(1, 100)),
    st.tuples(st.just("cancel"), st.lists(st.floats(0, 1, exclude_max=True), max_size=40)),
    st.tuples(st.just("change"), st.floats(0, 1, exclude_max=True), feature),
    st.just(("claim and release",)),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(changes, min_size=5, max_size=25))
def test_after_any_changes_the_line_equals_two_plain_lists(
    wanted: list[tuple[object, ...]],
) -> None:
    pair = Pair(2)
    for change in wanted:
        match change:
            case ("append" | "put back" as how, bool(urgent), float(value), int(count)):
                for number in range(count):
                    features = (value, float(number))
                    pair.join(features, urgent=urgent, at_front=how == "put back")
            case ("claim", int(count)):
                for _ in range(min(count, len(pair.line))):
                    pair.leave(0)
            case ("cancel", list(places)):
                for place in places:
                    if len(pair.line):
                        pair.leave(int(place * len(pair.line)))
            case ("change", float(place), float(value)) if len(pair.line):
                pair.change(int(place * len(pair.line)), (value, 1.0))
            case ("claim and release",) if len(pair.line):
                pair.claim_and_release()
        pair.check_all()


@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_after_thousands_of_changes_the_line_still_equals_two_plain_lists(seed: int) -> None:
    random, pair = Random(seed), Pair(FEATURES)
    for number in range(4000):
        filling = number // 500 % 2 == 0  # it grows long and runs empty, in turns
        dice = random.random()
        if not len(pair.line) or dice < (0.7 if filling else 0.3):
            features = tuple(random.uniform(0, 1000) for _ in range(FEATURES))
            pair.join(features, urgent=random.random() < 0.3)
        elif dice < 0.702:  # rare, because it rebuilds the level: appending shall do so, too
            pair.claim_and_release()
        elif dice < 0.75:
            features = tuple(random.uniform(0, 1000) for _ in range(FEATURES))
            pair.change(random.randrange(len(pair.line)), features)
        elif dice < 0.87:
            pair.leave(0)
        else:
            pair.leave(random.randrange(len(pair.line)))
        if len(pair.line):
            pair.check_one(random.randrange(len(pair.line)))
        if number % 100 == 0:
            pair.check_all()
    pair.check_all()


tasks = st.tuples(st.integers(1, 2048 * 2048 // 256), st.integers(1, 100), st.booleans())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(tasks, min_size=1, max_size=150), st.randoms(use_true_random=False))
def test_the_sums_of_real_tasks_are_exact_and_never_fall_below_zero(
    wanted: list[tuple[int, int, bool]], random: Random
) -> None:
    pair = Pair(FEATURES)
    for tokens, steps, urgent in wanted:
        work = Work("tiny", 0.001, tokens, steps, "PNG")
        pair.join(work.features, urgent=urgent)
    pair.change(len(wanted) // 2, Work("tiny", 0.001, 16384, 100, "PNG").features)
    while len(pair.line):
        entries = pair.plain.entries
        assert pair.line.total() == pair.plain.sums(entries)
        for index in {0, len(entries) // 2, len(entries) - 1}:
            ahead = pair.plain.sums(entries[:index])
            assert pair.line.ahead_of(entries[index][0]) == (index, ahead)
        pair.leave(random.randrange(len(entries)))
    assert pair.line.total() == (0.0,) * FEATURES


def test_an_empty_line_has_no_first_and_no_sums() -> None:
    line = WaitingLine(3)
    assert len(line) == 0
    assert list(line) == []
    assert line.first() is line.first(urgent=False) is line.last(urgent=True) is None
    assert line.urgent == 0
    assert line.total() == line.total(urgent_only=True) == (0.0, 0.0, 0.0)


def test_urgent_tasks_stand_first_and_count_into_what_is_ahead_of_the_others() -> None:
    line = WaitingLine(1)
    line.append("normal", urgent=False, features=(10.0,))
    line.append("urgent", urgent=True, features=(1.0,))
    line.append("urgent too", urgent=True, features=(2.0,))
    line.append("normal too", urgent=False, features=(20.0,))
    assert list(line) == ["urgent", "urgent too", "normal", "normal too"]
    assert line.ahead_of("urgent") == (0, (0.0,))
    assert line.ahead_of("urgent too") == (1, (1.0,))
    assert line.ahead_of("normal") == (2, (3.0,))
    assert line.ahead_of("normal too") == (3, (13.0,))
    assert line.total() == (33.0,)
    assert line.total(urgent_only=True) == (3.0,)


def test_each_level_knows_its_ends_and_who_stands_beside_whom() -> None:
    line = WaitingLine(0)
    for task_id in ("a", "b", "c"):
        line.append(task_id, urgent=False, features=())
    line.append("urgent", urgent=True, features=())
    line.remove("b")
    line.insert("released", urgent=False, features=(), before=None)
    assert line.urgent == 1
    assert (line.first(urgent=True), line.last(urgent=True)) == ("urgent", "urgent")
    assert (line.first(urgent=False), line.last(urgent=False)) == ("released", "c")
    assert line.neighbours("urgent") == (None, None)
    assert line.neighbours("released") == (None, "a")
    assert line.neighbours("a") == ("released", "c")
    assert line.neighbours("c") == ("a", None)


def test_a_task_with_other_features_keeps_its_place() -> None:
    line = WaitingLine(1)
    for task_id in ("a", "b", "c"):
        line.append(task_id, urgent=False, features=(1.0,))
    line.replace("b", (5.0,))
    assert list(line) == ["a", "b", "c"]
    assert [line.ahead_of(task_id) for task_id in line] == [(0, (0.0,)), (1, (1.0,)), (2, (6.0,))]
    assert line.total() == (7.0,)


def test_a_task_that_leaves_moves_up_only_those_behind_it() -> None:
    line = WaitingLine(1)
    for number in range(5):
        line.append(str(number), urgent=False, features=(2.0**number,))
    line.remove("2")
    assert list(line) == ["0", "1", "3", "4"]
    assert line.ahead_of("1") == (1, (1.0,))
    assert line.ahead_of("3") == (2, (3.0,))
    assert line.ahead_of("4") == (3, (11.0,))


def test_a_task_that_is_put_back_stands_before_its_level_and_behind_the_urgent_ones() -> None:
    line = WaitingLine(1)
    line.append("urgent", urgent=True, features=(1.0,))
    line.append("normal", urgent=False, features=(2.0,))
    line.insert("released", urgent=False, features=(4.0,), before=None)
    assert list(line) == ["urgent", "released", "normal"]
    assert line.ahead_of("released") == (1, (1.0,))
    assert line.ahead_of("normal") == (2, (5.0,))
    line.insert("released and urgent", urgent=True, features=(8.0,), before=None)
    assert line.first() == "released and urgent"
    assert line.ahead_of("urgent") == (1, (8.0,))


def test_a_line_that_most_have_left_keeps_the_rest_in_order_when_the_next_joins() -> None:
    line = WaitingLine(1)
    for number in range(300):
        line.append(str(number), urgent=False, features=(float(number),))
    kept = [str(number) for number in range(0, 300, 50)]
    for number in range(300):
        if str(number) not in kept:
            line.remove(str(number))
    line.append("next", urgent=False, features=(1.0,))
    assert list(line) == [*kept, "next"]
    assert line.ahead_of("250") == (5, (0.0 + 50 + 100 + 150 + 200,))
    assert line.ahead_of("next") == (6, (750.0,))


def test_the_same_task_may_leave_and_join_again() -> None:
    line = WaitingLine(1)
    for _ in range(200):
        line.append("again", urgent=False, features=(3.0,))
        assert line.ahead_of("again") == (0, (0.0,))
        assert line.total() == (3.0,)
        line.remove("again")
        assert "again" not in line


def test_a_task_that_does_not_wait_cannot_be_asked_for_or_removed() -> None:
    line = WaitingLine(1)
    line.append("waits", urgent=False, features=(1.0,))
    line.append("left", urgent=True, features=(1.0,))
    line.remove("left")
    for stranger in ("left", "never there"):
        assert stranger not in line
        with pytest.raises(KeyError):
            line.ahead_of(stranger)
        with pytest.raises(KeyError):
            line.neighbours(stranger)
        with pytest.raises(KeyError):
            line.replace(stranger, (1.0,))
        with pytest.raises(KeyError):
            line.remove(stranger)
    assert line.total() == (1.0,)


def test_a_line_that_stays_short_takes_no_more_memory_however_many_pass_through() -> None:
    line = WaitingLine(FEATURES)

    def pass_through(first: int, count: int) -> None:
        for number in range(first, first + count):
            line.append(f"{number:08}", urgent=False, features=(1.0,) * FEATURES)
            if number >= 10:
                line.remove(f"{number - 10:08}")

    pass_through(0, 1000)
    tracemalloc.start()
    try:
        pass_through(1000, 5000)
        assert tracemalloc.get_traced_memory()[0] < 50_000
    finally:
        tracemalloc.stop()
    assert len(line) == 10
    assert line.ahead_of(f"{5999:08}") == (9, (9.0,) * FEATURES)
