"""What many or large pictures of clients may cost: time, memory, disk, no other answers."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, ServerProcess, StartServer, until
from live import SteppedServer
from PIL import Image

from decoding.decoder import LINE, PROCESSES, PictureDecoder
from images import encode_image, to_base64, to_png, with_png_text

THREADS = 64
PNG = to_png(Image.linear_gradient("L").convert("RGB"))


def file_of(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format=format, **options)
    return buffer.getvalue()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[SteppedServer]:
    server = SteppedServer(tmp_path / "data", threads=THREADS, input_bytes=400_000)
    yield server
    server.close()


def decoder_of(server: SteppedServer) -> PictureDecoder:
    return server.server._decoder


def post(server: SteppedServer, path: str = "/generate", **fields: Any) -> requests.Response:
    body = {"prompt": "x", "width": 64, "height": 64, "steps": 3, **fields}
    return requests.post(server.url + path, json=body, timeout=GIVE_UP_S)


@contextmanager
def all_decoders_busy(server: SteppedServer) -> Iterator[None]:
    """Until the block ends. The requests hold one place for a waiting request each."""
    held, over = [Event() for _ in range(PROCESSES)], Event()

    def hold(taken: Event) -> None:
        with decoder_of(server).reading():
            taken.set()
            over.wait(GIVE_UP_S)

    threads = [Thread(target=hold, args=(taken,)) for taken in held]
    for thread in threads:
        thread.start()
    try:
        assert all(taken.wait(GIVE_UP_S) for taken in held)
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(GIVE_UP_S)


def refusal(answer: requests.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    assert error["message"]
    return answer.status_code, error["code"], error.get("field")


def test_many_pictures_leave_threads_for_others_and_the_excess_gets_retry_after(
    live: SteppedServer,
) -> None:
    task_id = live.submit()
    with ThreadPoolExecutor(90) as clients:
        with all_decoders_busy(live):
            flood = [
                clients.submit(post, live, "/estimate", init_image=to_base64(PNG))
                for _ in range(90)
            ]
            while sum(future.done() for future in flood) < 90 - LINE:
                assert live.status(task_id)["task_id"] == task_id
                assert live.get("/health").status_code == 200
        answers = [future.result(GIVE_UP_S) for future in flood]
    later = [answer for answer in answers if answer.status_code == 429]
    assert len(later) >= 90 - LINE
    assert {refusal(answer)[1] for answer in later} == {"too_many_waiting"}
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in later)
    assert [answer.status_code for answer in answers if answer not in later] == [200] * (
        90 - len(later)
    )
    assert len(later) < 90
    assert post(live, "/estimate", init_image=to_base64(PNG)).status_code == 200


def test_a_picture_that_takes_too_long_is_refused_by_the_name_of_its_field(
    live: SteppedServer,
) -> None:
    scans = file_of(Image.new("RGB", (1000, 1000)), "JPEG", progressive=True)
    scan = scans[scans.rfind(b"\xff\xda") : -2]
    usual_s, decoder_of(live).deadline_s = decoder_of(live).deadline_s, 0.5
    endless = to_base64(scans[:-2] + scan * 50_000 + scans[-2:])
    assert refusal(post(live, init_image=endless)) == (400, "invalid_input", "init_image")
    decoder_of(live).deadline_s = usual_s
    assert post(live, init_image=to_base64(PNG)).status_code == 200


def test_a_killed_decoder_affects_only_its_own_request(live: SteppedServer) -> None:
    killed = decoder_of(live).take()
    os.kill(killed._process.pid, 9)
    decoder_of(live).give_back(killed)
    answer = post(live, init_image=to_base64(PNG))
    assert refusal(answer) == (400, "invalid_input", "init_image")
    assert post(live, init_image=to_base64(PNG)).status_code == 200


def resident_mb(server: ServerProcess) -> float:
    shown = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(server.process.pid)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(shown.stdout) / 1000


def test_the_memory_of_the_server_does_not_grow_with_the_pictures_it_takes(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "noise-flux1")
    large = to_base64(file_of(Image.new("RGB", (7000, 7000)), "PNG"))
    server.submit()
    before = resident_mb(server)
    for _ in range(3):
        body = {"prompt": "x", "init_image": large}
        answer = requests.post(server.url + "/estimate", json=body, timeout=GIVE_UP_S)
        assert answer.status_code == 200, answer.text
        assert answer.json()["params"]["width"] == 1024
    assert resident_mb(server) < before + 100


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc keeps freed memory")
def test_the_memory_of_large_bodies_is_returned_to_the_system(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1")
    server.submit()
    before = resident_mb(server)
    body = b'{"prompt": "x", "init_image": "' + b"A" * 12_000_000 + b'"}'

    def send(_: int) -> int:
        headers = {"Content-Type": "application/json"}
        answer = requests.post(
            server.url + "/generate", data=body, headers=headers, timeout=GIVE_UP_S
        )
        return answer.status_code

    with ThreadPoolExecutor(8) as clients:
        assert set(clients.map(send, range(24))) <= {400, 429, 503}
    assert resident_mb(server) < before + 100


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_no_decoder_outlives_the_server(start_server: StartServer, end: signal.Signals) -> None:
    server = start_server("--model", "noise-flux1")
    body = {"prompt": "x", "init_image": to_base64(PNG)}
    answer = requests.post(server.url + "/estimate", json=body, timeout=GIVE_UP_S)
    assert answer.status_code == 200
    listed = subprocess.run(
        ["pgrep", "-P", str(server.process.pid), "-f", "decoding.child"],
        capture_output=True,
        text=True,
        check=True,
    )
    (decoder,) = listed.stdout.split()
    server.stop(end)
    until(lambda: not _runs(decoder))


def _runs(process_id: str) -> bool:
    shown = subprocess.run(
        ["ps", "-o", "stat=", "-p", process_id], capture_output=True, text=True, check=False
    )
    return shown.stdout.strip() not in ("", "Z", "ZN")


def test_a_large_picture_is_kept_no_larger_than_its_task_can_use(
    tmp_path: Path,
) -> None:
    server = SteppedServer(tmp_path / "server", "noise-flux1", "noise-flux2", "noise-seedvr2")
    server.running()  # the others wait
    noise = Image.effect_noise((2000, 1500), 90).convert("RGB")
    sent = to_base64(file_of(noise, "JPEG", quality=30))

    def kept(**fields: Any) -> tuple[tuple[int, int], int]:
        body = {"prompt": "x", **fields}
        answer = requests.post(server.url + "/generate", json=body, timeout=GIVE_UP_S)
        assert answer.status_code == 200, answer.text
        params = answer.json()["params"]
        result = params.get("init_image") or params["images"][0]
        folder = tmp_path / "server" / "inputs" / answer.json()["task_id"]
        (path,) = folder.iterdir()
        with Image.open(path) as picture:
            assert picture.size == (result["width"], result["height"])
        return (result["width"], result["height"]), path.stat().st_size

    size, stored_bytes = kept(init_image=sent)
    assert size == (1182, 886)  # 1 megapixel of the same shape
    assert stored_bytes < 3_500_000
    assert kept(init_image=sent, width=1200, height=1200)[0] == (1600, 1200)  # covers the result
    assert kept(init_image=sent, width=64, height=64)[0] == (1182, 886)
    assert kept(images=[sent], width=512, height=512, model="noise-flux2")[0] == (1182, 886)
    small = to_base64(PNG)
    assert kept(init_image=small, width=1024, height=1024)[0] == (256, 256)  # not enlarged
    photo = to_base64(file_of(noise.resize((1400, 1050)), "JPEG"))
    upscaled = {"model": "noise-seedvr2", "prompt": None, "upscale": 2}
    assert kept(init_image=photo, **upscaled)[0] == (1400, 1050)  # an upscaler uses all of it
    server.close()


def test_the_pictures_of_waiting_tasks_have_a_quota(live: SteppedServer) -> None:
    noise = Image.frombytes("RGB", (200, 200), os.urandom(200 * 200 * 3))
    half = to_base64(to_png(noise))  # a third of the quota
    running = live.running()
    waiting = [post(live, init_image=half).json()["task_id"] for _ in range(3)]
    full = post(live, init_image=half)
    assert refusal(full)[:2] == (429, "inputs_full")
    assert int(full.headers["Retry-After"]) > 0
    live.submit()  # one without pictures is taken
    assert post(live, init_image=to_base64(PNG)).status_code == 200  # and one with a small one
    requests.delete(live.url + "/delete", params={"task_id": waiting[0]}, timeout=GIVE_UP_S)
    assert post(live, init_image=half).status_code == 200
    large = Image.frombytes("RGB", (400, 400), os.urandom(400 * 400 * 3))
    never = post(live, init_image=to_base64(to_png(large)))
    assert refusal(never)[:2] == (507, "inputs_too_large")
    assert live.status(running)["status"] == "running"


def test_thumbnails_are_made_a_few_at_a_time_and_kept(live: SteppedServer) -> None:
    task_id = live.submit()
    live.end()
    while live.status(task_id)["status"] != "done":
        live.status(task_id, wait=60)

    def thumbnail(size: int) -> requests.Response:
        return live.get("/thumbnail", task_id=task_id, size=size)

    assert thumbnail(64).status_code == 200
    with ThreadPoolExecutor(128) as clients:
        with all_decoders_busy(live):
            assert thumbnail(64).status_code == 200  # it is kept
            crowd = [clients.submit(thumbnail, 128) for _ in range(128)]
            while sum(future.done() for future in crowd) < 128 - LINE:
                assert live.get("/health").status_code == 200
        answers = [future.result(GIVE_UP_S) for future in crowd]
    later = [answer for answer in answers if answer.status_code == 429]
    assert 128 - LINE <= len(later) < 128
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in later)
    small = {answer.content for answer in answers if answer.status_code == 200}
    assert len(small) == 1
    with Image.open(BytesIO(small.pop())) as picture:
        assert (picture.format, picture.size) == ("JPEG", (64, 64))
    with all_decoders_busy(live):
        assert thumbnail(128).status_code == 200
    requests.delete(live.url + "/delete", params={"task_id": task_id}, timeout=GIVE_UP_S)
    assert thumbnail(128).status_code == 410


def test_many_requests_for_one_thumbnail_wait_for_one_decoder(tmp_path: Path) -> None:
    server = SteppedServer(tmp_path / "data", threads=160)
    task_id = server.submit()
    server.end()
    while server.status(task_id)["status"] != "done":
        server.status(task_id, wait=60)
    with ThreadPoolExecutor(100) as clients:
        with all_decoders_busy(server):
            crowd = [clients.submit(server.get, "/thumbnail", task_id=task_id) for _ in range(100)]
            while server.server.places.taken < 100 + PROCESSES:
                assert server.get("/health").status_code == 200
        answers = [future.result(GIVE_UP_S) for future in crowd]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    server.close()


def test_png_info_reads_large_bodies_within_the_budget_of_uploads(live: SteppedServer) -> None:
    noise = Image.frombytes("RGB", (1000, 800), os.urandom(1000 * 800 * 3))
    made = with_png_text(encode_image(noise, "PNG", 90, {"seed": 7}), "parameters", "a lighthouse")
    body = {"image": to_base64(made)}
    assert len(body["image"]) > 1_000_000

    def ask() -> requests.Response:
        return requests.post(live.url + "/sdapi/v1/png-info", json=body, timeout=GIVE_UP_S)

    with ThreadPoolExecutor(8) as clients:
        with all_decoders_busy(live):
            waiting = [clients.submit(ask) for _ in range(8)]
            for _ in range(20):
                assert live.get("/health").status_code == 200
            assert not any(future.done() for future in waiting)
        answers = [future.result(GIVE_UP_S) for future in waiting]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.json()["info"] == "a lighthouse"
        assert answer.json()["parameters"] == {"seed": 7}
