"""Every tiny model through the whole server: what it draws, what it says of itself, loading."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import RunServer, ServerProcess, StartServer, slow_except
from PIL import Image, ImageDraw

from api.model_answers import ModelAnswer, ModelsAnswer
from api.server_answers import HealthAnswer
from images import read_metadata, to_base64, to_png
from models import tiny_models

MODELS = (
    "noise-flux1",
    "noise-flux2",
    "noise-z-image",
    "noise-qwen",
    "noise-kontext",
    "noise-fill",
    "noise-redux",
    "noise-controlnet",
    "noise-seedvr2",
)


def circle(size: int = 64) -> Image.Image:
    picture = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(picture).ellipse((8, 8, size - 24, size - 24), fill="black")
    return picture


def triangle() -> Image.Image:
    picture = Image.new("RGB", (64, 64), "navy")
    ImageDraw.Draw(picture).polygon((8, 60, 40, 4, 60, 60), fill="red")
    return picture


def mask(box: tuple[int, int, int, int]) -> Image.Image:
    picture = Image.new("L", (64, 64), 0)
    picture.paste(255, box)
    return picture


def as_text(picture: Image.Image) -> str:
    return to_base64(to_png(picture))


CIRCLE, TRIANGLE = as_text(circle()), as_text(triangle())
UPPER, LEFT = as_text(mask((0, 0, 64, 32))), as_text(mask((0, 0, 32, 64)))


@pytest.fixture(scope="module")
def lora_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    (folder / "style").mkdir()
    tiny_models.write_lora(folder / "wild.safetensors", "noise-flux1")
    tiny_models.write_lora(folder / "style" / "klein.safetensors", "noise-flux2")
    return folder


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, lora_dir: Path) -> Iterator[ServerProcess]:
    """A server that offers every tiny model."""
    process = ServerProcess(
        tmp_path_factory.mktemp("studio"),
        *("--models", ",".join(MODELS)),
        *("--models-in-memory", "3"),
        *("--lora-dir", str(lora_dir)),
    )
    yield process
    assert process.stop() == 0
    assert "Traceback" not in "".join(process.log)


def post(server: ServerProcess, **fields: Any) -> requests.Response:
    body = {"width": 64, "height": 64, "steps": 3, "format": "PNG", "seed": 1, **fields}
    body = {name: value for name, value in body.items() if value is not None}
    return requests.post(server.url + "/generate", json=body, timeout=60)


def submit(server: ServerProcess, **fields: Any) -> str:
    answer = post(server, **fields)
    assert answer.status_code == 200, answer.text
    task_id: str = answer.json()["task_id"]
    return task_id


def drawn(server: ServerProcess, **fields: Any) -> bytes:
    """The file that a task makes."""
    return fetched(server, submit(server, **fields))


def fetched(server: ServerProcess, task_id: str, **query: Any) -> bytes:
    done = server.wait_until_ended(task_id)
    assert done["status"] == "done", done
    answer = server.get("/image", task_id=task_id, delete="false", **query)
    assert answer.status_code == 200
    return answer.content


def picture_in(file: bytes) -> Image.Image:
    return Image.open(BytesIO(file)).convert("RGB")


GUIDED = {"guidance": 4.0}
CHANGES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "noise-flux1": ({}, [{"scheduler": "flow_match_euler_discrete"}]),
    "noise-flux2": ({}, []),
    "noise-z-image": (GUIDED, [{"negative_prompt": "red"}, {"guidance": 2.5}]),
    "noise-qwen": (GUIDED, [{"negative_prompt": "red"}, {"guidance": 2.5}]),
    "noise-kontext": ({"images": [CIRCLE]}, [{"images": [TRIANGLE]}, {"guidance": 2.0}]),
    "noise-fill": (
        {"init_image": CIRCLE, "mask": UPPER},
        [{"init_image": TRIANGLE}, {"mask": LEFT}, {"guidance": 2.0}],
    ),
    "noise-redux": (
        {"images": [CIRCLE]},
        [{"images": [TRIANGLE]}, {"images": [CIRCLE, TRIANGLE]}, {"reference_strengths": [0.3]}],
    ),
    "noise-controlnet": (
        {"control_image": CIRCLE},
        [{"control_image": TRIANGLE}, {"control_strength": 0.5}],
    ),
}
"""What each model needs, and what changes its picture beside prompt, seed, steps and size."""
IMG2IMG = ("noise-flux1", "noise-flux2", "noise-z-image", "noise-qwen")


@pytest.mark.parametrize("name", slow_except(["noise-flux1", "noise-fill"], CHANGES))
def test_a_picture_depends_on_all_that_is_asked_for_and_is_the_same_again(
    studio: ServerProcess, name: str
) -> None:
    needs, own = CHANGES[name]
    changes: list[dict[str, Any]] = [
        {},
        {"prompt": "a fox"},
        {"seed": 2},
        {"steps": 4},
        {"width": 80},
        *own,
    ]
    if name in IMG2IMG:
        changes += [
            {"init_image": CIRCLE},
            {"init_image": TRIANGLE},
            {"init_image": CIRCLE, "image_strength": 0.7},
        ]
    tasks = [
        submit(studio, **{"model": name, "prompt": "a lighthouse", **needs, **change})
        for change in [*changes, {}]
    ]
    files = [fetched(studio, task_id) for task_id in tasks]
    assert files[0] == files[-1], "equal params give equal files"
    pictures = [picture_in(file).tobytes() for file in files[:-1]]
    for number, change in enumerate(changes):
        for other in range(number):
            assert pictures[number] != pictures[other], (change, changes[other])
    assert picture_in(files[4]).size == (80, 64)


def test_the_strength_of_an_init_image_is_04_where_none_is_asked_for(studio: ServerProcess) -> None:
    one = post(studio, model="noise-flux1", prompt="x", init_image=CIRCLE).json()
    assert one["params"]["image_strength"] == 0.4
    assert one["params"]["init_image"].keys() == {"id", "width", "height"}
    same = submit(studio, model="noise-flux1", prompt="x", init_image=CIRCLE, image_strength=0.4)
    assert fetched(studio, one["task_id"]) == fetched(studio, same)


def test_klein_edits_one_picture_and_several(studio: ServerProcess) -> None:
    asked = {"model": "noise-flux2", "prompt": "make it red"}
    files = [
        drawn(studio, **asked),
        drawn(studio, **asked, images=[CIRCLE]),
        drawn(studio, **asked, images=[TRIANGLE]),
        drawn(studio, **asked, images=[CIRCLE, TRIANGLE]),
        drawn(studio, **asked, images=[TRIANGLE, CIRCLE]),
    ]
    assert len({picture_in(file).tobytes() for file in files}) == len(files)
    assert drawn(studio, **asked, images=[CIRCLE]) == files[1]
    sized = post(studio, **asked, images=[as_text(circle(100))], width=None, height=None).json()
    assert (sized["params"]["width"], sized["params"]["height"]) == (96, 96)
    assert picture_in(fetched(studio, sized["task_id"])).size == (96, 96)


NOTHING: dict[str, Any] = {"width": None, "height": None, "steps": None}


def test_an_input_image_is_upscaled(studio: ServerProcess) -> None:
    asked = {"model": "noise-seedvr2", **NOTHING, "upscale": 2}
    files = [drawn(studio, **asked, init_image=source) for source in (CIRCLE, TRIANGLE, CIRCLE)]
    assert picture_in(files[0]).size == (128, 128)
    assert files[0] == files[2] != files[1]
    odd = as_text(Image.new("RGB", (50, 37), "teal"))
    answer = post(studio, **{**asked, "upscale": 1.5}, init_image=odd).json()
    width, height = picture_in(fetched(studio, answer["task_id"])).size
    assert (width, height) == (74, 56)
    assert abs(width - 75) < 2 > abs(height - 55.5)


def test_the_picture_of_a_finished_task_is_upscaled(studio: ServerProcess) -> None:
    source = submit(studio, model="noise-qwen", prompt="x", count=2)
    first, second = (fetched(studio, source, index=index) for index in (0, 1))
    asked = {"model": "noise-seedvr2", **NOTHING, "upscale": 3}
    for index, file in enumerate((first, second)):
        by_name = drawn(studio, **asked, init_image={"task_id": source, "index": index})
        sent = drawn(studio, **asked, init_image=to_base64(file))
        assert picture_in(by_name).size == (192, 192)
        assert by_name == sent
    refused = post(studio, **asked, init_image={"task_id": source, "index": 2})
    assert (refused.status_code, refused.json()["error"]["field"]) == (400, "init_image")


def test_a_task_is_generated_and_upscaled(studio: ServerProcess) -> None:
    asked = {"model": "noise-z-image", "prompt": "x", "guidance": 3, "negative_prompt": "red"}
    plain = submit(studio, **asked, count=2)
    task_id = submit(studio, **asked, upscale=1.5, count=2)
    status = studio.get("/status", task_id=task_id).json()["params"]
    assert (status["upscale"], status["width"]) == (1.5, 64)
    for index in (0, 1):
        enlarged = fetched(studio, task_id, index=index)
        assert picture_in(enlarged).size == (96, 96)
        apart = drawn(
            studio,
            model="noise-seedvr2",
            **{**NOTHING, "seed": 1 + index},
            upscale=1.5,
            init_image={"task_id": plain, "index": index},
        )
        assert picture_in(apart).tobytes() == picture_in(enlarged).tobytes()
        metadata = read_metadata(enlarged)
        assert metadata
        assert (metadata["model"], metadata["seed"]) == ("noise-z-image", 1 + index)
        assert metadata["prompt"] == "x"


# -- adapters --------------------------------------------------------------------------------------


def test_an_adapter_changes_the_picture_as_strongly_as_it_is_asked_to(
    studio: ServerProcess, lora_dir: Path
) -> None:
    for model, lora in (("noise-flux1", "wild"), ("noise-flux2", "style/klein")):
        asked = {"model": model, "prompt": "x"}
        plain = picture_in(drawn(studio, **asked)).tobytes()
        full = drawn(studio, **asked, loras=[lora])
        none = drawn(studio, **asked, loras=[{"name": lora, "scale": 0}])
        half = drawn(studio, **asked, loras=[{"name": lora, "scale": 0.5}])
        assert picture_in(none).tobytes() == plain
        assert len({plain, *(picture_in(file).tobytes() for file in (full, half))}) == 3
        assert drawn(studio, **asked, loras=[{"name": lora, "scale": 1}]) == full
        assert picture_in(drawn(studio, **asked)).tobytes() == plain
        metadata = read_metadata(half)
        assert metadata
        assert (metadata["lora_paths"], metadata["lora_scales"]) == ([lora], [0.5])
        assert str(lora_dir).encode() not in half


def test_adapters_are_listed_and_a_broken_one_is_refused(
    studio: ServerProcess, lora_dir: Path
) -> None:
    listed = studio.get("/models").json()["loras"]
    assert [lora["name"] for lora in listed] == ["style/klein", "wild"]
    broken = lora_dir / "broken.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0{not json, truly")
    try:
        error = post(studio, model="noise-flux1", prompt="x", loras=["broken"]).json()["error"]
        assert (error["code"], error["field"]) == ("unusable_adapter", "loras")
        assert error["message"].startswith(
            "The LoRA 'broken' cannot be used: its header is not JSON."
        )
    finally:
        broken.unlink()
    refused = post(studio, model="noise-flux1", prompt="x", loras=["broken"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "not_supported")


# -- descriptions of models ------------------------------------------------------------------------


def test_all_models_are_listed_those_first_that_are_allowed(studio: ServerProcess) -> None:
    studio.wait_until_ended(
        submit(studio, model="noise-fill", prompt="x", **CHANGES["noise-fill"][0])
    )
    answer = ModelsAnswer.model_validate(studio.get("/models").json())
    assert answer.default == "noise-flux1"
    names = [model.name for model in answer.models]
    assert tuple(names[: len(MODELS)]) == MODELS
    assert {"dev", "schnell", "z-image", "seedvr2-7b"} <= set(names)
    assert len(names) == len(set(names))
    by_name = {model.name: model for model in answer.models}
    assert {name for name in names if by_name[name].allowed} == set(MODELS)
    assert by_name["noise-fill"].loaded
    assert sum(model.loaded for model in answer.models) <= 3
    assert by_name["noise-flux1"].present
    assert not by_name["dev"].present
    assert by_name["dev"].bytes_on_disk == 0
    assert "upscale" in by_name["noise-flux1"].takes
    assert by_name["noise-fill"].needs == ["init_image", "mask"]
    assert by_name["noise-flux2"].needs == []
    assert "images" in by_name["noise-flux2"].takes
    assert by_name["noise-fill"].pictures_together == [["init_image", "mask"]]
    assert ["images", "init_image"] not in by_name["noise-flux2"].pictures_together


def test_one_model_is_described_by_its_name_or_alias(studio: ServerProcess) -> None:
    for name in ("flux2-klein-4b", "KLEIN-4B"):
        model = ModelAnswer.model_validate(studio.get(f"/models/{name}").json())
        assert (model.name, model.allowed) == ("flux2-klein-4b", False)
        assert model.repositories == ["black-forest-labs/FLUX.2-klein-4B"]
    unknown = studio.get("/models/devil")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_model")


def health_of(server: ServerProcess) -> HealthAnswer:
    return HealthAnswer.model_validate(server.get("/health").json())


def test_the_models_used_last_stay_in_memory(studio: ServerProcess) -> None:
    for name in ("noise-flux1", "noise-qwen", "noise-z-image", "noise-flux1", "noise-flux2"):
        drawn(studio, model=name, prompt="x", guidance=None)
    assert health_of(studio).loaded_models == ["noise-flux2", "noise-flux1", "noise-z-image"]


def test_a_client_on_this_machine_may_load_a_model_in_advance(studio: ServerProcess) -> None:
    drawn(studio, model="noise-flux1", prompt="x")
    url = studio.url + "/models/noise-redux/load"
    assert requests.post(url, timeout=60).json() == {"model": "noise-redux", "loaded": False}
    studio.wait_for(
        submit(studio, model="noise-flux1", prompt="x", count=1),
        lambda status: status["status"] == "done",
    )
    assert "noise-redux" in health_of(studio).loaded_models
    assert requests.post(url, timeout=60).json() == {"model": "noise-redux", "loaded": True}
    for name, status, code in (
        ("dev", 422, "model_not_allowed"),
        ("devil", 404, "unknown_model"),
    ):
        answer = requests.post(f"{studio.url}/models/{name}/load", timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


# -- servers of their own --------------------------------------------------------------------------


def test_an_operators_key_is_asked_for_before_loading(start_server: StartServer) -> None:
    server = start_server("--models", "noise-flux1,noise-flux2", "--operator-key", "sésame")
    url = server.url + "/models/noise-flux2/load"
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
        refused = requests.post(url, headers=headers, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "operator_only")
    key = {"Authorization": "Bearer sésame".encode()}
    assert requests.post(url, headers=key, timeout=60).status_code == 200
    server.wait_until_ended(submit(server, model="noise-flux2", prompt="x"))
    assert health_of(server).loaded_models == ["noise-flux2"]


def test_a_model_that_cannot_be_loaded_fails_only_its_tasks(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux1", "--models", "noise-flux1,dev,noise-flux2")
    lost, kept = (submit(server, model=name, prompt="x") for name in ("dev", "noise-flux2"))
    failed = server.wait_until_ended(lost)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "model_load_failed")
    message = failed["error"]["message"]
    assert "\n" not in message
    assert "dev" in message
    assert "cannot be downloaded" in message
    assert "huggingface.co/black-forest-labs/FLUX.1-dev" in message
    assert server.wait_until_ended(kept)["status"] == "done"
    health = server.get("/health")
    assert health.status_code == 200
    assert health.json()["last_error"].startswith("The weights of dev cannot be downloaded")
    assert drawn(server, model="noise-flux1", prompt="x")
    ordered = requests.post(server.url + "/models/dev/load", timeout=60)
    assert ordered.json() == {"model": "dev", "loaded": False}
    assert drawn(server, model="noise-flux1", prompt="x")
    assert server.stop() == 0


def test_models_are_freed_when_nothing_comes_and_loaded_again(start_server: StartServer) -> None:
    server = start_server("--model", "noise-flux2", "--unload-after-s", "1")
    first = drawn(server, prompt="x")
    weights_bytes = health_of(server).memory.active_bytes
    while health_of(server).loaded_models:  # ends, or the test run gives up on it
        pass
    health = health_of(server)
    assert health.status == "ready"
    assert health.memory.active_bytes < 0.5 * weights_bytes
    assert not server.get("/models/noise-flux2").json()["loaded"]
    answer = post(server, prompt="x").json()
    assert fetched(server, answer["task_id"]) == first
    load_s = server.get("/stats").json()["load_s"]
    assert answer["expected_time_seconds"] >= 0.5 * load_s
    assert answer["wait_p90_s"] >= answer["expected_time_seconds"]


def test_a_model_that_two_clients_do_not_share_is_switched_to_and_back(
    start_server: StartServer,
) -> None:
    server = start_server("--models", "noise-flux1,noise-flux2", "--affinity-s", "0")
    names = ["noise-flux1", "noise-flux2"] * 3
    tasks = [submit(server, model=name, prompt="x") for name in names]
    files = [fetched(server, task_id) for task_id in tasks]
    assert files[0] == files[2] == files[4] != files[1] == files[3] == files[5]
    assert health_of(server).loaded_models == ["noise-flux2"]
    assert "".join(server.log).count("makes room") >= 5


def test_a_download_without_a_network_ends_with_one_sentence(
    run_server: RunServer, tmp_path: Path
) -> None:
    ended = run_server(
        "--download", "dev", "--data-dir", str(tmp_path), HF_HUB_CACHE=str(tmp_path / "cache")
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("server.py: The weights of dev cannot be downloaded from huggingface.co")
    assert "Traceback" not in ended.stderr


def test_a_download_of_what_is_there_ends_well_and_of_what_is_not_known_is_refused(
    tmp_path: Path, run_server: RunServer, start_server: StartServer
) -> None:
    ended = run_server("--download", "noise-flux1", "--data-dir", str(tmp_path))
    assert (ended.returncode, ended.stdout) == (
        0,
        "The weights of noise-flux1 are on this machine.\n",
    )
    code, log = start_server("--download", "devil", wait=False).refused()
    assert code == 2
    assert "there is no model 'devil'" in log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--models", "devil"), "argument --models: there is no model 'devil'"),
        (("--models", "x=/no/such@dev"), "argument --models: there is no folder /no/such"),
        (("--models", "noise-flux1", "--quantize-choices", "7"), "argument --quantize-choices"),
        (("--lora-dir", "/no/such"), "argument --lora-dir: there is no folder /no/such"),
    ],
)
def test_a_bad_choice_of_models_ends_the_start_with_one_line(
    arguments: tuple[str, ...], words: str, start_server: StartServer
) -> None:
    code, log = start_server(*arguments, wait=False).refused()
    assert code == 2
    assert words in log
    assert len(log.strip().splitlines()) == 1


def test_a_folder_without_weights_fails_the_tasks_that_name_it(
    start_server: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    server = start_server("--model", "noise-flux1", "--models", f"mine={tmp_path}/mine@z-image")
    listed = server.get("/models/mine").json()
    assert (listed["allowed"], listed["title"]) == (True, "mine, from z-image")
    failed = server.wait_until_ended(submit(server, model="mine", prompt="x"))
    assert failed["error"]["code"] == "model_load_failed"
    assert "mine" in failed["error"]["message"]
    assert drawn(server, model="noise-flux1", prompt="x")
