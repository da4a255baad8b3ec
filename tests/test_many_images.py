"""Several images of one task, and what image files tell of how they were made: over real HTTP."""

import base64
import signal
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ServerProcess, StartServer
from PIL import Image
from served import served

from api.task_answers import ImagesAnswer, StatusAnswer
from images import read_metadata, to_base64, to_png
from models import tiny_models

USUAL: dict[str, Any] = {
    "prompt": "a lighthouse",
    "seed": 5,
    "width": 64,
    "height": 64,
    "steps": 2,
    "format": "PNG",
}
LONG: dict[str, Any] = {"width": 1024, "height": 1024, "steps": 20}
PICTURE = to_base64(to_png(Image.linear_gradient("L").resize((64, 64)).convert("RGB")))


@pytest.fixture(scope="module")
def lora_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tiny_models.write_lora(folder / "wild.safetensors", "noise-flux1")
    return folder


@pytest.fixture(scope="module")
def press(tmp_path_factory: pytest.TempPathFactory, lora_dir: Path) -> Iterator[ServerProcess]:
    yield from served(
        tmp_path_factory.mktemp("press") / "data",
        *(
            "--models",
            "noise-flux1,noise-z-image,noise-controlnet,noise-redux,noise-fill,noise-flux2",
        ),
        *("--models-in-memory", "3"),
        *("--lora-dir", str(lora_dir)),
    )


def submit(server: ServerProcess, **fields: Any) -> str:
    answer = requests.post(server.url + "/generate", json={**USUAL, **fields}, timeout=60)
    assert answer.status_code == 200, answer.text
    task_id: str = answer.json()["task_id"]
    return task_id


def ended(server: ServerProcess, task_id: str) -> dict[str, Any]:
    status = server.wait_until_ended(task_id)
    StatusAnswer.model_validate(status)
    return status


def image(server: ServerProcess, task_id: str, index: int = 0, **query: Any) -> bytes:
    answer = server.get("/image", task_id=task_id, index=index, **{"delete": "false", **query})
    assert answer.status_code == 200, answer.text
    return answer.content


def drawn(server: ServerProcess, **fields: Any) -> bytes:
    task_id = submit(server, **fields)
    assert ended(server, task_id)["status"] == "done"
    return image(server, task_id)


def refusal(answer: requests.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error.get("field")


@pytest.fixture(scope="module")
def singles(press: ServerProcess) -> list[bytes]:
    """The images of the seeds that follow each other, each of a task of its own."""
    return [drawn(press, seed=5 + number) for number in range(3)]


def test_each_image_is_that_of_a_task_with_its_seed(
    press: ServerProcess, singles: list[bytes]
) -> None:
    task_id = submit(press, count=3)
    status = ended(press, task_id)
    assert (status["images_done"], status["params"]["count"]) == (3, 3)
    assert len(status["timings"]["step_s"]) == 6
    assert [image(press, task_id, index) for index in range(3)] == singles
    assert len(set(singles)) == 3
    for index in (3, 999):
        answer = press.get("/image", task_id=task_id, index=index)
        assert refusal(answer) == (400, "invalid_input", "index")
    for bad in ("-1", "1000", "x", "1.0"):
        answer = press.get("/image", task_id=task_id, index=bad)
        assert refusal(answer) == (400, "invalid_input", "index")


def test_n_is_the_same_as_count_and_one_is_usual(
    press: ServerProcess, singles: list[bytes]
) -> None:
    task_id = submit(press, n=2)
    assert ended(press, task_id)["images_done"] == 2
    assert [image(press, task_id, index) for index in (0, 1)] == singles[:2]
    alone = submit(press)
    assert "count" not in ended(press, alone)["params"] or (
        ended(press, alone)["params"]["count"] == 1
    )
    assert refusal(press.get("/image", task_id=alone, index=1)) == (400, "invalid_input", "index")


def test_the_seed_after_the_largest_is_0(press: ServerProcess) -> None:
    task_id = submit(press, seed=2**64 - 1, count=2)
    ended(press, task_id)
    assert image(press, task_id, 1) == drawn(press, seed=0)
    metadata = [read_metadata(image(press, task_id, index)) for index in (0, 1)]
    assert [answer and answer["seed"] for answer in metadata] == [2**64 - 1, 0]


def test_all_images_come_as_an_archive_or_as_json(
    press: ServerProcess, singles: list[bytes]
) -> None:
    task_id = submit(press, count=3)
    ended(press, task_id)
    answer = press.get("/image", task_id=task_id, all="true", delete="false")
    assert answer.headers["Content-Type"] == "application/zip"
    assert f"{task_id}.zip" in answer.headers["Content-Disposition"]
    with zipfile.ZipFile(BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert names == [f"{task_id}-{index}.png" for index in range(3)]
        assert [archive.read(name) for name in names] == singles
    answer = press.get("/image", task_id=task_id, all="true", base64="true", delete="false")
    assert answer.headers["Content-Type"] == "application/json"
    listed = ImagesAnswer.model_validate(answer.json()).images
    assert [(one.index, one.seed, one.content_type) for one in listed] == [
        (index, str(5 + index), "image/png") for index in range(3)
    ]
    assert [base64.b64decode(one.base64) for one in listed] == singles
    one = press.get("/image", task_id=task_id, index=1, base64="true", delete="false")
    assert base64.b64decode(one.text) == singles[1]


def test_the_images_of_one_task_go_when_all_of_them_were_fetched(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server("--model", "noise-flux1", "--refetch-s", "0")

    def files() -> int:
        return len(list((tmp_path / "server" / "images").iterdir()))

    def wait_until_gone(task_id: str) -> None:
        while server.get("/status", task_id=task_id).status_code != 410 or files():
            pass  # they go once the last one was sent

    task_id = submit(server, count=3)
    ended(server, task_id)
    for index in (1, 0, 1, 0):
        assert image(server, task_id, index, delete="true")
        assert files() == 3
    assert server.get("/health").json()["done"] == 1
    image(server, task_id, 2, delete="true")
    wait_until_gone(task_id)
    assert refusal(server.get("/image", task_id=task_id))[:2] == (410, "gone")
    assert server.get("/health").json()["images_bytes"] == 0

    task_id = submit(server, count=2)
    ended(server, task_id)
    assert server.get("/image", task_id=task_id, all="true").status_code == 200
    wait_until_gone(task_id)


def test_a_fetched_image_can_be_fetched_again_for_a_time(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1")
    task_id = submit(server, count=2)
    ended(server, task_id)
    first = image(server, task_id, 0, delete="true")
    second = image(server, task_id, 1, delete="true")
    assert [image(server, task_id, index, delete="true") for index in (0, 1)] == [first, second]
    answer = server.get("/image", task_id=task_id, all="true")
    assert len(zipfile.ZipFile(BytesIO(answer.content)).namelist()) == 2
    server.stop()
    server = start_server("--model", "noise-flux1", "--refetch-s", "0")
    assert refusal(server.get("/image", task_id=task_id))[:2] == (410, "gone")


def test_several_images_cancelled_in_the_middle_keep_those_that_are_stored(
    press: ServerProcess,
) -> None:
    task_id = submit(press, **LONG, count=10)
    behind = submit(press)
    seen = []

    def second_image(status: dict[str, Any]) -> bool:
        seen.append((status["images_done"], status["progress"]))
        return bool(status["images_done"] >= 1 and status["steps_done"] >= 1)

    status = press.wait_for(task_id, second_image)
    assert seen == sorted(seen)
    assert status["steps_total"] == 20
    assert status["steps_done"] <= 20
    first = image(press, task_id)
    assert refusal(press.get("/image", task_id=task_id, all="true"))[:2] == (409, "not_ready")
    requests.delete(press.url + "/delete", params={"task_id": task_id}, timeout=60)
    assert ended(press, behind)["status"] == "done"
    state = ended(press, task_id)
    assert state["status"] == "cancelled"
    assert 1 <= state["images_done"] < 10
    assert image(press, task_id) == first
    answer = press.get("/image", task_id=task_id, all="true", delete="false")
    with zipfile.ZipFile(BytesIO(answer.content)) as archive:
        assert len(archive.namelist()) == state["images_done"]
    assert refusal(press.get("/image", task_id=task_id, index=9))[:2] == (410, "gone")


def test_a_task_that_was_to_end_after_an_image_ends_so_after_kill_9(
    start_server: StartServer,
) -> None:
    server = start_server("--model", "noise-flux1")
    task_id = submit(server, **LONG, count=10)
    server.wait_for(task_id, lambda status: bool(status["images_done"] >= 1))
    answer = requests.delete(
        server.url + "/delete", params={"task_id": task_id, "after_current": "true"}, timeout=60
    )
    assert answer.json()["was"] == "running"
    before = server.get("/status", task_id=task_id).json()
    server.stop(signal.SIGKILL)
    server = start_server("--model", "noise-flux1")
    state = ended(server, task_id)
    assert state["status"] == "cancelled"
    # What was drawn and not stored yet, at the encoder, is lost with the process.
    assert before["images_done"] <= state["images_done"] <= before["last_image"] + 1
    for index in range(state["images_done"]):
        assert Image.open(BytesIO(image(server, task_id, index))).size == (1024, 1024)


def test_after_kill_9_in_the_middle_only_the_images_that_are_missing_are_drawn(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server("--model", "noise-flux1")
    task_id = submit(server, width=256, height=256, steps=12, count=4)
    server.wait_for(task_id, lambda status: status["images_done"] >= 2)
    folder = tmp_path / "server" / "images"
    before = {name: (folder / name).stat().st_mtime_ns for name in (task_id, f"{task_id}.1")}
    server.stop(signal.SIGKILL)
    server = start_server("--model", "noise-flux1")
    assert server.get("/status", task_id=task_id).json()["images_done"] >= 2
    assert ended(server, task_id)["status"] == "done"
    assert before == {name: (folder / name).stat().st_mtime_ns for name in before}
    files = [image(server, task_id, index) for index in range(4)]
    alone = submit(server, width=256, height=256, steps=12, seed=7)
    ended(server, alone)
    assert image(server, alone) == files[2]
    assert len(list((tmp_path / "server" / "images").iterdir())) == 5
    server.stop(signal.SIGKILL)
    (tmp_path / "server" / "images" / f"{task_id}.3").unlink()
    server = start_server("--model", "noise-flux1")
    assert refusal(server.get("/image", task_id=task_id))[:2] == (410, "gone")
    assert image(server, alone) == files[2]
    assert [path.name for path in (tmp_path / "server" / "images").iterdir()] == [alone]


def test_the_forecast_of_several_images_is_that_of_their_sum(press: ServerProcess) -> None:
    for _ in range(3):
        drawn(press, width=256, height=256, steps=4)

    def estimate(count: int) -> float:
        body = {**USUAL, "width": 256, "height": 256, "steps": 4, "count": count}
        answer = requests.post(press.url + "/estimate", json=body, timeout=60).json()
        return float(answer["expected_time_seconds"])

    one, two, nine = estimate(1), estimate(2), estimate(9)
    assert one < two < nine
    assert nine - one == pytest.approx(8 * (two - one), rel=0.01)


# -- what the files tell ---------------------------------------------------------------------------


def mflux_metadata_of(file: bytes, tmp_path: Path) -> dict[str, Any]:
    """What mflux itself reads from an image file."""
    from mflux.utils.metadata_reader import MetadataReader

    path = tmp_path / "image"
    path.write_bytes(file)
    metadata = MetadataReader.read_all_metadata(path)["exif"]
    assert metadata == read_metadata(file)
    assert isinstance(metadata, dict)
    return metadata


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_mflux_reads_from_each_format_how_the_image_was_made(
    press: ServerProcess, tmp_path: Path, lora_dir: Path, format: str
) -> None:
    asked = {
        "model": "noise-z-image",
        "prompt": "ein Leuchtturm bei Nacht, 灯台",
        "negative_prompt": 'red, "blue" & <green>',
        "guidance": 3.5,
        "steps": 3,
        "width": 80,
        "init_image": PICTURE,
        "image_strength": 0.4,
        "scheduler": "linear",
        "format": format,
    }
    task_id = submit(press, **asked, count=2)
    ended(press, task_id)
    for index in (0, 1):
        file = image(press, task_id, index)
        metadata = mflux_metadata_of(file, tmp_path)
        wanted = {**asked, "seed": 5 + index, "height": 64}
        for name in set(wanted) - {"init_image", "format"}:
            assert metadata[name] == wanted[name], name
        assert "/" not in metadata["image_path"]
        assert b"/inputs/" not in file
        assert "created_at" not in metadata
        answer = press.get("/image", task_id=task_id, index=index, metadata="true")
        assert answer.json() == metadata
    again = submit(press, **asked, count=2)
    ended(press, again)
    for index in (0, 1):
        assert image(press, again, index) == image(press, task_id, index)
    assert image(press, task_id, 0) != image(press, task_id, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "noise-controlnet", "control_image": PICTURE, "control_strength": 0.6},
        {"model": "noise-redux", "images": [PICTURE, PICTURE]},
        {"model": "noise-fill", "init_image": PICTURE, "mask": PICTURE},
        {"model": "noise-flux2", "images": [PICTURE]},
        {"model": "noise-flux1", "loras": [{"name": "wild", "scale": 0.75}]},
    ],
    ids=lambda fields: fields["model"],
)
def test_no_file_contains_a_path_of_this_machine(
    press: ServerProcess, tmp_path: Path, lora_dir: Path, fields: dict[str, Any]
) -> None:
    file = drawn(press, **fields)
    metadata = mflux_metadata_of(file, tmp_path)
    assert (metadata["model"], metadata["prompt"], metadata["steps"]) == (
        fields["model"],
        "a lighthouse",
        2,
    )
    for folder in (lora_dir, tmp_path.parent, Path.home(), Path.cwd()):
        assert str(folder).encode() not in file
    assert b"/inputs/" not in file
    if "loras" in fields:
        assert (metadata["lora_paths"], metadata["lora_scales"]) == (["wild"], [0.75])
    if "control_strength" in fields:
        assert metadata["controlnet_strength"] == 0.6


def test_a_task_may_ask_for_files_that_tell_nothing(press: ServerProcess) -> None:
    task_id = submit(press, metadata=False, negative_prompt=None)
    ended(press, task_id)
    file = image(press, task_id)
    assert read_metadata(file) is None
    assert b"lighthouse" not in file
    with_it = drawn(press)
    assert b"lighthouse" in with_it
    assert Image.open(BytesIO(with_it)).tobytes() == Image.open(BytesIO(file)).tobytes()
    metadata = press.get("/image", task_id=task_id, metadata="true").json()
    assert (metadata["prompt"], metadata["seed"], metadata["steps"]) == ("a lighthouse", 5, 2)
    assert image(press, task_id) == file, "asking for it removes nothing"


def test_the_operator_may_turn_it_off_and_a_task_on_again(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1", "--metadata", "off")
    assert read_metadata(drawn(server)) is None
    metadata = read_metadata(drawn(server, metadata=True))
    assert metadata
    assert metadata["prompt"] == "a lighthouse"


def test_a_prompt_too_long_for_a_jpeg_is_shortened_in_it_and_whole_in_a_png(
    press: ServerProcess, tmp_path: Path
) -> None:
    prompt = "灯台 " * 3300
    assert mflux_metadata_of(drawn(press, prompt=prompt), tmp_path)["prompt"] == prompt
    metadata = mflux_metadata_of(drawn(press, prompt=prompt, format="JPEG"), tmp_path)
    assert metadata["prompt"] == prompt or metadata["prompt"].endswith(" [shortened]")
    assert metadata["seed"] == 5
