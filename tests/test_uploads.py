"""Pictures that clients send: every way to send them, and what is refused."""

import json
import os
import signal
import threading
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ServerProcess, StartServer
from PIL import Image, ImageOps
from sent_pictures import PNG, drawing, inputs_in
from served import served

from images import to_base64, to_png

LONG: dict[str, Any] = {"width": 2048, "height": 2048, "steps": 100}


def file_of(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format=format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    yield from served(
        tmp_path_factory.mktemp("desk") / "data", "--models", "noise-flux1,noise-flux2,noise-fill"
    )


USUAL: dict[str, Any] = {
    "prompt": "x",
    "seed": 1,
    "width": 64,
    "height": 64,
    "steps": 3,
    "format": "PNG",
}


def post(server: ServerProcess, **fields: Any) -> requests.Response:
    return requests.post(server.url + "/generate", json={**USUAL, **fields}, timeout=120)


def post_form(
    server: ServerProcess, files: Any, path: str = "/generate", **fields: Any
) -> requests.Response:
    data = {**USUAL, **fields}
    return requests.post(server.url + path, data=data, files=files, timeout=120)


def image_of(server: ServerProcess, answer: requests.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    task_id = answer.json()["task_id"]
    assert server.wait_until_ended(task_id)["status"] == "done"
    return server.get("/image", task_id=task_id, delete="false").content


def refusal(answer: requests.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    assert error["message"]
    return answer.status_code, error["code"], error.get("field")


@pytest.fixture(scope="module")
def expected(desk: ServerProcess) -> bytes:
    """What the drawing becomes, sent as plain base64."""
    return image_of(desk, post(desk, init_image=to_base64(PNG)))


def test_each_way_to_send_a_picture_gives_the_same_result(
    desk: ServerProcess, expected: bytes
) -> None:
    text = to_base64(PNG)
    wrapped = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    for way in (text, wrapped, f"data:image/png;base64,{text}", text.rstrip("=")):
        assert image_of(desk, post(desk, init_image=way)) == expected
    form = post_form(desk, {"init_image": ("my picture.png", PNG, "image/png")})
    assert image_of(desk, form) == expected
    misnamed = post_form(desk, {"init_image": ("x.jpg", PNG, "image/jpeg")})
    assert image_of(desk, misnamed) == expected
    as_text = post_form(desk, {"quality": (None, "85")}, init_image=text)
    assert image_of(desk, as_text) == expected
    assert image_of(desk, post(desk)) != expected


def test_the_result_of_another_task_is_sent_by_its_name(desk: ServerProcess) -> None:
    source = post(desk, count=2, seed=7)
    image_of(desk, source)
    task_id = source.json()["task_id"]
    second = desk.get("/image", task_id=task_id, index=1, delete="false").content
    sent = image_of(desk, post(desk, init_image=to_base64(second)))
    name = {"task_id": task_id, "index": 1}
    assert image_of(desk, post(desk, init_image=name)) == sent
    form = post_form(desk, {"quality": (None, "85")}, init_image=json.dumps(name))
    assert image_of(desk, form) == sent
    edited = [
        image_of(desk, post(desk, model="noise-flux2", images=[{"task_id": task_id}, name])),
        image_of(desk, post(desk, model="noise-flux2", images=[name, {"task_id": task_id}])),
    ]
    assert edited[0] != edited[1]
    assert refusal(post(desk, init_image={"task_id": "never"})) == (
        404,
        "unknown_task",
        "init_image",
    )
    running = desk.submit(**LONG)["task_id"]
    assert refusal(post(desk, init_image={"task_id": running})) == (409, "not_ready", "init_image")
    requests.delete(desk.url + "/delete", params={"task_id": running}, timeout=60)
    assert refusal(post(desk, init_image={"task_id": running})) == (410, "gone", "init_image")


def test_a_submit_that_is_repeated_needs_its_pictures_no_more(desk: ServerProcess) -> None:
    source = post(desk)
    image_of(desk, source)
    name = {"task_id": source.json()["task_id"]}
    asked = {"init_image": name, "guidance": 3, "client_task_id": "key of an edit"}
    first = post(desk, **asked)
    edited = image_of(desk, first)
    requests.delete(desk.url + "/delete", params=name, timeout=60)
    again = post(desk, **asked)
    assert again.json()["task_id"] == first.json()["task_id"]
    assert again.json()["params"] == first.json()["params"]
    assert again.json()["ignored_fields"] == first.json()["ignored_fields"] == ["guidance"]
    assert image_of(desk, again) == edited
    assert refusal(post(desk, **{**asked, "client_task_id": "other"}))[:2] == (410, "gone")


def test_a_key_with_another_picture_is_another_request(desk: ServerProcess) -> None:
    asked = {"image_strength": 0.5, "client_task_id": "key of a picture"}
    first = post(desk, init_image=to_base64(PNG), **asked)
    for same in (PNG, file_of(drawing(), "WEBP", lossless=True)):  # it is known by its pixels
        again = post(desk, init_image=to_base64(same), **asked)
        assert again.json()["task_id"] == first.json()["task_id"]
    other = to_base64(to_png(drawing().rotate(90)))
    assert refusal(post(desk, init_image=other, **asked)) == (
        422,
        "idempotency_key_reused",
        "client_task_id",
    )
    without = post(desk, client_task_id="key of a picture")
    assert refusal(without)[:2] == (422, "idempotency_key_reused")


def test_a_form_holds_lists_and_what_is_left_empty_counts_as_absent(desk: ServerProcess) -> None:
    first, second = PNG, to_png(drawing().rotate(90))
    text = [to_base64(first), to_base64(second)]
    expected = image_of(desk, post(desk, model="noise-flux2", images=text))
    files = [("images", ("a.png", first)), ("images", ("b.png", second))]
    assert image_of(desk, post_form(desk, files, model="noise-flux2")) == expected
    nothing = ("", b"", "application/octet-stream")
    empty = [*files, ("mask", nothing), ("init_image", nothing)]
    form = post_form(desk, empty, model="noise-flux2", negative_prompt="", guidance=" ")
    assert image_of(desk, form) == expected


def test_an_estimate_takes_a_form_too_and_keeps_nothing(
    desk: ServerProcess, tmp_path: Path
) -> None:
    answer = post_form(desk, {"init_image": ("a.png", PNG)}, path="/estimate")
    assert answer.status_code == 200
    assert answer.json()["params"]["init_image"]["width"] == 64
    assert "task_id" not in answer.json()


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_photograph_is_turned_as_its_camera_was_held(desk: ServerProcess, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    photograph = file_of(drawing(96, 64), "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(photograph)))
    accepted = post(desk, init_image=to_base64(photograph), width=48, height=48)
    body = accepted.json()["params"]["init_image"]
    assert (body["width"], body["height"]) == upright.size
    sent = post(desk, init_image=to_base64(to_png(upright)), width=48, height=48)
    assert image_of(desk, accepted) == image_of(desk, sent)


def test_a_mask_selects_where_the_picture_is_repainted(desk: ServerProcess) -> None:
    upper = Image.new("L", (64, 64), 0)
    upper.paste(255, (0, 0, 64, 32))
    in_colour = upper.convert("RGB")
    files = {"init_image": ("a.png", PNG), "mask": ("b.png", to_png(upper))}
    grey = image_of(desk, post_form(desk, files, model="noise-fill"))
    files["mask"] = ("b.png", to_png(in_colour))
    assert image_of(desk, post_form(desk, files, model="noise-fill")) == grey
    files["mask"] = ("b.png", to_png(ImageOps.invert(upper)))
    assert image_of(desk, post_form(desk, files, model="noise-fill")) != grey


def bomb(width: int, height: int) -> bytes:
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    end = zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + end + PNG[33:]


BAD_PICTURES = {
    "a text": b"I am no picture, whatever my name says.",
    "nothing": b"",
    "HTML": b"<html><body>404</body></html>",
    "cut in half": PNG[: len(PNG) // 2],
    "a cut JPEG": file_of(drawing(256, 256), "JPEG")[:1500],
    "a bomb": bomb(30_000, 30_000),
    "a bomb of one line": bomb(2**31 - 1, 1),
    "too small": to_png(drawing(15, 64)),
    "TIFF": file_of(drawing(), "TIFF"),
    "BMP": file_of(drawing(), "BMP"),
    "a ZIP": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_file_that_is_not_an_image_is_refused_with_its_field(
    desk: ServerProcess, name: str
) -> None:
    bad = BAD_PICTURES[name]
    text = to_base64(bad)
    assert refusal(post(desk, init_image=text)) == (400, "invalid_input", "init_image")
    assert refusal(post(desk, model="noise-flux2", images=[text])) == (
        400,
        "invalid_input",
        "images",
    )
    form = post_form(desk, {"init_image": ("a.png", bad, "image/png")})
    assert refusal(form) == (400, "invalid_input", "init_image")


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:1/a.png",
        "https://example.org/a.png",
        " HTTP://example.org/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "../../etc/passwd",
    ],
)
def test_an_address_of_a_picture_is_never_followed(desk: ServerProcess, address: str) -> None:
    assert refusal(post(desk, init_image=address)) == (400, "invalid_input", "init_image")
    form = post_form(desk, {"quality": (None, "85")}, init_image=address)
    assert refusal(form) == (400, "invalid_input", "init_image")


def test_a_form_with_a_file_that_no_field_is_or_broken_json_is_refused(desk: ServerProcess) -> None:
    assert refusal(post_form(desk, {"photo": ("a.png", PNG)})) == (400, "invalid_input", "photo")
    assert refusal(post_form(desk, {"seed": ("a.png", PNG)}))[2] == "seed"
    broken = post_form(desk, {"quality": (None, "85")}, init_image="{task_id: 1}")
    assert refusal(broken) == (400, "invalid_input", "init_image")
    cut = requests.post(
        desk.url + "/generate",
        data=b"--x\r\nContent-Disposition: form-data; name=prompt\r\n\r\nhalf",
        headers={"Content-Type": "multipart/form-data; boundary=x"},
        timeout=60,
    )
    assert 400 <= cut.status_code < 500
    urlencoded = requests.post(desk.url + "/generate", data={"prompt": "x"}, timeout=60)
    assert refusal(urlencoded)[:2] == (415, "unsupported_media_type")


@pytest.mark.slow
def test_bodies_of_40_mb_are_taken_while_the_server_keeps_answering(desk: ServerProcess) -> None:
    noise = Image.frombytes("RGB", (3200, 3100), os.urandom(3200 * 3100 * 3))
    large = file_of(noise, "PNG", compress_level=0)
    assert 29_000_000 < len(large) < 31_000_000
    answers: list[requests.Response] = []

    def send(index: int) -> None:
        if index % 2:
            answers.append(post(desk, init_image=to_base64(large)))
        else:
            pair = [("images", ("a.png", large)), ("images", ("b.png", large[: 10**7]))]
            answers.append(post_form(desk, pair, model="noise-flux2"))

    senders = [threading.Thread(target=send, args=(index,)) for index in range(4)]
    for sender in senders:
        sender.start()
    asked = 0
    while any(sender.is_alive() for sender in senders):
        assert desk.get("/health").status_code == 200
        asked += 1
    assert asked > 3
    for answer in answers:
        if answer.status_code == 200:
            image_of(desk, answer)
        else:  # the second picture of the form is cut off
            assert refusal(answer) == (400, "invalid_input", "images")
    assert [answer.status_code for answer in answers].count(200) == 2


def test_a_body_over_the_limit_is_a_413_as_json_and_as_a_form(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1", "--max-body-bytes", "100000")
    large = to_png(Image.frombytes("RGB", (256, 256), os.urandom(256 * 256 * 3)))
    assert refusal(post(server, init_image=to_base64(large)))[:2] == (413, "body_too_large")
    form = post_form(server, {"init_image": ("a.png", large)})
    assert refusal(form)[:2] == (413, "body_too_large")
    text = post_form(server, {"quality": (None, "85")}, prompt="x" * 200_000)
    assert refusal(text)[:2] == (413, "body_too_large")
    assert image_of(server, post_form(server, {"init_image": ("a.png", PNG)}))


def test_pictures_survive_kill_9_and_go_with_their_task(
    start_server: StartServer, tmp_path: Path
) -> None:
    data_dir = tmp_path / "server"
    server = start_server("--models", "noise-flux1,noise-flux2", "--refetch-s", "0")
    expected = image_of(server, post(server, init_image=to_base64(PNG)))
    assert inputs_in(data_dir) == set(), "they go with the end of their task"
    running = server.submit(**LONG)["task_id"]
    server.wait_for(running, lambda status: status["steps_done"] >= 1)
    waiting = post(server, init_image=to_base64(PNG)).json()["task_id"]
    doomed = post(server, init_image=to_base64(PNG)).json()["task_id"]
    assert inputs_in(data_dir) == {waiting, doomed}
    server.stop(signal.SIGKILL)

    (data_dir / "inputs" / "of-no-task").mkdir()
    (data_dir / "inputs" / ".DS_Store").write_bytes(b"Finder was here")
    server = start_server("--models", "noise-flux1,noise-flux2", "--refetch-s", "0")
    assert inputs_in(data_dir) == {waiting, doomed}
    for task_id in (running, doomed):
        requests.delete(server.url + "/delete", params={"task_id": task_id}, timeout=60)
    assert server.wait_until_ended(waiting)["status"] == "done"
    assert server.get("/image", task_id=waiting).content == expected
    requests.delete(server.url + "/delete", params={"task_id": doomed}, timeout=60)
    assert inputs_in(data_dir) == set()
