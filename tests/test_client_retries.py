"""The client, where connections break, servers restart, and answers are lost."""

import io
import signal
import socket
import threading
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, ServerProcess, StartServer
from far_ends import Asked, FakeTask, FarEnd, Time, proxy_of
from PIL import Image as pillow

from client.mflux_client import Client, MfluxError, Status, Unreachable
from client.mflux_client import _retry_after_s as retry_after

pytestmark = pytest.mark.usefixtures("transport")
SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 2}
LONG: dict[str, Any] = {"width": 1024, "height": 1024, "steps": 60}


def png(side: int = 64, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    pillow.new("RGB", (side, side), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def test_a_server_that_is_not_there_is_tried_for_so_long_and_not_longer() -> None:
    time, received = Time(), []
    client = Client(
        f"127.0.0.1:{free_port()}",
        retry_s=30,
        sleep=time.sleep,
        clock=time.clock,
        on_retry=lambda error, pause_s: received.append((error.code, pause_s)),
    )
    with pytest.raises(Unreachable, match="connection refused"):
        client.submit("x")
    assert 5 < len(time.slept) < 20
    assert 20 < sum(time.slept) <= 30
    assert time.slept[0] < 1 < time.slept[-1]
    assert received == [("unreachable", pause_s) for pause_s in time.slept]


def test_a_date_in_retry_after_is_read_by_the_clock_of_the_server() -> None:
    date, later = "Fri, 01 Jan 2027 00:00:00 GMT", "Fri, 01 Jan 2027 00:00:30 GMT"
    assert retry_after({"Retry-After": later, "Date": date}) == 30.0
    assert retry_after({"Retry-After": date, "Date": later}) == 0.0
    assert retry_after({"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}) == 0.0
    assert retry_after({"Retry-After": " 7 "}) == 7.0
    for bad in ("", "soon", "-1"):
        assert retry_after({"Retry-After": bad, "Date": date}) is None
    assert retry_after({"Retry-After": later, "Date": "today"}) is None


def test_a_full_queue_is_waited_for_as_the_server_says() -> None:
    time, keys = Time(), []

    def answer(asked: Asked) -> None:
        keys.append(asked.headers["Idempotency-Key"])
        if len(keys) < 3:
            full = {"error": {"code": "queue_full", "message": "The queue is full."}}
            asked.answer(429, full, {"Retry-After": "7"})
        else:
            FakeTask().answer(asked)

    with FarEnd(answer) as far_end:
        client = Client(far_end.url, sleep=time.sleep, clock=time.clock)
        task = client.submit("x")
        assert time.slept == [7, 7]
        assert keys == [task.idempotency_key] * 3
        keys.clear()
        hasty = Client(far_end.url, retry_s=6, sleep=time.sleep, clock=time.clock)
        with pytest.raises(MfluxError) as error:
            hasty.submit("x")
    assert (error.value.code, error.value.retry_after_s) == ("queue_full", 7)
    assert len(keys) == 1


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_without_its_server_is_asked_again(status: int) -> None:
    time, answers = Time(), iter([status, status, 200])

    def answer(asked: Asked) -> None:
        asked.answer(next(answers), {"length": 0, "tasks": []})

    with FarEnd(answer) as far_end:
        assert Client(far_end.url, sleep=time.sleep, clock=time.clock).queue().length == 0
    assert len(time.slept) == 2


def test_a_submit_whose_answer_was_lost_makes_no_second_task(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1")
    lost: list[str] = []
    endless: dict[str, Any] = {"width": 2048, "height": 2048, "steps": 100}

    def fault(asked: Asked, answer: requests.Response) -> bool:
        if asked.route != "/generate" or len(lost) == 2:
            return False
        lost.append(answer.json()["task_id"])
        asked.hang_up()
        return True

    with FarEnd(proxy_of(server.url, fault)) as proxy, Client(proxy.url) as client:
        tasks = [client.submit("x", **endless), client.submit("x", init_image=png(), **endless)]
        queued = [task.task_id for task in client.queue().tasks]
        assert lost == [tasks[0].task_id] * 2
        assert queued == [task.task_id for task in tasks]
        key = tasks[1].idempotency_key
        again = client.submit("x", init_image=png(), idempotency_key=key, **endless)
        assert again.task_id == tasks[1].task_id
        with pytest.raises(MfluxError) as refused:
            client.submit("x", idempotency_key=key, **endless)
        assert (refused.value.code, refused.value.http_status) == ("idempotency_key_reused", 422)


def test_a_picture_that_broke_off_is_fetched_again(server: ServerProcess) -> None:
    cut: list[int] = []

    def fault(asked: Asked, answer: requests.Response) -> bool:
        if asked.route != "/image" or cut:
            return False
        cut.append(len(answer.content))
        asked.begin(200, {"Content-Type": "image/jpeg", "Content-Length": str(cut[0])})
        asked.wfile.write(answer.content[: cut[0] // 2])
        asked.hang_up()
        return True

    with FarEnd(proxy_of(server.url, fault)) as proxy, Client(proxy.url) as client:
        task = client.submit("x", **SMALL)
        client.wait(task.task_id)
        image = client.image(task.task_id)
    assert cut == [len(image.data)]
    image.pil().load()


def test_a_cancel_whose_answer_was_lost_leaves_the_record(server: ServerProcess) -> None:
    lost: list[str] = []

    def fault(asked: Asked, answer: requests.Response) -> bool:
        if asked.route != "/delete" or answer.json()["was"] in lost:
            return False
        lost.append(answer.json()["was"])
        asked.hang_up()
        return True

    with FarEnd(proxy_of(server.url, fault)) as proxy, Client(proxy.url) as client:
        task = client.submit("x", **LONG)
        assert client.cancel(task.task_id) in ("waiting", "running")
        assert len(lost) == 1
        assert client.status(task.task_id).status == "cancelled"
        assert client.cancel(task.task_id) == "cancelled"
        with pytest.raises(MfluxError, match="deleted"):
            client.status(task.task_id)


def test_wait_continues_after_kill_9_and_a_restart(start_server: StartServer) -> None:
    first = start_server("--model", "noise-flux1")
    port = first.url.rpartition(":")[2]
    seen: list[str] = []
    retries: list[str] = []
    restart = threading.Thread(
        target=lambda: start_server("--model", "noise-flux1", "--port", port)
    )

    def kill_once_it_runs(status: Status) -> None:
        seen.append(status.status)
        if status.status == "running" and first.process.poll() is None:
            first.stop(signal.SIGKILL)

    def restart_once_it_is_missed(error: MfluxError, pause_s: float) -> None:
        if not retries:
            restart.start()
        retries.append(error.code)

    def hasten(seconds: float) -> None:
        threading.Event().wait(0.02)

    patient: dict[str, Any] = {"sleep": hasten, "retry_s": GIVE_UP_S}
    with Client(first.url, on_retry=restart_once_it_is_missed, **patient) as client:
        task = client.submit("x", **LONG)
        status = client.wait(task.task_id, on_status=kill_once_it_runs)
        restart.join()
        assert status.status == "done", status
        assert "running" in seen
        assert set(retries) == {"unreachable"}
        client.image(task.task_id).pil().load()
        assert client.queue().length == 0
