"""The statuses of a task: the table of the architecture page says what comes after each."""

import re

import pytest
from conftest import ROOT, PlayedQueue, allow, params_for
from memory_stores import memory_store

from models.mflux_registry import find_model
from models.model_catalog import LoadSpec
from storage.task_store import TaskStore
from task import TaskStatus
from timing_model import TimingModel


def said() -> dict[str, set[str]]:
    """By status, those that the table names as the next ones."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("\n## Status\n\n")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines()[2:]]
    return {status.strip(" `"): set(re.findall(r"`(\w+)`:", after)) for status, _, after in rows}


class Watched:
    """A queue in memory; a trigger of the database notes each change of a status."""

    def __init__(self, store: TaskStore) -> None:
        self._connection = store._database.connection
        self._connection.executescript(
            "CREATE TEMP TABLE moves (was, is_now);"
            "CREATE TEMP TRIGGER note AFTER UPDATE OF status ON tasks BEGIN"
            " INSERT INTO moves VALUES (old.status, new.status); END"
        )
        self.queue = PlayedQueue(
            allow("noise-flux1", "schnell"),
            TimingModel(),
            store,
            needs_download=lambda model: model.name == "schnell",
        )
        self.queue.load()

    def submit(self, model: str = "noise-flux1") -> str:
        return self.queue.submit(params_for(model=model))[0].task_id

    def claim(self) -> str:
        task_id = self.submit()
        task = self.queue.claim()
        assert task
        assert task.task_id == task_id
        return task_id

    def seen(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {status: set() for status in TaskStatus}
        for was, is_now in self._connection.execute("SELECT was, is_now FROM moves"):
            found[was] |= {is_now} - {was}
        return found


@pytest.fixture
def watched() -> Watched:
    return Watched(memory_store())


def test_the_table_of_statuses_is_what_happens(watched: Watched) -> None:
    queue = watched.queue
    assert queue.finish(watched.claim(), [b"image"])
    queue.delete(watched.claim())  # while it runs
    queue.delete(watched.submit())  # while it waits
    released = watched.claim()
    assert queue.release(released)
    queue.delete(released)
    failed = watched.claim()
    assert queue.fail(failed, "task_failed", "It broke.")
    queue.control.retry(failed)
    queue.delete(failed)
    lost, model = watched.submit("schnell"), find_model("schnell")
    assert model
    queue.downloads.download_failed(LoadSpec(model, model.pipelines[0], None), "No weights.")
    assert queue.status(lost).status is TaskStatus.FAILED
    assert watched.seen() == said()
