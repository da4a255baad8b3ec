"""The schema of the database, and data dirs of earlier versions."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import PlayedQueue, allow
from store_bench import MEASURED, OUTCOME, WORK, Bench, answers, fill, opened, params, set_up

from errors import StoreError
from storage import database
from storage.schema import MIGRATIONS
from storage.task_rows import Tombstone
from storage.task_store import TaskStore
from task import TaskStatus
from timing_model import TimingModel


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield from opened(tmp_path / "data")


# -- the schema ------------------------------------------------------------------------------------


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("PRAGMA user_version").fetchone()[0])


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
    assert answers(bench) == before
    bench.store.close()


def columns_and_indexes(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """What SQLite says of each table: its columns, in their order, and its indexes."""
    with closing(sqlite3.connect(path)) as database:
        tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        found = {
            name: database.execute(f"PRAGMA table_xinfo({name})").fetchall() for (name,) in tables
        }
        indexes = "SELECT name, tbl_name, sql FROM sqlite_master WHERE type = 'index' ORDER BY name"
        return found | {"": database.execute(indexes).fetchall()}


def test_a_new_database_is_like_one_that_was_brought_forward(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    write_as(1, tmp_path / "old")
    TaskStore(tmp_path / "old").close()
    new = columns_and_indexes(bench.database)
    assert len(new) > 9
    assert new == columns_and_indexes(tmp_path / "old" / "tasks.sqlite3")


ROWS: dict[str, dict[str, Any]] = {
    "waits": {"client_key": "key", "status": "waiting", "attempts": 0},
    "died once": {"status": "waiting", "attempts": 1},
    "runs": {"status": "running", "urgent": 1, "attempts": 1, "started_at": 1001.5},
    "runs again": {"status": "running", "attempts": 2, "started_at": 1001.5},
    "done": {"status": "done", "image_bytes": 5, "measured": MEASURED.to_json()},
    "fetched": {
        "status": "done",
        "image_bytes": 6,
        "measured": MEASURED.to_json(),
        "fetched_at": 1500.0,
    },
    "failed": {"status": "failed", "error_code": "task_failed", "error": "why"},
    "cancelled": {"status": "cancelled", "attempts": 0},
    "gone": {"status": "done", "params": None, "gone": "It has expired."},
}
"""Tasks as version 1 of the schema has them."""
IMAGES = {"done": b"image", "fetched": b"image2"}


def write_as(version: int, folder: Path) -> None:
    """A data dir of this version of the schema, with one of everything."""
    with closing(sqlite3.connect(folder / "tasks.sqlite3")) as database:
        for script in MIGRATIONS[:version]:
            database.executescript(script)
        database.execute(f"PRAGMA user_version = {version}")
        renamed = {"urgent": "priority", "attempts": "attempt"} if version >= 6 else {}
        for number, (task_id, own) in enumerate(ROWS.items(), 1):
            row = {
                "task_id": task_id,
                "urgent": 0,
                "attempts": 1,
                "params": params().model_dump_json(),
                "created_at": 1000.0 + number,
                **own,
            }
            if version >= 6:
                row["interruptions"] = row["attempts"] - (row["status"] == "running")
                row["sequence"] = row["group_sequence"] = number
                if row.get("image_bytes") is not None:
                    row["image_sizes"] = f"[{row['image_bytes']}]"
            if row["status"] not in ("waiting", "running"):
                row["ended_at"] = 1002.5
                if version >= 5:
                    row["kept_since"] = 2002.5
            columns = ", ".join(renamed.get(name, name) for name in row)
            marks = ", ".join("?" * len(row))
            database.execute(f"INSERT INTO tasks ({columns}) VALUES ({marks})", tuple(row.values()))
        sample = {"work": WORK.to_json(), "measured": MEASURED.to_json()}
        if version >= 2:
            sample["model"] = WORK.model
            database.execute(
                f"INSERT INTO outcomes ({renamed.get('urgent', 'urgent')}, forecast_s, p90_s,"
                " actual_s) VALUES (1, 2.5, 4, ?)",
                (OUTCOME.actual_s,),
            )
        if version >= 4:
            database.execute("INSERT INTO callbacks VALUES ('waits', 'http://x/', 2, 7.5)")
        if version >= 5:
            database.execute("INSERT INTO marks VALUES ('keep_offset_s', 1000.0)")
        database.execute(
            f"INSERT INTO samples ({', '.join(sample)}) VALUES ({', '.join('?' * len(sample))})",
            tuple(sample.values()),
        )
        database.execute("INSERT INTO loads (model, seconds) VALUES ('tiny', 2.5)")
        database.commit()
    (folder / "images").mkdir()
    for name, image in IMAGES.items():
        (folder / "images" / name).write_bytes(image)


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS)))
def test_a_database_of_each_earlier_version_is_brought_forward_with_all_it_had(
    tmp_path: Path, version: int
) -> None:
    write_as(version, tmp_path)
    bench = Bench(tmp_path)
    assert version_of(bench.database) == len(MIGRATIONS)
    unfinished = {task.task_id: task for task in bench.store.unfinished()}
    assert list(unfinished) == ["waits", "died once", "runs", "runs again"]
    counts = [(task.attempt, task.interruptions) for task in unfinished.values()]
    assert counts == [(0, 0), (1, 1), (1, 0), (2, 1)]
    assert [task.priority for task in unfinished.values()] == [0, 0, 1, 0]
    assert [(task.sequence, task.group) for task in unfinished.values()] == [
        (number, number) for number in range(1, 5)
    ]
    assert all(task.params == params() for task in unfinished.values())
    assert bench.store.find_by_key("key") == "waits"
    for task_id, image in IMAGES.items():
        task = bench.task(task_id)
        assert (task.status, task.image_sizes) == (TaskStatus.DONE, (len(image),))
        assert [measured.to_json() for measured in task.measured] == [MEASURED.to_json()]
        assert bench.store.read_image(task_id) == image
    assert bench.task("fetched").fetched_at == 1500.0
    assert bench.store.ended.images() == (2, sum(map(len, IMAGES.values())))
    failed = bench.task("failed")
    assert (failed.status, failed.error_code, failed.error) == (
        TaskStatus.FAILED,
        "task_failed",
        "why",
    )
    assert bench.status("cancelled") is TaskStatus.CANCELLED
    assert bench.store.find("gone") == Tombstone("It has expired.")
    kept_since = 2002.5 if version >= 5 else 1002.5
    assert bench.store.ended.ended_before(kept_since) == []
    assert len(bench.store.ended.ended_before(kept_since + 0.1)) == 4
    assert [work for work, _ in bench.store.timings.samples()] == [WORK]
    assert bench.store.timings.loads() == {"tiny": 2.5}
    assert bench.store.timings.outcomes() == ([OUTCOME] if version >= 2 else [])
    assert bench.store.state.keep_offset_s() == (1000.0 if version >= 5 else 0.0)
    assert bench.claim("waits")
    assert bench.finish("waits", ended_at=3000.0)
    callback = bench.store.callbacks.next()
    assert (callback is not None) is (version >= 4)
    if callback:
        assert (callback.task_id, callback.tries, callback.due_at) == ("waits", 2, 7.5)
    bench.store.close()


@pytest.mark.parametrize("version", range(3, len(MIGRATIONS)))
def test_images_of_a_task_of_several_are_found_after_a_migration(
    tmp_path: Path, version: int
) -> None:
    write_as(version, tmp_path)
    set_up(
        tmp_path / "tasks.sqlite3",
        "UPDATE tasks SET image_sizes = '[5, 7]', image_bytes = 12, fetched = '[1]'"
        " WHERE task_id = 'done'",
    )
    (tmp_path / "images" / "done.1").write_bytes(b"image 2")
    bench = Bench(tmp_path)
    assert bench.task("done").image_sizes == (5, 7)
    assert bench.store.read_image("done", 1) == b"image 2"
    assert bench.task("done").fetched_at is None
    assert bench.store.ended.mark_fetched("done", 3000.0, 0)
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
    assert answers(bench) == before
    assert bench.row("waiting 0")["note"] == "from version 1"
    bench.reopen()  # each script runs once
    assert answers(bench) == before


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
    assert answers(bench) == before


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


def test_a_data_dir_that_the_server_before_the_scheduler_wrote_opens_with_all_it_had(
    tmp_path: Path,
) -> None:
    """data/schema_5.sql is a dump of what that server wrote."""
    with closing(sqlite3.connect(tmp_path / "tasks.sqlite3")) as database:
        database.executescript((Path(__file__).parent / "data/schema_5.sql").read_text())
    (tmp_path / "images").mkdir()
    for name, image in (("done", b"image 0"), ("done.1", b"image 1")):
        (tmp_path / "images" / name).write_bytes(image)
    store = TaskStore(tmp_path)
    queue = PlayedQueue(allow("tiny"), TimingModel(), store)
    listed = [(task.task_id, task.status) for task in queue.unfinished(10, 0)[0]]
    assert listed == [(name, TaskStatus.WAITING) for name in ("urgent", "runs", "waits")]
    assert store.find_by_key("key") == "waits"
    assert queue.status("runs").interruptions == 1
    assert queue.status("done").status is TaskStatus.DONE
    assert queue.all_images("done")[0] == [b"image 0", b"image 1"]
    assert queue.status("failed").error == "why"
    assert queue.status("cancelled").status is TaskStatus.CANCELLED
    assert store.find("gone") == Tombstone("It has expired.")
    assert store.timings.loads() == {"tiny": 2.5}
    assert [work.model for work, _ in store.timings.samples()] == ["tiny"]
    assert [outcome.priority for outcome in store.timings.outcomes()] == [1]
    assert store.state.keep_offset_s() == pytest.approx(500.0, abs=1.0)
    assert queue.events.last_id > 2_000_000
    queue.load()
    claimed = queue.claim()
    assert claimed is not None
    assert (claimed.task_id, claimed.attempt) == ("urgent", 1)
    queue.fetched("done", 0)
    assert queue.status("done").fetched_at is not None
    queue.delete("waits")
    callback = store.callbacks.next()
    assert callback is not None
    assert callback.url == "http://127.0.0.1:9/"
    store.close()
