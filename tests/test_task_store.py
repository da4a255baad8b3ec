"""The store of tasks: every verb and its guard, and what was learned."""

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

import pytest
from conftest import GIVE_UP_S
from store_bench import MEASURED, OUTCOME, RUNNING, WAITING, WORK, Bench, ended, opened, params

from storage import file_store, timing_store
from storage.ended_tasks import End
from task import GenerationParams, TaskStatus
from timing_model import Measured, Work


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield from opened(tmp_path / "data")


# -- the verbs and their guards --------------------------------------------------------------------


def test_a_new_task_is_on_disk_with_all_it_was_submitted_with(bench: Bench) -> None:
    bench.waiting("a", priority=1, created_at=1234.5678, client_key="key", sequence=7, group=5)
    row = bench.row("a")
    assert (row["status"], row["priority"], row["attempt"]) == ("waiting", 1, 0)
    assert (row["sequence"], row["group_sequence"], row["interruptions"]) == (7, 5, 0)
    assert (row["created_at"], row["client_key"]) == (1234.5678, "key")
    assert GenerationParams.model_validate_json(row["params"]) == params()
    task = bench.task("a")
    assert (task.params, task.priority, task.status) == (params(), 1, TaskStatus.WAITING)
    assert (task.sequence, task.group) == (7, 5)
    assert (task.started_at, task.ended_at) == (None, None)
    assert (task.image_sizes, task.measured) == ((), ())


@pytest.mark.parametrize(
    "prompt",
    ["quotes ' \" and \\ ; DROP TABLE tasks; --", "\u0000 zero", "Füße 雨 🌧", "x" * 10_000],
)
def test_any_prompt_comes_back_as_it_was(bench: Bench, prompt: str) -> None:
    bench.waiting(params=params(prompt))
    bench.reopen()
    assert bench.task().params == params(prompt)
    assert [task.params.prompt for task in bench.store.unfinished()] == [prompt]


def test_an_id_and_a_client_key_are_taken_once(bench: Bench) -> None:
    bench.waiting("a", client_key="key")
    before = bench.everything()
    with pytest.raises(sqlite3.IntegrityError):
        bench.waiting("a", client_key="other key")
    with pytest.raises(sqlite3.IntegrityError):
        bench.waiting("b", client_key="key")
    assert bench.everything() == before
    bench.waiting("b")  # without a key there may be any number
    bench.waiting("c")
    assert bench.store.find_by_key("key") == "a"
    assert bench.store.find_by_key("never used") is None
    bench.store.free_key("key")
    assert bench.store.find_by_key("key") is None
    bench.waiting("d", client_key="key")
    assert bench.store.find_by_key("key") == "d"


def test_an_id_never_known_is_none(bench: Bench) -> None:
    assert bench.store.find("never known") is None
    assert bench.store.read_image("never known") is None


def test_a_task_is_claimed_only_once(bench: Bench) -> None:
    bench.waiting()
    as_it_waits = bench.task()
    assert bench.store.claim(as_it_waits, started_at=1001.5)
    assert not bench.store.claim(as_it_waits, started_at=5000.0)
    task = bench.task()
    assert (task.status, task.attempt, task.started_at) == (TaskStatus.RUNNING, 1, 1001.5)


def test_of_many_threads_that_claim_the_same_task_one_wins(bench: Bench) -> None:
    tasks = [bench.task(bench.waiting(str(number))) for number in range(10)]
    with ThreadPoolExecutor(8) as threads:
        claims = [
            threads.submit(bench.store.claim, task, started_at=1.0)
            for task in tasks
            for _ in range(4)
        ]
        won = [claim.result() for claim in claims]
    assert [won[start : start + 4].count(True) for start in range(0, 40, 4)] == [1] * 10
    assert all(bench.task(task.task_id).attempt == 1 for task in tasks)


Move = Callable[[Bench, int], bool]
"""A change of the task "task", as it is so many attempts later than it is stored."""


def add_image(bench: Bench, attempts: int, end: End | None) -> bool:
    task = bench.believed(RUNNING, attempts=attempts)
    return bench.store.add_image(task, b"other", [MEASURED], samples=[(WORK, MEASURED)], end=end)


def fail(bench: Bench, attempts: int, was: TaskStatus) -> bool:
    task = bench.believed(was, attempts=attempts)
    return bench.store.fail(task, ended(9.0), code="task_failed", message="no")


def cancel(bench: Bench, attempts: int, was: TaskStatus) -> bool:
    return bench.store.cancel(bench.believed(was, attempts=attempts), ended(9.0))


def release(bench: Bench, attempts: int, interrupted: bool) -> bool:
    task = bench.believed(RUNNING, attempts=attempts)
    return bench.store.release(task, interrupted=interrupted)


MOVES: dict[str, tuple[TaskStatus, Move]] = {
    "claim": (
        WAITING,
        lambda bench, n: bench.store.claim(bench.believed(WAITING, attempts=n), started_at=9.0),
    ),
    "release": (RUNNING, partial(release, interrupted=False)),
    "release interrupted": (RUNNING, partial(release, interrupted=True)),
    "add one of several images": (RUNNING, partial(add_image, end=None)),
    "add the last image": (RUNNING, partial(add_image, end=ended(9.0))),
    "fail running": (RUNNING, partial(fail, was=RUNNING)),
    "fail waiting": (WAITING, partial(fail, was=WAITING)),
    "cancel running": (RUNNING, partial(cancel, was=RUNNING)),
    "cancel waiting": (WAITING, partial(cancel, was=WAITING)),
}


@pytest.mark.parametrize("status", TaskStatus)
@pytest.mark.parametrize("verb", MOVES)
def test_a_verb_moves_a_task_only_from_its_own_status_and_else_changes_nothing(
    bench: Bench, verb: str, status: TaskStatus
) -> None:
    bench.in_status(status)
    bench.done("bystander", b"its image")
    before = bench.everything()
    allowed, move = MOVES[verb]
    assert move(bench, 0) is (status is allowed)
    if status is not allowed:
        assert bench.everything() == before
    assert bench.store.read_image("bystander") == b"its image"


@pytest.mark.parametrize("attempts", [-1, 1])
@pytest.mark.parametrize("verb", MOVES)
def test_a_verb_with_another_attempt_than_the_latest_changes_nothing(
    bench: Bench, verb: str, attempts: int
) -> None:
    bench.running()
    bench.release()
    assert bench.claim()
    if MOVES[verb][0] is WAITING:
        bench.release()
    before = bench.everything()
    assert not MOVES[verb][1](bench, attempts)
    assert bench.everything() == before


@pytest.mark.parametrize("verb", MOVES)
def test_a_verb_on_a_task_never_known_changes_nothing(bench: Bench, verb: str) -> None:
    before = bench.everything()
    assert not MOVES[verb][1](bench, 0)
    assert bench.everything() == before


def test_a_stale_worker_is_refused_and_touches_no_image_of_the_one_that_has_the_task(
    bench: Bench,
) -> None:
    """A claims, is released, B claims: nothing that A says counts, and nothing of it is stored."""
    bench.running(params=params(count=2))
    stale = bench.task()
    assert bench.release(interrupted=True)
    assert bench.claim()
    for image in (b"by B, the first", None):
        before = bench.everything()
        for last in (False, True):
            end = ended() if last else None
            samples = [(WORK, MEASURED)]
            assert not bench.store.add_image(stale, b"by A", [MEASURED], samples=samples, end=end)
        assert not bench.store.fail(stale, ended(), code="task_failed", message="no")
        assert not bench.store.cancel(stale, ended())
        assert not bench.store.release(stale, interrupted=False)
        assert bench.everything() == before
        if image:
            assert bench.add_image(image=image)
    assert bench.finish(image=b"by B, the last")
    assert bench.files() == {"task": b"by B, the first", "task.1": b"by B, the last"}


def test_a_worker_that_is_replaced_while_its_image_is_written_takes_no_file_of_the_other_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.running()
    stale, flush = bench.task(), file_store._flush_to_disk
    written, replaced = Event(), Event()

    def flush_late(descriptor: int) -> None:
        flush(descriptor)
        if not written.is_set():
            written.set()
            assert replaced.wait(GIVE_UP_S)

    monkeypatch.setattr(file_store, "_flush_to_disk", flush_late)
    with ThreadPoolExecutor(2) as threads:
        late = threads.submit(bench.finish_as, stale, b"by A")
        assert written.wait(GIVE_UP_S)
        assert bench.release(interrupted=True)
        assert bench.claim()
        other = threads.submit(bench.finish_as, bench.task(), b"by B")
        replaced.set()
        assert (late.result(GIVE_UP_S), other.result(GIVE_UP_S)) == (False, True)
    assert bench.files() == {"task": b"by B"}
    assert bench.store.read_image("task") == b"by B"


def test_a_cancelled_task_cannot_be_finished_and_leaves_no_image_file(bench: Bench) -> None:
    bench.running()
    as_it_ran = bench.task()
    assert bench.cancel("task")
    assert not bench.finish_as(as_it_ran)
    assert bench.status() is TaskStatus.CANCELLED
    assert bench.files() == {}
    assert bench.store.ended.images() == (0, 0)
    assert bench.store.timings.samples() == []


def test_a_done_task_that_is_finished_again_keeps_its_image(bench: Bench) -> None:
    bench.running()
    as_it_ran = bench.task()
    assert bench.finish_as(as_it_ran, b"the first")
    assert not bench.finish_as(as_it_ran, b"the second")
    assert bench.store.read_image("task") == b"the first"
    bench.reopen()
    assert bench.status() is TaskStatus.DONE


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_released_task_waits_and_its_claim_counts_as_interrupted_only_if_it_was(
    bench: Bench, interrupted: bool
) -> None:
    bench.running()
    assert bench.release(interrupted=interrupted)
    task = bench.task()
    assert (task.status, task.attempt, task.started_at) == (TaskStatus.WAITING, 1, None)
    assert task.interruptions == interrupted
    assert bench.claim(started_at=2000.0)
    assert (bench.task().attempt, bench.task().interruptions) == (2, interrupted)


def test_a_finished_task_has_its_image_its_timings_and_one_sample(bench: Bench) -> None:
    image = bytes(range(256)) * 1000
    bench.done(image=image, ended_at=1099.25)
    task = bench.task()
    assert (task.status, task.ended_at, task.image_sizes) == (
        TaskStatus.DONE,
        1099.25,
        (len(image),),
    )
    assert [measured.to_json() for measured in task.measured] == [MEASURED.to_json()]
    assert bench.store.read_image("task") == image
    assert bench.files() == {"task": image}
    ((work, measured),) = bench.store.timings.samples()
    assert (work, measured.to_json()) == (WORK, MEASURED.to_json())


def test_a_failed_task_has_its_code_and_its_message(bench: Bench) -> None:
    bench.running()
    assert bench.store.fail(bench.task(), ended(7.5), code="task_failed", message="why")
    task = bench.task()
    assert (task.status, task.ended_at) == (TaskStatus.FAILED, 7.5)
    assert (task.error_code, task.error) == ("task_failed", "why")


def test_the_first_time_that_an_image_was_fetched_counts(bench: Bench) -> None:
    bench.done()
    bench.store.ended.mark_fetched("task", 2000.0)
    bench.store.ended.mark_fetched("task", 3000.0)
    assert bench.task().fetched_at == 2000.0
    assert bench.store.ended.fetched_before(2000.0) == []
    assert bench.store.ended.fetched_before(2000.5) == ["task"]


def finish_with(bench: Bench, task_id: str, work: Work, measured: Measured) -> None:
    task, samples = bench.task(task_id), [(work, measured)]
    assert bench.store.add_image(task, b"x", [measured], samples=samples, end=ended(1.0))


def test_only_the_latest_samples_are_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_store, "SAMPLES_KEPT", 3)
    for number in range(8):
        bench.running(str(number))
        measured = Measured(float(number), (), 0.0, 0.0)
        finish_with(bench, str(number), WORK, measured)
    kept = [measured.text_encoding_s for _, measured in bench.store.timings.samples()]
    assert kept == [5.0, 6.0, 7.0]


def test_the_samples_of_one_model_do_not_push_out_those_of_another(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing_store, "SAMPLES_KEPT", 2)
    for number, model in enumerate(
        ["rare", "noise-flux1", "noise-flux1", "rare", "noise-flux1", "noise-flux1"]
    ):
        bench.running(str(number))
        work = replace(WORK, model=model, steps=number)
        finish_with(bench, str(number), work, MEASURED)
    kept = [(work.model, work.steps) for work, _ in bench.store.timings.samples()]
    assert kept == [("rare", 0), ("rare", 3), ("noise-flux1", 4), ("noise-flux1", 5)]


def test_only_the_latest_outcomes_are_kept_in_their_order(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing_store, "SAMPLES_KEPT", 3)
    outcomes = [replace(OUTCOME, priority=number % 2, p90_s=number) for number in range(8)]
    for outcome in outcomes:
        bench.store.timings.keep_outcome(outcome)
    bench.reopen()
    assert bench.store.timings.outcomes() == outcomes[-3:]


def test_the_latest_time_to_load_each_model_is_kept(bench: Bench) -> None:
    bench.store.timings.keep_load("noise-flux1", 3.0)
    bench.store.timings.keep_load("noise-flux1/q8", 1.0)
    bench.store.timings.keep_load("noise-flux1", 2.0)
    bench.store.probe()
    assert bench.store.timings.loads() == {"noise-flux1": 2.0, "noise-flux1/q8": 1.0}
