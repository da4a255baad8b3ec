"""The store on a real disk: every verb and its guard, reopening, crashes, refusals.

Rows are read back through a connection of their own, pictures through the folder, so that what is
seen is what is on disk. A refusing disk is made with means of the system (a limit of file size, a
folder in the way) or of SQLite (a connection that may not write, a database that may not grow).
"""

import errno
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, clean_environment, params_for

from errors import StorageUnavailable, StoreError
from storage import database, file_store, timing_store
from storage.database import MIGRATIONS
from storage.stored_task import StoredTask, Tombstone
from storage.task_store import TaskStore
from task import GenerationParams, TaskStatus
from timing_model import Measured, Outcome, Work

WORK = Work(model="tiny", parameters_b=0.001, tokens=4096, steps=4, format="PNG")
MEASURED = Measured(
    text_encoding_s=0.1, step_s=(0.7, 0.3, 1 / 3), decoding_s=2.5, image_encoding_s=0.0
)
OUTCOME = Outcome(urgent=True, forecast_s=2.5, p90_s=4.0, actual_s=1 / 3)
SECRET = "a prompt that nobody else shall read"
REMOVED = "The image was removed."
RUNNING, WAITING = TaskStatus.RUNNING, TaskStatus.WAITING


def params(prompt: str = SECRET) -> GenerationParams:
    return params_for(prompt, seed=2**64 - 1, width=1024, height=1024, guidance=3.5)


@dataclass
class Bench:
    """A store in a folder, with short names for what tests do again and again."""

    folder: Path
    store: TaskStore = field(init=False)

    def __post_init__(self) -> None:
        self.store = TaskStore(self.folder)

    @property
    def database(self) -> Path:
        return self.folder / "tasks.sqlite3"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def reopen(self) -> None:
        self.store.close()
        self.store = TaskStore(self.folder)

    def row(self, task_id: str) -> dict[str, Any] | None:
        """What is on disk for this task."""
        with closing(sqlite3.connect(self.database)) as database:
            database.row_factory = sqlite3.Row
            row = database.execute("SELECT * FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
        return dict(row) if row else None

    def everything(self) -> dict[str, Any]:
        """All tables, and all pictures."""
        with closing(sqlite3.connect(self.database)) as database:
            tables = {
                name: database.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall()
                for name in ("tasks", "samples", "loads", "outcomes")
            }
        return {**tables, "images": self.files()}

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.images.iterdir()}

    def waiting(self, task_id: str = "task", **options: Any) -> str:
        values = {"urgent": False, "created_at": 1000.5, **options}
        self.store.insert(task_id, values.pop("params", params()), **values)
        return task_id

    def running(self, task_id: str = "task", **options: Any) -> str:
        self.waiting(task_id, **options)
        assert self.store.claim(task_id, started_at=1001.5)
        return task_id

    def finish(self, task_id: str, image: bytes = b"image", ended_at: float = 1002.5) -> bool:
        return self.store.finish(task_id, [image], ended_at=ended_at, samples=[(WORK, MEASURED)])

    def fail(self, task_id: str, was: TaskStatus = RUNNING) -> bool:
        return self.store.fail(task_id, was, code="task_failed", message="no", ended_at=1002.5)

    def cancel(self, task_id: str, was: TaskStatus = RUNNING) -> bool:
        return self.store.cancel(task_id, was, ended_at=1002.5)

    def done(
        self,
        task_id: str = "task",
        image: bytes = b"image",
        ended_at: float = 1002.5,
        **options: Any,
    ) -> str:
        self.running(task_id, **options)
        assert self.finish(task_id, image, ended_at)
        return task_id

    def in_status(self, status: TaskStatus, task_id: str = "task") -> str:
        match status:
            case TaskStatus.WAITING:
                return self.waiting(task_id)
            case TaskStatus.RUNNING:
                return self.running(task_id)
            case TaskStatus.DONE:
                return self.done(task_id)
            case TaskStatus.FAILED:
                self.running(task_id)
                assert self.fail(task_id)
            case TaskStatus.CANCELLED:
                self.running(task_id)
                assert self.cancel(task_id)
        return task_id

    def status(self, task_id: str = "task") -> TaskStatus:
        return self.found(task_id).status

    def found(self, task_id: str = "task") -> StoredTask:
        task = self.store.find(task_id)
        assert isinstance(task, StoredTask)
        return task

    # -- a disk that refuses ----------------------------------------------------------------------

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Every write to the database fails, as on a disk that was remounted read-only."""
        self.store._database.connection.execute("PRAGMA query_only = ON")
        try:
            yield
        finally:
            self.store._database.connection.execute("PRAGMA query_only = OFF")

    @contextmanager
    def full(self) -> Iterator[None]:
        """The database cannot grow any more."""
        connection = self.store._database.connection
        limit = connection.execute("PRAGMA max_page_count").fetchone()[0]
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        try:
            yield
        finally:
            connection.execute(f"PRAGMA max_page_count = {limit}")

    @contextmanager
    def no_images_folder(self) -> Iterator[None]:
        """Something else stands where the folder was."""
        aside = self.folder / "images aside"
        self.images.rename(aside)
        self.images.write_bytes(b"")
        try:
            yield
        finally:
            self.images.unlink()
            aside.rename(self.images)


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """The system lets no file of this process grow beyond this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "data")
    yield bench
    bench.store.close()


# -- the verbs and their guards --------------------------------------------------------------------


def test_a_new_task_is_on_disk_with_all_it_was_submitted_with(bench: Bench) -> None:
    bench.waiting("a", urgent=True, created_at=1234.5678, client_key="key")
    row = bench.row("a")
    assert row is not None
    assert (row["status"], row["urgent"], row["attempts"]) == ("waiting", 1, 0)
    assert (row["created_at"], row["client_key"]) == (1234.5678, "key")
    assert GenerationParams.model_validate_json(row["params"]) == params()
    task = bench.found("a")
    assert (task.params, task.urgent, task.status) == (params(), True, TaskStatus.WAITING)
    assert (task.started_at, task.ended_at) == (None, None)
    assert (task.image_sizes, task.measured) == ((), ())


@pytest.mark.parametrize(
    "prompt",
    ["quotes ' \" and \\ ; DROP TABLE tasks; --", "\u0000 zero", "Füße 雨 🌧", "x" * 10_000],
)
def test_any_prompt_comes_back_as_it_was(bench: Bench, prompt: str) -> None:
    bench.waiting(params=params(prompt))
    bench.reopen()
    assert bench.found().params == params(prompt)
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
    assert bench.store.claim("task", started_at=1001.5)
    assert not bench.store.claim("task", started_at=5000.0)
    task = bench.found()
    assert (task.status, task.attempts, task.started_at) == (TaskStatus.RUNNING, 1, 1001.5)


def test_of_many_threads_that_claim_the_same_task_one_wins(bench: Bench) -> None:
    ids = [bench.waiting(str(number)) for number in range(10)]
    with ThreadPoolExecutor(8) as threads:
        claims = [
            threads.submit(bench.store.claim, task_id, started_at=1.0)
            for task_id in ids
            for _ in range(4)
        ]
        won = [claim.result() for claim in claims]
    assert [won[start : start + 4].count(True) for start in range(0, 40, 4)] == [1] * 10
    assert all(bench.found(task_id).attempts == 1 for task_id in ids)


MOVES: dict[str, tuple[set[TaskStatus], Callable[[Bench], bool]]] = {
    "claim": ({WAITING}, lambda bench: bench.store.claim("task", started_at=9.0)),
    "release": ({RUNNING}, lambda bench: bench.store.release("task", count_attempt=False)),
    "finish": ({RUNNING}, lambda bench: bench.finish("task", b"other image", 9.0)),
    "fail running": ({RUNNING}, lambda bench: bench.fail("task", RUNNING)),
    "fail waiting": ({WAITING}, lambda bench: bench.fail("task", WAITING)),
    "cancel running": ({RUNNING}, lambda bench: bench.cancel("task", RUNNING)),
    "cancel waiting": ({WAITING}, lambda bench: bench.cancel("task", WAITING)),
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
    assert move(bench) is (status in allowed)
    if status not in allowed:
        assert bench.everything() == before
    assert bench.store.read_image("bystander") == b"its image"


@pytest.mark.parametrize("verb", MOVES)
def test_a_verb_on_a_task_never_known_changes_nothing(bench: Bench, verb: str) -> None:
    before = bench.everything()
    assert not MOVES[verb][1](bench)
    assert bench.everything() == before


def test_a_cancelled_task_cannot_be_finished_and_leaves_no_image_file(bench: Bench) -> None:
    bench.running()
    assert bench.cancel("task")
    assert not bench.finish("task")
    assert bench.status() is TaskStatus.CANCELLED
    assert bench.files() == {}
    assert bench.store.images() == (0, 0)
    assert bench.store.timings.samples() == []


def test_a_done_task_that_is_finished_again_keeps_its_image(bench: Bench) -> None:
    bench.done(image=b"the first")
    assert not bench.finish("task", b"the second")
    assert bench.store.read_image("task") == b"the first"
    bench.reopen()
    assert bench.status() is TaskStatus.DONE


@pytest.mark.parametrize(("count_attempt", "attempts"), [(True, 1), (False, 0)])
def test_a_released_task_waits_and_its_attempt_counts_only_if_asked(
    bench: Bench, count_attempt: bool, attempts: int
) -> None:
    bench.running()
    assert bench.store.release("task", count_attempt=count_attempt)
    task = bench.found()
    assert (task.status, task.attempts, task.started_at) == (TaskStatus.WAITING, attempts, None)
    assert bench.store.claim("task", started_at=2000.0)
    assert bench.found().attempts == attempts + 1


def test_a_finished_task_has_its_image_its_timings_and_one_sample(bench: Bench) -> None:
    image = bytes(range(256)) * 1000
    bench.done(image=image, ended_at=1099.25)
    task = bench.found()
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
    assert bench.store.fail("task", RUNNING, code="task_failed", message="why", ended_at=7.5)
    task = bench.found()
    assert (task.status, task.ended_at) == (TaskStatus.FAILED, 7.5)
    assert (task.error_code, task.error) == ("task_failed", "why")


def test_the_first_time_that_an_image_was_fetched_counts(bench: Bench) -> None:
    bench.done()
    bench.store.mark_fetched("task", 2000.0)
    bench.store.mark_fetched("task", 3000.0)
    assert bench.found().fetched_at == 2000.0
    assert bench.store.fetched_before(2000.0) == []
    assert bench.store.fetched_before(2000.5) == ["task"]


def test_only_the_latest_samples_are_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_store, "SAMPLES_KEPT", 3)
    for number in range(8):
        bench.running(str(number))
        measured = Measured(float(number), (), 0.0, 0.0)
        assert bench.store.finish(str(number), [b"x"], ended_at=1.0, samples=[(WORK, measured)])
    kept = [measured.text_encoding_s for _, measured in bench.store.timings.samples()]
    assert kept == [5.0, 6.0, 7.0]


def test_the_samples_of_one_model_do_not_push_out_those_of_another(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing_store, "SAMPLES_KEPT", 2)
    for number, model in enumerate(["rare", "tiny", "tiny", "rare", "tiny", "tiny"]):
        bench.running(str(number))
        work = replace(WORK, model=model, steps=number)
        assert bench.store.finish(str(number), [b"x"], ended_at=1.0, samples=[(work, MEASURED)])
    kept = [(work.model, work.steps) for work, _ in bench.store.timings.samples()]
    assert kept == [("rare", 0), ("rare", 3), ("tiny", 4), ("tiny", 5)]


def test_only_the_latest_outcomes_are_kept_in_their_order(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing_store, "SAMPLES_KEPT", 3)
    outcomes = [replace(OUTCOME, urgent=number % 2 == 0, p90_s=number) for number in range(8)]
    for outcome in outcomes:
        bench.store.timings.keep_outcome(outcome)
    bench.reopen()
    assert bench.store.timings.outcomes() == outcomes[-3:]


def test_the_latest_time_to_load_each_model_is_kept(bench: Bench) -> None:
    bench.store.timings.keep_load("tiny", 3.0)
    bench.store.timings.keep_load("tiny/q8", 1.0)
    bench.store.timings.keep_load("tiny", 2.0)
    bench.store.probe()
    assert bench.store.timings.loads() == {"tiny": 2.0, "tiny/q8": 1.0}


# -- dropping --------------------------------------------------------------------------------------


def test_a_dropped_task_leaves_its_reason_and_nothing_of_what_was_asked(bench: Bench) -> None:
    bench.done("a", client_key="key")
    bench.store.drop("a", "It has expired.")
    found = bench.store.find("a")
    assert isinstance(found, Tombstone)
    assert found == "It has expired."
    row = bench.row("a")
    assert row is not None
    assert (row["params"], row["measured"], row["image_bytes"]) == (None, None, None)
    assert SECRET not in str(row)
    assert bench.files() == {}
    assert bench.store.images() == (0, 0)
    assert bench.store.find_by_key("key") == "a"
    bench.reopen()
    assert bench.store.find("a") == "It has expired."


@pytest.mark.parametrize("status", [TaskStatus.FAILED, TaskStatus.CANCELLED])
def test_what_has_no_image_can_be_dropped_as_well(bench: Bench, status: TaskStatus) -> None:
    bench.in_status(status)
    bench.store.drop("task", "why")
    assert bench.store.find("task") == "why"


def test_a_dropped_task_is_not_dropped_again_by_its_age(bench: Bench) -> None:
    bench.done(ended_at=10.0)
    bench.store.mark_fetched("task", 11.0)
    bench.store.drop("task", "why")
    assert bench.store.ended_before(100.0) == []
    assert bench.store.fetched_before(100.0) == []
    assert bench.store.oldest_images_over(0) == []


def test_a_tombstone_goes_after_its_time_and_then_the_id_is_unknown(bench: Bench) -> None:
    for task_id, ended_at in (("old", 10.0), ("young", 20.0)):
        bench.done(task_id, ended_at=ended_at, client_key=f"key of {task_id}")
        bench.store.drop(task_id, "why")
    bench.done("old but there", ended_at=10.0)
    bench.waiting("waits", created_at=1.0)
    bench.store.remove_tombstones(10.0)
    assert bench.store.find("old") == "why"
    bench.store.remove_tombstones(15.0)
    assert bench.store.find("old") is None
    assert bench.store.find_by_key("key of old") is None
    assert bench.store.find("young") == "why"
    assert bench.status("old but there") is TaskStatus.DONE
    assert bench.status("waits") is TaskStatus.WAITING


def test_the_order_of_submission_goes_on_when_the_latest_row_was_removed(bench: Bench) -> None:
    bench.waiting("first")
    latest = bench.found(bench.done("latest", ended_at=1.0)).number
    bench.store.drop("latest", "why")
    bench.store.remove_tombstones(2.0)
    bench.reopen()
    assert bench.found(bench.waiting("next")).number > latest


def test_tasks_are_old_by_their_end_and_only_when_they_have_ended(bench: Bench) -> None:
    bench.waiting("waiting")
    bench.running("running")
    bench.done("done", ended_at=10.0)
    bench.done("younger", ended_at=20.0)
    for status in (TaskStatus.FAILED, TaskStatus.CANCELLED):
        bench.in_status(status, status.value)  # they ended at 1002.5
    assert bench.store.ended_before(10.0) == []
    assert bench.store.ended_before(20.0) == ["done"]
    assert sorted(bench.store.ended_before(2000.0)) == ["cancelled", "done", "failed", "younger"]


def test_the_oldest_images_go_until_the_rest_fits_and_the_newest_always_stays(bench: Bench) -> None:
    sizes = {"a": 10, "b": 20, "c": 30, "d": 40}
    for number, (task_id, size) in enumerate(sizes.items()):
        bench.done(task_id, b"x" * size, ended_at=100.0 - number)  # d ended first
    assert bench.store.images() == (4, 100)
    expected = {1000: "", 100: "", 99: "d", 60: "d", 59: "cd", 30: "cd", 29: "bcd", 10: "bcd"}
    for keep_bytes, gone in {**expected, 9: "bcd", 0: "bcd"}.items():
        assert "".join(sorted(bench.store.oldest_images_over(keep_bytes))) == gone, keep_bytes


def test_images_that_ended_at_the_same_time_go_in_the_order_of_submission(bench: Bench) -> None:
    for task_id in "abc":
        bench.done(task_id, b"x" * 10, ended_at=50.0)
    assert sorted(bench.store.oldest_images_over(10)) == ["a", "b"]


# -- reopening -------------------------------------------------------------------------------------


def fill(bench: Bench) -> dict[str, Any]:
    """Something of everything; returns what the store says about it."""
    bench.store.timings.keep_load("tiny", 2.5)
    bench.store.timings.keep_outcome(OUTCOME)
    for number, urgent in enumerate([False, True, False, True, False]):
        bench.waiting(f"waiting {number}", urgent=urgent, client_key=f"key {number}")
    bench.running("running", urgent=False)
    bench.running("running urgently", urgent=True)
    bench.done("done", b"a picture", client_key="done key")
    bench.store.mark_fetched(bench.done("fetched", b"another picture"), 1500.0)
    for status in (TaskStatus.FAILED, TaskStatus.CANCELLED):
        bench.in_status(status, status.value)
    bench.store.drop(bench.done("dropped"), "why")
    return told(bench)


def told(bench: Bench) -> dict[str, Any]:
    with closing(sqlite3.connect(bench.database)) as database:
        ids = [row[0] for row in database.execute("SELECT task_id FROM tasks")]
    keys = [f"key {number}" for number in range(5)] + ["done key", "never used"]
    return {
        "tasks": {task_id: bench.store.find(task_id) for task_id in ids},
        "unfinished": [task.task_id for task in bench.store.unfinished()],
        "images": {task_id: bench.store.read_image(task_id) for task_id in ids},
        "sums": bench.store.images(),
        "samples": bench.store.timings.samples(),
        "loads": bench.store.timings.loads(),
        "outcomes": bench.store.timings.outcomes(),
        "keys": {key: bench.store.find_by_key(key) for key in keys},
    }


def test_unfinished_tasks_are_urgent_first_then_in_the_order_of_submission(bench: Bench) -> None:
    filled = fill(bench)
    urgent = ["waiting 1", "waiting 3", "running urgently"]
    assert filled["unfinished"] == [*urgent, "waiting 0", "waiting 2", "waiting 4", "running"]
    bench.store.release("running", count_attempt=True)
    assert bench.store.claim("waiting 2", started_at=1.0)
    assert told(bench)["unfinished"] == filled["unfinished"]


def test_a_store_that_was_closed_opens_with_all_it_had(bench: Bench) -> None:
    before, rows = fill(bench), bench.everything()
    for _ in range(2):
        bench.reopen()
        assert told(bench) == before
        assert bench.everything() == rows


def test_a_store_that_was_never_closed_opens_with_all_it_had(bench: Bench, tmp_path: Path) -> None:
    before, rows = fill(bench), bench.everything()
    snapshot = tmp_path / "as the disk was"  # shared memory does not survive the process
    shutil.copytree(bench.folder, snapshot, ignore=shutil.ignore_patterns("*-shm"))
    assert (snapshot / "tasks.sqlite3-wal").stat().st_size > 0
    restarted = Bench(snapshot)
    try:
        assert told(restarted) == before
        assert restarted.everything() == rows
    finally:
        restarted.store.close()


def test_every_change_is_written_through_to_the_disk(bench: Bench) -> None:
    def pragma(name: str) -> Any:
        return bench.store._database.connection.execute(f"PRAGMA {name}").fetchone()[0]

    bench.running()  # a claim need not be synced, all that comes after it is
    assert pragma("journal_mode") == "wal"
    assert pragma("synchronous") == 2  # FULL
    assert pragma("fullfsync") == pragma("checkpoint_fullfsync") == 1


def test_a_store_in_memory_does_the_same() -> None:
    store = TaskStore(None)
    finish = partial(store.finish, ended_at=2.0, samples=[(WORK, MEASURED)])
    for task_id in ("done", "cancelled"):
        store.insert(task_id, params(), urgent=False, created_at=1.0)
        assert store.claim(task_id, started_at=1.5)
    assert store.cancel("cancelled", RUNNING, ended_at=2.0)
    assert finish("done", [b"image"])
    assert not finish("cancelled", [b"image"])
    assert store.read_image("done") == b"image"
    assert store.read_image("cancelled") is None
    assert store.images() == (1, 5)
    store.drop("done", "why")
    assert store.read_image("done") is None
    assert store.find("done") == "why"
    store.close()


# -- an image is complete on disk before its task is done ------------------------------------------


def test_the_image_is_synced_and_renamed_and_its_folder_synced_before_the_task_is_done(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, seen = b"x" * 100_000, []
    flush, sync_folder = file_store._flush_to_disk, file_store._sync_folder

    def see_flush(descriptor: int) -> None:
        flush(descriptor)
        assert os.fstat(descriptor).st_size == len(image)
        seen.append("file synced")

    def see_sync(folder: Path) -> None:
        assert bench.files() == {"task": image}
        sync_folder(folder)
        seen.append("folder synced")

    def see_statement(statement: str) -> None:
        if statement == "COMMIT":
            seen.append("committed")

    bench.running()
    monkeypatch.setattr(file_store, "_flush_to_disk", see_flush)
    monkeypatch.setattr(file_store, "_sync_folder", see_sync)
    bench.store._database.connection.set_trace_callback(see_statement)
    assert bench.finish("task", image)
    assert seen == ["file synced", "folder synced", "committed"]


def assert_nothing_is_done(bench: Bench) -> None:
    assert bench.status() is TaskStatus.RUNNING
    assert bench.files() == {}
    assert bench.store.images() == (0, 0)
    assert bench.store.timings.samples() == []


def assert_it_can_be_finished_now(bench: Bench) -> None:
    assert bench.finish("task", b"image")
    assert bench.files() == {"task": b"image"}
    assert bench.status() is TaskStatus.DONE
    assert len(bench.store.timings.samples()) == 1


def test_an_image_that_finds_no_room_leaves_its_task_running_and_no_file(bench: Bench) -> None:
    bench.running()
    with files_end_at(200_000), pytest.raises(StorageUnavailable, match="cannot be written"):
        bench.finish("task", b"x" * 300_000)
    assert_nothing_is_done(bench)
    assert_it_can_be_finished_now(bench)


def test_an_image_that_cannot_be_synced_leaves_its_task_running_and_no_file(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.running()
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(file_store, "_flush_to_disk", lambda descriptor: raise_(full))
        with pytest.raises(StorageUnavailable, match="No space left"):
            bench.finish("task")
    assert_nothing_is_done(bench)
    assert_it_can_be_finished_now(bench)


def test_an_image_whose_folder_cannot_be_synced_leaves_its_task_running_and_no_file(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.running()
    with monkeypatch.context() as patch:
        broken = OSError(errno.EIO, "Input/output error")
        patch.setattr(file_store, "_sync_folder", lambda folder: raise_(broken))
        with pytest.raises(StorageUnavailable, match="Input/output error"):
            bench.finish("task")
    assert_nothing_is_done(bench)
    assert_it_can_be_finished_now(bench)


def test_an_image_that_cannot_be_renamed_leaves_its_task_running_and_no_draft(bench: Bench) -> None:
    bench.running()
    in_the_way = bench.images / "task"
    in_the_way.mkdir()
    with pytest.raises(StorageUnavailable):
        bench.finish("task")
    assert [path.name for path in bench.images.iterdir()] == ["task"]
    in_the_way.rmdir()
    assert_nothing_is_done(bench)
    assert_it_can_be_finished_now(bench)


def test_an_image_without_a_folder_leaves_its_task_running(bench: Bench) -> None:
    bench.running()
    with bench.no_images_folder(), pytest.raises(StorageUnavailable):
        bench.finish("task")
    assert_nothing_is_done(bench)
    assert_it_can_be_finished_now(bench)


def test_a_database_that_refuses_after_the_image_was_written_leaves_no_file(bench: Bench) -> None:
    bench.running()
    with bench.read_only(), pytest.raises(StorageUnavailable):
        bench.finish("task")
    assert_nothing_is_done(bench)
    assert_it_can_be_finished_now(bench)


def raise_(error: Exception) -> None:
    raise error


# -- what a crash leaves ---------------------------------------------------------------------------


def test_files_without_a_done_task_are_removed_at_the_next_start(bench: Bench) -> None:
    bench.done("done", b"kept")
    bench.running("running")
    bench.waiting("waiting")
    bench.store.drop(bench.done("dropped"), "why")
    bench.in_status(TaskStatus.CANCELLED, "cancelled")
    strays = ["half.part", "running.part", "running", "waiting", "dropped", "cancelled", "unknown"]
    for name in strays:
        (bench.images / name).write_bytes(b"stray")
    bench.reopen()
    assert bench.files() == {"done": b"kept"}
    assert bench.status("running") is TaskStatus.RUNNING
    assert bench.store.read_image("running") is None
    assert bench.store.claim("waiting", started_at=1.0)


def test_a_done_task_without_its_file_is_gone_at_the_next_start(bench: Bench) -> None:
    bench.done("lost", b"lost")
    bench.done("kept", b"kept")
    (bench.images / "lost").unlink()
    assert bench.store.read_image("lost") is None
    bench.reopen()
    found = bench.store.find("lost")
    assert isinstance(found, Tombstone)
    assert found == REMOVED
    assert bench.store.images() == (1, 4)
    assert bench.store.read_image("kept") == b"kept"


def test_the_images_folder_comes_back_at_the_next_start(bench: Bench) -> None:
    bench.done()
    shutil.rmtree(bench.images)
    bench.reopen()
    assert bench.store.find("task") == REMOVED
    bench.done("next")
    assert bench.store.read_image("next") == b"image"


# -- the schema ------------------------------------------------------------------------------------


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("PRAGMA user_version").fetchone()[0])


def set_up(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for statement in statements:
            database.execute(statement)


def test_the_version_of_the_schema_is_the_number_of_migrations(bench: Bench) -> None:
    assert version_of(bench.database) == len(MIGRATIONS)
    bench.reopen()
    assert version_of(bench.database) == len(MIGRATIONS)


def test_a_database_of_version_0_is_brought_forward(tmp_path: Path) -> None:
    set_up(tmp_path / "tasks.sqlite3", "PRAGMA journal_mode = DELETE", "PRAGMA user_version = 0")
    bench = Bench(tmp_path)
    assert version_of(bench.database) == len(MIGRATIONS)
    before = fill(bench)
    bench.reopen()
    assert told(bench) == before
    bench.store.close()


def test_a_database_of_version_1_is_brought_forward_with_all_it_had(tmp_path: Path) -> None:
    older = replace(WORK, model="tiny/q8")
    columns = "task_id, client_key, urgent, status, attempts, params, created_at, ended_at"
    with closing(sqlite3.connect(tmp_path / "tasks.sqlite3")) as database:
        database.executescript(f"{MIGRATIONS[0]}; PRAGMA user_version = 1;")
        database.executemany(
            f"INSERT INTO tasks ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                ("waits", "key", 0, "waiting", 0, params().model_dump_json(), 1.0, None),
                ("urgent", None, 1, "running", 1, params().model_dump_json(), 2.0, None),
                ("failed", None, 0, "failed", 1, params().model_dump_json(), 3.0, 4.0),
            ],
        )
        database.executemany(
            "INSERT INTO samples (work, measured) VALUES (?, ?)",
            [(work.to_json(), MEASURED.to_json()) for work in (WORK, older)],
        )
        database.execute("INSERT INTO loads VALUES ('tiny', 2.5)")
        database.commit()
    bench = Bench(tmp_path)
    assert version_of(bench.database) == len(MIGRATIONS)
    assert [task.task_id for task in bench.store.unfinished()] == ["urgent", "waits"]
    assert bench.store.find_by_key("key") == "waits"
    assert bench.status("failed") is TaskStatus.FAILED
    assert [work for work, _ in bench.store.timings.samples()] == [WORK, older]
    assert bench.store.timings.loads() == {"tiny": 2.5}
    assert bench.store.timings.outcomes() == []
    assert bench.store.claim("waits", started_at=5.0)
    assert bench.finish("waits")
    assert [work for work, _ in bench.store.timings.samples()] == [WORK, older, WORK]
    bench.store.close()


def test_a_migration_keeps_what_is_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fill(bench)
    scripts = (
        "ALTER TABLE tasks ADD COLUMN note TEXT; UPDATE tasks SET note = 'from version 1';",
        "CREATE TABLE more (number INTEGER); INSERT INTO more VALUES (7);",
    )
    monkeypatch.setattr(database, "MIGRATIONS", MIGRATIONS + scripts)
    bench.reopen()
    assert version_of(bench.database) == len(MIGRATIONS) + 2
    assert told(bench) == before
    row = bench.row("waiting 0")
    assert row is not None
    assert row["note"] == "from version 1"
    bench.reopen()  # each script runs once
    assert told(bench) == before


def test_a_migration_that_fails_is_undone_as_a_whole(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fill(bench)
    bench.store.close()
    broken = "UPDATE tasks SET error = 'half'; INSERT INTO no_such_table VALUES (1);"
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", (*MIGRATIONS, broken))
        with pytest.raises(StoreError, match="no_such_table"):
            TaskStore(bench.folder)
    assert version_of(bench.database) == len(MIGRATIONS)
    bench.store = TaskStore(bench.folder)
    assert told(bench) == before


def test_a_newer_schema_is_refused_and_left_as_it_is(bench: Bench) -> None:
    fill(bench)
    bench.store.close()
    newer = len(MIGRATIONS) + 1
    set_up(bench.database, f"PRAGMA user_version = {newer}")
    before = bench.everything()
    with pytest.raises(StoreError, match=f"version {newer}.*newer") as caught:
        TaskStore(bench.folder)
    assert "data-dir" in str(caught.value)
    assert bench.everything() == before
    assert version_of(bench.database) == newer
    set_up(bench.database, f"PRAGMA user_version = {len(MIGRATIONS)}")
    bench.store = TaskStore(bench.folder)  # the refused one left the folder free


# -- who may open it -------------------------------------------------------------------------------


def test_a_second_store_on_the_same_folder_is_refused(bench: Bench) -> None:
    bench.waiting()
    for _ in range(2):
        with pytest.raises(StoreError, match="Another server uses the data dir"):
            TaskStore(bench.folder)
    assert bench.status() is TaskStatus.WAITING
    bench.reopen()
    assert bench.status() is TaskStatus.WAITING


def test_the_folder_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from storage.task_store import TaskStore;"
        "store = TaskStore(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(StoreError, match="Another server"):
            TaskStore(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        TaskStore(tmp_path).close()


def test_a_folder_that_is_not_there_is_made_with_all_above_it(tmp_path: Path) -> None:
    TaskStore(tmp_path / "a" / "b" / "c").close()
    assert (tmp_path / "a" / "b" / "c" / "tasks.sqlite3").is_file()


@pytest.mark.parametrize("name", ["", "images", "tasks.sqlite3", "lock"])
def test_what_stands_in_the_way_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    data_dir = tmp_path / "data"
    in_the_way = data_dir / name if name else data_dir
    in_the_way.parent.mkdir(exist_ok=True)
    if name in ("tasks.sqlite3", "lock"):
        in_the_way.mkdir()
    else:
        in_the_way.write_text("a file")
    with pytest.raises(StoreError, match="cannot be used"):
        TaskStore(data_dir)
    in_the_way.rmdir() if in_the_way.is_dir() else in_the_way.unlink()
    TaskStore(data_dir).close()  # the refused one left the folder free


# -- damage ----------------------------------------------------------------------------------------


def scribble(path: Path) -> None:
    path.write_bytes(b"this is no database " * 1000)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3 * 4096 : -4096] = b"\xa5" * len(content[3 * 4096 : -4096])
    path.write_bytes(content)


def lose_a_table(path: Path) -> None:
    set_up(path, "DROP TABLE tasks")


@pytest.mark.parametrize("damage", [scribble, cut_in_half, overwrite_pages, lose_a_table])
def test_a_damaged_database_is_refused_and_left_where_it_is(
    bench: Bench, damage: Callable[[Path], None]
) -> None:
    for number in range(50):
        bench.waiting(str(number), params=params("x" * 3000))
    image = bench.images / bench.done("done")
    bench.store.close()
    damage(bench.database)
    content = bench.database.read_bytes()
    for _ in range(2):
        with pytest.raises(StoreError, match=r"cannot be used: .*\."):
            TaskStore(bench.folder)
    if damage is not lose_a_table:
        assert bench.database.read_bytes() == content
    assert image.read_bytes() == b"image"
    bench.database.rename(bench.folder / "damaged")
    bench.store = TaskStore(bench.folder)  # moved away, it is in nobody's way
    assert bench.store.unfinished() == []


def test_a_row_that_is_damaged_costs_no_other_task(bench: Bench) -> None:
    damaged, sound = bench.waiting("damaged"), bench.waiting("sound")
    change = "UPDATE tasks SET params = replace(params, '\"', char(0)) WHERE task_id = 'damaged'"
    set_up(bench.database, change)
    assert [task.task_id for task in bench.store.unfinished()] == [sound]
    assert bench.store.find(damaged) == Tombstone("The record of the task is damaged.")
    assert bench.store.find(sound)


def test_a_damaged_sample_is_passed_over(bench: Bench) -> None:
    for task_id in "abc":
        bench.done(task_id)
    set_up(bench.database, "UPDATE samples SET work = 'x' WHERE number = 2")
    assert [work for work, _ in bench.store.timings.samples()] == [WORK, WORK]


def test_text_that_cannot_be_read_is_refused_without_quoting_it(bench: Bench) -> None:
    bench.waiting()
    set_up(bench.database, "UPDATE tasks SET params = CAST(x'ff' || params AS TEXT)")
    with pytest.raises(StorageUnavailable, match="refuses") as caught:
        bench.store.find("task")
    assert SECRET not in str(caught.value)


# -- a disk that refuses ---------------------------------------------------------------------------


CHANGES: dict[str, Callable[[Bench], object]] = {
    "insert": lambda bench: bench.waiting("new"),
    "claim": lambda bench: bench.store.claim("waiting 0", started_at=9.0),
    "release": lambda bench: bench.store.release("running", count_attempt=False),
    "finish": lambda bench: bench.finish("running"),
    "fail": lambda bench: bench.fail("running"),
    "cancel waiting": lambda bench: bench.cancel("waiting 0", WAITING),
    "cancel running": lambda bench: bench.cancel("running", RUNNING),
    "drop": lambda bench: bench.store.drop("failed", "why"),
    "remove tombstones": lambda bench: bench.store.remove_tombstones(5000.0),
    "keep outcome": lambda bench: bench.store.timings.keep_outcome(OUTCOME),
    "keep load": lambda bench: bench.store.timings.keep_load("tiny", 9.0),
    "probe": lambda bench: bench.store.probe(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_the_disk_refuses_changes_nothing_and_works_when_it_takes_it_again(
    bench: Bench, change: str
) -> None:
    fill(bench)
    before = bench.everything()
    for _ in range(2):
        with bench.read_only(), pytest.raises(StorageUnavailable, match="refuses"):
            CHANGES[change](bench)
        assert bench.everything() == before
        assert not bench.store._database.connection.in_transaction
    CHANGES[change](bench)
    assert (bench.everything() == before) is (change == "probe")


def test_a_full_database_refuses_new_tasks_and_takes_them_when_it_may_grow_again(
    bench: Bench,
) -> None:
    fill(bench)
    before = bench.everything()
    with bench.full():
        for _ in range(3):
            with pytest.raises(StorageUnavailable, match="full"):
                bench.waiting("long", params=params("x" * 50_000))
        assert bench.everything() == before
        assert bench.store.find("long") is None
        assert bench.store.claim("waiting 1", started_at=9.0)  # what needs no room goes on
        assert bench.store.read_image("done") == b"a picture"
    bench.waiting("long", params=params("x" * 50_000))
    bench.reopen()
    assert bench.found("long").params.prompt == "x" * 50_000


def test_on_a_full_disk_what_was_accepted_stays_and_the_rest_is_refused(bench: Bench) -> None:
    accepted: list[str] = []

    def submit_for_ever() -> None:
        while True:
            accepted.append(bench.waiting(str(len(accepted)), params=params("x" * 5000)))

    with files_end_at(400_000), pytest.raises(StorageUnavailable):
        submit_for_ever()
    assert accepted
    assert [task.task_id for task in bench.store.unfinished()] == accepted
    more = bench.waiting("more", params=params("x" * 5000))
    bench.reopen()
    assert [task.task_id for task in bench.store.unfinished()] == [*accepted, more]


def test_a_store_opens_on_a_full_disk_and_its_probe_says_so(bench: Bench) -> None:
    for number in range(30):
        bench.done(str(number), params=params("x" * 20_000))
    shutil.rmtree(bench.images)  # so that the start has much to write
    bench.store.close()
    try:
        with files_end_at(40_000):
            bench.store = TaskStore(bench.folder)
            with pytest.raises(StorageUnavailable):
                bench.store.probe()
            assert bench.store.find("29") == REMOVED
            bench.store.close()
    finally:
        bench.store = TaskStore(bench.folder)
    assert bench.store.images() == (0, 0)
    assert bench.store.find("29") == REMOVED


def test_a_closed_store_says_that_it_cannot(bench: Bench) -> None:
    bench.waiting()
    bench.store.close()
    for call in (CHANGES["insert"], CHANGES["probe"], lambda bench: bench.store.find("task")):
        with pytest.raises(StorageUnavailable):
            call(bench)
    bench.store = TaskStore(bench.folder)
    assert bench.status() is TaskStatus.WAITING


def test_images_that_cannot_be_reached_are_storage_unavailable_and_come_back(bench: Bench) -> None:
    bench.done()
    with bench.no_images_folder():
        with pytest.raises(StorageUnavailable, match="cannot be read"):
            bench.store.read_image("task")
        with pytest.raises(StorageUnavailable, match="cannot be removed"):
            bench.store.drop("task", "why")
        assert bench.status() is TaskStatus.DONE
    assert bench.store.read_image("task") == b"image"


def test_a_probe_tells_that_images_cannot_be_written(bench: Bench) -> None:
    bench.store.probe()
    with bench.no_images_folder(), pytest.raises(StorageUnavailable):
        bench.store.probe()
    bench.store.probe()
    assert bench.files() == {}


def test_a_probe_tells_that_an_image_of_the_size_refused_last_finds_no_room(bench: Bench) -> None:
    bench.running()
    with files_end_at(200_000):
        with pytest.raises(StorageUnavailable):
            bench.finish("task", b"x" * 300_000)
        for _ in range(2):
            with pytest.raises(StorageUnavailable):
                bench.store.probe()
    bench.store.probe()
    assert_nothing_is_done(bench)
    assert_it_can_be_finished_now(bench)
