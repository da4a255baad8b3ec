"""Pictures that clients pin, how long the others stay, and archives of several tasks."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PlayedQueue, allow, params_for
from played_app import PlayedApp

from errors import Gone, KeepLimit
from scheduler import retention
from scheduler.limits import ANONYMOUS_PIN_S, QueueLimits
from storage.task_store import TaskStore
from task import Encoded, GenerationParams, Owner, Task
from timing_model import TimingModel

DAY_S = 24 * 3600.0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[PlayedApp]:
    bench = PlayedApp(tmp_path)
    yield bench
    bench.store.close()


def done(bench: PlayedApp, name: str, prompt: str = "x", **fields: object) -> str:
    """The id of a finished task."""
    task_id = bench.submit(name, prompt, **fields)
    bench.run()
    return task_id


def code_of(bench: PlayedApp, name: str, method: str, path: str, **query: object) -> str:
    answer = bench.ask(name, method, path, query_string=query)
    assert answer.status_code >= 400, answer.text
    return str(answer.get_json()["error"]["code"])


def test_a_finished_task_says_when_it_expires(bench: PlayedApp) -> None:
    waiting = bench.submit("alice")
    assert "expires_at" not in bench.status("alice", waiting)
    bench.run()
    status = bench.status("alice", waiting)
    assert status["expires_at"] - status["ended_at"] > 0
    bench.at += 1000.0
    assert bench.status("alice", waiting)["expires_at"] > 0
    bench.at += DAY_S
    bench.queue.scheduler.prune()
    assert code_of(bench, "alice", "GET", "/status", task_id=waiting) == "gone"


def test_cancelled_tasks_make_room_for_newer_ones(
    bench: PlayedApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "MOST_WITHOUT_IMAGES", 2)
    with_picture = done(bench, "alice")
    cancelled = [bench.submit("alice") for _ in range(3)]
    for task_id in cancelled:
        bench.at += 1.0
        bench.json("alice", "DELETE", "/delete", query_string={"task_id": task_id})
    bench.at += 60.0
    bench.queue.scheduler.prune()
    assert code_of(bench, "alice", "GET", "/status", task_id=cancelled[0]) == "gone"
    for task_id in (with_picture, *cancelled[1:]):
        assert bench.status("alice", task_id)["task_id"] == task_id


def test_a_kept_task_does_not_expire_also_after_a_restart_until_it_is_released(
    bench: PlayedApp,
) -> None:
    kept, other = done(bench, "alice"), done(bench, "alice")
    answer = bench.json("alice", "POST", "/keep", query_string={"task_id": kept})
    assert answer == {
        "task_id": kept,
        "kept": True,
        "kept_pictures": 1,
        "max_kept_pictures": 200,
    }
    bench.at += DAY_S + 1.0
    bench.reopen()
    bench.queue.scheduler.prune()
    status = bench.status("alice", kept)
    assert status["kept"] is True
    assert "expires_at" not in status
    assert code_of(bench, "alice", "GET", "/status", task_id=other) == "gone"

    released = bench.json("alice", "DELETE", "/keep", query_string={"task_id": kept})
    assert (released["kept"], released["kept_pictures"]) == (False, 0)
    bench.queue.scheduler.prune()
    assert "kept" not in bench.status("alice", kept)  # its time begins again
    bench.at += DAY_S + 1.0
    bench.queue.scheduler.prune()
    assert code_of(bench, "alice", "GET", "/status", task_id=kept) == "gone"


def test_fetching_a_kept_picture_does_not_remove_it_and_deleting_does(bench: PlayedApp) -> None:
    task_id = done(bench, "alice")
    assert bench.ask("alice", "GET", "/image", query_string={"task_id": task_id}).data == b"image"
    bench.json("alice", "POST", "/keep", query_string={"task_id": task_id})
    assert bench.ask("alice", "GET", "/image", query_string={"task_id": task_id}).data == b"image"
    bench.at += 3600.0
    bench.queue.scheduler.prune()
    assert bench.status("alice", task_id)["kept"] is True
    bench.json("alice", "DELETE", "/delete", query_string={"task_id": task_id})
    assert code_of(bench, "alice", "GET", "/status", task_id=task_id) == "gone"
    again = done(bench, "alice")
    answer = bench.json("alice", "POST", "/keep", query_string={"task_id": again})
    assert answer["kept_pictures"] == 1


def test_the_kept_tasks_of_a_client_are_listed_the_latest_first(bench: PlayedApp) -> None:
    first, other, of_bob, last = (done(bench, name) for name in ("alice", "alice", "bob", "alice"))
    for name, task_id in (("alice", first), ("bob", of_bob), ("alice", last)):
        bench.at += 1.0
        bench.json(name, "POST", "/keep", query_string={"task_id": task_id})
    most = {"max_kept_pictures": 200}
    answer = bench.json("alice", "GET", "/keep")
    assert answer == {"task_ids": [last, first], "kept_pictures": 2, **most}
    assert bench.json("bob", "GET", "/keep")["task_ids"] == [of_bob]
    bench.json("alice", "DELETE", "/keep", query_string={"task_id": last})
    bench.json("alice", "DELETE", "/delete", query_string={"task_id": first})
    assert bench.json("alice", "GET", "/keep") == {"task_ids": [], "kept_pictures": 0, **most}
    assert "kept" not in bench.status("alice", other)


def test_only_ended_tasks_with_pictures_can_be_kept(bench: PlayedApp) -> None:
    waiting = bench.submit("alice")
    assert code_of(bench, "alice", "POST", "/keep", task_id=waiting) == "wrong_status"
    failed = bench.fail()
    assert failed == waiting
    assert code_of(bench, "alice", "POST", "/keep", task_id=failed) == "wrong_status"


def limited(folder: Path, limits: QueueLimits) -> PlayedQueue:
    return PlayedQueue(allow("noise-flux1"), TimingModel(), TaskStore(folder), limits)


def drawn(queue: PlayedQueue, owner: str, image: bytes = b"image") -> str:
    task, _ = queue.submit(params_for("noise-flux1"), owner=Owner(owner))
    assert queue.claim()
    assert queue.finish(task.task_id, [image])
    return task.task_id


def test_each_client_may_keep_so_many_pictures(tmp_path: Path) -> None:
    queue = limited(tmp_path, QueueLimits(max_kept_pictures=2))
    first, second, third = (drawn(queue, "alice") for _ in range(3))
    queue.keep(first, True)
    queue.keep(second, True)
    queue.keep(second, True)  # it counts once
    with pytest.raises(KeepLimit, match="2 pictures are kept for you"):
        queue.keep(third, True)
    assert queue.keep(drawn(queue, "bob"), True).kept
    queue.keep(first, False)
    assert queue.keep(third, True).kept
    assert queue.kept_by("alice") == (2, 2)
    queue.scheduler.store.close()


def test_a_pin_of_a_client_without_a_key_ends_after_a_time_that_another_one_begins_again(
    bench: PlayedApp,
) -> None:
    queue = bench.queue
    pinned, renewed, of_key = drawn(queue, "id:1"), drawn(queue, "address:::1"), drawn(queue, "x")
    for task_id in (pinned, renewed, of_key):
        queue.keep(task_id, True)
    assert queue.status(of_key).expires_in_s is None
    bench.at += ANONYMOUS_PIN_S - DAY_S
    assert queue.status(pinned).expires_in_s == pytest.approx(DAY_S)
    queue.keep(renewed, True)
    bench.at += DAY_S + 1.0
    queue.scheduler.prune()
    with pytest.raises(Gone):
        queue.status(pinned)
    assert queue.status(renewed).kept
    assert queue.status(of_key).kept
    assert queue.kept_by("id:1")[0] == 0


def test_a_failed_task_that_is_tried_again_is_not_pinned_any_more(bench: PlayedApp) -> None:
    queue = bench.queue
    task, _ = queue.submit(params_for("noise-flux1", count=2), owner=Owner("alice"))
    claimed = bench.claim()
    assert queue.worker.store_image(task.task_id, claimed.attempt, Encoded(b"first", 0))
    assert queue.worker.fail(task.task_id, claimed.attempt, "generation_failed", "x")
    assert queue.keep(task.task_id, True).kept
    queue.control.retry(task.task_id)
    assert not queue.status(task.task_id).kept
    assert queue.kept_by("alice")[0] == 0
    bench.reopen()
    assert bench.queue.kept_by("alice")[0] == 0


def test_kept_pictures_take_half_of_the_space_and_make_no_room(tmp_path: Path) -> None:
    queue = limited(tmp_path, QueueLimits(keep_bytes=100))
    kept = drawn(queue, "alice", b"x" * 40)
    queue.keep(kept, True)
    with pytest.raises(KeepLimit, match="half of the space"):
        queue.keep(drawn(queue, "bob", b"x" * 20), True)
    others = [drawn(queue, "bob", b"x" * 50) for _ in range(2)]
    assert queue.status(kept).kept
    assert queue.status(others[-1]).images_done == 1
    assert queue.images() == (2, 90)
    queue.scheduler.store.close()


def opened(bench: PlayedApp, name: str, *task_ids: str) -> zipfile.ZipFile:
    query = [("task_id", one) for one in task_ids]
    answer = bench.ask(name, "GET", "/zip", query_string=query, buffered=True)
    assert answer.status_code == 200, answer.text
    assert answer.content_length == len(answer.data)
    return zipfile.ZipFile(io.BytesIO(answer.data))


def test_an_archive_has_the_pictures_of_several_tasks_by_prompt_and_seed(bench: PlayedApp) -> None:
    first = done(bench, "alice", "Ein Fuchs, müde!", seed=7)
    second = done(bench, "alice", "Ein Fuchs (müde)", seed=7, format="PNG")
    third = bench.submit("alice", "two of them", seed=1, n=2)
    task = bench.claim()
    for index in range(2):
        assert bench.queue.worker.store_image(
            third, task.attempt, Encoded(f"{index}".encode(), index)
        )
    archive = opened(bench, "alice", first, second, f"{third}:1", first)
    assert archive.namelist() == [
        "Ein Fuchs müde 7.jpg",
        "Ein Fuchs müde 7 (2).png",
        "two of them 2.jpg",
    ]
    assert archive.read("two of them 2.jpg") == b"1"
    assert opened(bench, "alice", third).namelist() == ["two of them 1.jpg", "two of them 2.jpg"]
    assert bench.status("alice", first)["images_done"] == 1


def test_names_in_an_archive_differ_in_more_than_capitals(bench: PlayedApp) -> None:
    tasks = [done(bench, "alice", prompt, seed=1) for prompt in ("a fox", "A Fox", "a foX")]
    assert opened(bench, "alice", *tasks).namelist() == [
        "a fox 1.jpg",
        "A Fox 1 (2).jpg",
        "a foX 1 (3).jpg",
    ]


def test_names_in_an_archive_fit_into_a_file_system(bench: PlayedApp) -> None:
    tasks = [
        done(bench, "alice", prompt * 200, seed=2**32 - 1)
        for prompt in ("\U00020000", "\U00020000", "山")
    ]
    names = opened(bench, "alice", *tasks).namelist()
    assert len(set(names)) == 3
    assert all(100 < len(name.encode()) <= 255 for name in names)


def test_an_archive_has_own_pictures_only_and_refuses_what_is_not_there(bench: PlayedApp) -> None:
    mine, theirs = done(bench, "alice"), done(bench, "bob")
    waiting = bench.submit("alice")
    query = [("task_id", mine), ("task_id", theirs)]
    answer = bench.ask("alice", "GET", "/zip", query_string=query)
    assert (answer.status_code, answer.get_json()["error"]["code"]) == (404, "unknown_task")
    assert code_of(bench, "alice", "GET", "/zip", task_id=waiting) == "not_ready"
    for wrong in ("", "a:b", f"{mine}:1", f"{mine}:1234", f"{mine}:0:0"):
        assert code_of(bench, "alice", "GET", "/zip", task_id=wrong) == "invalid_input", wrong
    many = [("task_id", f"{number}") for number in range(301)]
    assert bench.ask("alice", "GET", "/zip", query_string=many).status_code == 400
    assert opened(bench, "root", theirs).namelist()


def test_archives_are_limited_in_bytes_and_in_number(
    bench: PlayedApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = done(bench, "alice")
    of_bob = done(bench, "bob")
    query = {"task_id": task_id}
    unread = [
        bench.ask("alice", "GET", "/zip", query_string=query, buffered=False) for _ in range(2)
    ]
    assert code_of(bench, "alice", "GET", "/zip", task_id=task_id) == "too_many_waiting"
    for _ in range(3):  # one who does not read leaves places to others
        assert len(opened(bench, "bob", of_bob).namelist()) == 1
    unread += [
        bench.ask("bob", "GET", "/zip", query_string={"task_id": of_bob}, buffered=False)
        for _ in range(2)
    ]
    assert code_of(bench, "root", "GET", "/zip", task_id=task_id) == "too_many_waiting"
    unread.pop().close()
    assert len(opened(bench, "root", task_id).namelist()) == 1
    unread.pop(0).close()
    assert len(opened(bench, "alice", task_id).namelist()) == 1
    for answer in unread:
        answer.close()
    monkeypatch.setattr("api.keep_api.MOST_ZIP_BYTES", 4)
    assert code_of(bench, "alice", "GET", "/zip", task_id=task_id) == "invalid_input"


def test_a_picture_that_comes_while_an_archive_is_asked_for_is_in_it(
    bench: PlayedApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id, worker, image_of = bench.submit("alice", n=2), bench.queue.worker, bench.queue.image_of
    attempt = bench.claim().attempt
    assert worker.store_image(task_id, attempt, Encoded(b"first", 0))

    def late(task: Task, index: int = 0) -> tuple[bytes, GenerationParams]:
        if task.images_done == 1:
            assert worker.store_image(task_id, attempt, Encoded(b"second", 1))
        return image_of(bench.queue.status(task_id), index)

    monkeypatch.setattr(bench.queue, "image_of", late)
    archive = opened(bench, "alice", f"{task_id}:1")
    assert [archive.read(name) for name in archive.namelist()] == [b"second"]
