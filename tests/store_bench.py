"""A store on a real disk, with helpers for its tests.

Rows are read through a separate connection, images through the folder, so that tests see what is
on disk. A refusing disk is made with means of the system (a limit of file size, a
folder in the way) or of SQLite (a connection that may not write, a database that may not grow).
"""

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conftest import params_for

from storage.ended_tasks import End
from storage.task_store import TaskStore
from task import GenerationParams, Task, TaskStatus
from timing.spread import Outcome
from timing_model import Measured, Work

WORK = Work(model="noise-flux1", parameters_b=0.001, tokens=4096, steps=4, format="PNG")
MEASURED = Measured(
    text_encoding_s=0.1, step_s=(0.7, 0.3, 1 / 3), decoding_s=2.5, image_encoding_s=0.0
)
OUTCOME = Outcome(priority=1, forecast_s=2.5, p90_s=4.0, actual_s=1 / 3)
SECRET = "a prompt that nobody else may read"
REMOVED = "The image was removed."
RUNNING, WAITING = TaskStatus.RUNNING, TaskStatus.WAITING


def params(prompt: str = SECRET, **changes: Any) -> GenerationParams:
    usual = {"seed": 2**64 - 1, "width": 1024, "height": 1024, "guidance": 3.5}
    return params_for(prompt, **{**usual, **changes})


def ended(at: float = 1002.5) -> End:
    return End(at, at)


@dataclass
class Bench:
    """A store in a folder, with short names for its calls."""

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

    def row(self, task_id: str) -> dict[str, Any]:
        """What is on disk for this task."""
        with closing(sqlite3.connect(self.database)) as database:
            database.row_factory = sqlite3.Row
            row = database.execute("SELECT * FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
        return dict(row)

    def everything(self) -> dict[str, Any]:
        """All tables, and all images."""
        tables = ("tasks", "samples", "loads", "outcomes", "callbacks", "marks")
        with closing(sqlite3.connect(self.database)) as database:
            rows = {
                name: database.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall()
                for name in tables
            }
        return {**rows, "images": self.files()}

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.images.iterdir()}

    # -- changes, of a task as it is stored -------------------------------------------------------

    def task(self, task_id: str = "task") -> Task:
        found = self.store.find(task_id)
        assert isinstance(found, Task)
        return found

    def believed(self, status: TaskStatus, task_id: str = "task", *, attempts: int = 0) -> Task:
        """The task as a caller takes it to be: in this status, so many attempts later than it is
        stored. Also of one that was never stored."""
        found = self.store.find(task_id)
        task = found if isinstance(found, Task) else Task(task_id, params(), 0, 1000.5, attempt=1)
        return replace(task, status=status, attempt=task.attempt + attempts)

    def waiting(self, task_id: str = "task", **options: Any) -> str:
        stored = {
            name: options.pop(name) for name in ("client_key", "callback_url") if name in options
        }
        values = {"params": params(), "priority": 0, "created_at": 1000.5, **options}
        self.store.insert(Task(task_id, **values), **stored)
        return task_id

    def claim(self, task_id: str = "task", started_at: float = 1001.5) -> bool:
        return self.store.claim(self.believed(WAITING, task_id), started_at=started_at)

    def release(self, task_id: str = "task", *, interrupted: bool = False) -> bool:
        return self.store.release(self.believed(RUNNING, task_id), interrupted=interrupted)

    def running(self, task_id: str = "task", **options: Any) -> str:
        self.waiting(task_id, **options)
        assert self.claim(task_id)
        return task_id

    def add_image(self, task_id: str = "task", image: bytes = b"image") -> bool:
        """One of several."""
        return self._add(self.believed(RUNNING, task_id), image, None)

    def finish(
        self, task_id: str = "task", image: bytes = b"image", ended_at: float = 1002.5
    ) -> bool:
        """The last image, or the only one."""
        return self._add(self.believed(RUNNING, task_id), image, ended(ended_at))

    def finish_as(self, task: Task, image: bytes = b"image") -> bool:
        return self._add(task, image, ended())

    def _add(self, task: Task, image: bytes, end: End | None) -> bool:
        samples = [(WORK, MEASURED)]
        return self.store.add_image(task, image, [MEASURED], samples=samples, end=end)

    def fail(self, task_id: str = "task", was: TaskStatus = RUNNING) -> bool:
        task = self.believed(was, task_id)
        return self.store.fail(task, ended(), code="task_failed", message="no")

    def cancel(
        self, task_id: str = "task", was: TaskStatus = RUNNING, ended_at: float = 1002.5
    ) -> bool:
        return self.store.cancel(self.believed(was, task_id), ended(ended_at))

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
        return self.task(task_id).status

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


def opened(folder: Path) -> Iterator[Bench]:
    """For a fixture."""
    bench = Bench(folder)
    yield bench
    bench.store.close()


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """The system lets no file of this process grow beyond this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(bench: Bench) -> dict[str, Any]:
    """Stores data of all kinds; returns what the store reads of it."""
    bench.store.timings.keep_load("noise-flux1", 2.5)
    bench.store.timings.keep_outcome(OUTCOME)
    for number, priority in enumerate([0, 1, 0, 1, 0]):
        bench.waiting(f"waiting {number}", priority=priority, client_key=f"key {number}")
    bench.running("running", priority=0)
    bench.running("running urgently", priority=1)
    bench.done("done", b"a picture", client_key="done key")
    bench.store.ended.mark_fetched(bench.done("fetched", b"another picture"), 1500.0)
    for status in (TaskStatus.FAILED, TaskStatus.CANCELLED):
        bench.in_status(status, status.value)
    bench.store.ended.drop(bench.done("dropped"), "why")
    return answers(bench)


def answers(bench: Bench) -> dict[str, Any]:
    with closing(sqlite3.connect(bench.database)) as database:
        ids = [row[0] for row in database.execute("SELECT task_id FROM tasks")]
    keys = [f"key {number}" for number in range(5)] + ["done key", "never used"]
    return {
        "tasks": {task_id: bench.store.find(task_id) for task_id in ids},
        "unfinished": [task.task_id for task in bench.store.unfinished()],
        "images": {task_id: bench.store.read_image(task_id) for task_id in ids},
        "sums": bench.store.ended.images(),
        "samples": bench.store.timings.samples(),
        "loads": bench.store.timings.loads(),
        "outcomes": bench.store.timings.outcomes(),
        "keys": {key: bench.store.find_by_key(key) for key in keys},
    }


def assert_nothing_is_done(bench: Bench) -> None:
    assert bench.status() is TaskStatus.RUNNING
    assert bench.files() == {}
    assert bench.store.ended.images() == (0, 0)
    assert bench.store.timings.samples() == []


def assert_it_can_be_finished_now(bench: Bench) -> None:
    assert bench.finish("task", b"image")
    assert bench.files() == {"task": b"image"}
    assert bench.status() is TaskStatus.DONE
    assert len(bench.store.timings.samples()) == 1


def set_up(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for statement in statements:
            database.execute(statement)
