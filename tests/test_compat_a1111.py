"""AUTOMATIC1111's API, spoken by the real webuiapi package to the running server."""

import base64
import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
import requests
from a1111_calls import SIDES, api_of, draw, encoded
from conftest import ServerProcess, StartServer
from PIL import Image
from served import served
from test_sync_calls import ENDLESS, connected, queued

from compat.a1111_lists import EMPTY_LISTS, NOTHING_TO_DO
from models import tiny_models


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = "noise-flux1,noise-flux2,noise-fill,noise-z-image,noise-seedvr2"
    yield from served(tmp_path_factory.mktemp("server"), "--models", models)


@pytest.fixture
def api(server: ServerProcess) -> Any:
    return api_of(server)


def info_of(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    answer = draw(server, **fields)
    assert answer.status_code == 200, answer.text
    info: dict[str, Any] = json.loads(answer.json()["info"])
    return info


def test_images_are_bare_base64_png_with_info_as_a_text(server: ServerProcess) -> None:
    answer = draw(server, batch_size=2, n_iter=2, negative_prompt="ugly").json()
    assert set(answer) == {"images", "parameters", "info"}
    pictures = [Image.open(BytesIO(base64.b64decode(text))) for text in answer["images"]]
    assert [(picture.format, picture.size) for picture in pictures] == [("PNG", (64, 64))] * 4
    assert answer["parameters"]["negative_prompt"] == "ugly"
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [info["seed"] + number for number in range(4)]
    assert len(info["infotexts"]) == 4
    assert pictures[3].info["parameters"] == info["infotexts"][3]
    assert f"Seed: {info['seed'] + 3}," in info["infotexts"][3]


def test_webuiapi_draws_and_reads_back_how(api: Any) -> None:
    drawn = api.txt2img(prompt="a fox", seed=5, **SIDES)
    assert drawn.image.size == (64, 64)
    assert drawn.info["seed"] == 5
    assert api.png_info(drawn.image).info == drawn.info["infotexts"][0]
    again = api.txt2img(prompt="a fox", seed=5, **SIDES)
    assert again.image.tobytes() == drawn.image.tobytes()
    changed = api.img2img(
        images=[drawn.image], prompt="a fox", seed=5, denoising_strength=0.4, **SIDES
    )
    assert changed.info["denoising_strength"] == 0.4
    assert changed.image.size == (64, 64)


@pytest.mark.parametrize("seed", [-1, None, "", -5, "-1"])
def test_an_empty_seed_is_random_and_returned(server: ServerProcess, seed: Any) -> None:
    seeds = {info_of(server, seed=seed)["seed"] for _ in range(2)}
    assert len(seeds) == 2
    assert all(0 <= number < 2**32 for number in seeds)


def test_steps_and_cfg_of_stable_diffusion_are_cut_to_what_suits_the_model(
    server: ServerProcess, start_server: StartServer
) -> None:
    info = info_of(server, steps=50, cfg_scale=7)
    assert (info["steps"], info["cfg_scale"]) == (8, 1.0)
    z_image = {"sd_model_checkpoint": "noise-z-image"}
    info = info_of(server, steps=2, cfg_scale=7, override_settings=z_image, negative_prompt="y")
    assert (info["steps"], info["cfg_scale"], info["negative_prompt"]) == (2, 3.5, "y")
    unclamped = start_server("--model", "noise-z-image", "--clamp", "off")
    info = info_of(unclamped, steps=30, cfg_scale=7)
    assert (info["steps"], info["cfg_scale"]) == (30, 7.0)


def test_cfg_is_no_guidance_of_flux_but_that_of_forge_is(start_server: StartServer) -> None:
    server = start_server("--models", "noise-kontext,noise-fill")
    white = encoded(Image.new("L", (64, 64), 255))
    picture = encoded(Image.new("RGB", (64, 64), "red"))
    for fields, guidance in (({"cfg_scale": 7}, 3.5), ({"distilled_cfg_scale": 2.0}, 2.0)):
        body = {"prompt": "x", "init_images": [picture], "mask": white, **SIDES, **fields}
        answer = requests.post(server.url + "/sdapi/v1/img2img", json=body, timeout=60)
        assert json.loads(answer.json()["info"])["cfg_scale"] == guidance


def test_the_model_is_chosen_with_each_request(server: ServerProcess) -> None:
    def model_of(title: Any) -> Any:
        override = {"sd_model_checkpoint": title}
        return info_of(server, override_settings=override)["sd_model_name"]

    assert model_of("noise-flux2") == model_of("noise-flux2 [abc123]") == "noise-flux2"
    assert (
        model_of("v1-5-pruned-emaonly.safetensors")
        == model_of("")
        == model_of(None)
        == "noise-flux1"
    )
    refused = draw(server, override_settings={"sd_model_checkpoint": "dev"})
    assert refused.status_code == 422
    assert set(refused.json()) == {"error", "detail", "body", "errors"}


def test_options_survive_being_posted_back_whole_and_switch_nothing(api: Any) -> None:
    options = api.get_options()
    assert options["sd_model_checkpoint"] == "noise-flux1"
    assert "forge_preset" not in options
    assert api.set_options(options) is None
    assert api.set_options({"sd_model_checkpoint": "", "CLIP_stop_at_last_layers": 2}) is None
    refused = api.set_options({**options, "sd_model_checkpoint": "noise-flux2"})
    assert "--sdapi-model-switch on" in refused["detail"]
    assert api.util_get_current_model() == "noise-flux1"


def test_options_switch_the_model_where_the_operator_allows_it(start_server: StartServer) -> None:
    server = start_server("--models", "noise-flux1,noise-flux2", "--sdapi-model-switch", "on")
    api = api_of(server)
    api.util_set_model("noise-flux2")
    assert api.util_get_current_model() == "noise-flux2"
    assert info_of(server)["sd_model_name"] == "noise-flux2"
    assert server.submit()["params"]["model"] == "noise-flux1"  # of this API alone
    assert "dev" in api.set_options({"sd_model_checkpoint": "dev"})["detail"]
    assert "no model" in api.set_options({"sd_model_checkpoint": "v1-5"})["detail"]


def test_lists_have_the_shapes_that_clients_read(api: Any, server: ServerProcess) -> None:
    assert api.util_get_model_names() == [
        "noise-fill",
        "noise-flux1",
        "noise-flux2",
        "noise-z-image",
    ]
    assert api.util_get_sampler_names() == ["Euler"]
    assert "automatic" in api.util_get_scheduler_names()
    assert [upscaler["name"] for upscaler in api.get_upscalers()] == ["None", "noise-seedvr2"]
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert api.get_memory()["ram"]["total"] > 0
    assert api.get_cmd_flags()["api"] is True
    assert api.get_hypernetworks() == api.get_face_restorers() == []
    assert api.get_realesrgan_models() == api.get_prompt_styles() == []
    for name in ("loras", *EMPTY_LISTS):
        assert server.get(f"/sdapi/v1/{name}").json() == []
        assert server.get(f"/sdapi/v1/{name}/").json() == []
    assert api.refresh_checkpoints() == {}
    for name in NOTHING_TO_DO:
        answer = requests.post(f"{server.url}/sdapi/v1/{name}", timeout=60)
        assert answer.json() == {}


def test_idle_is_exactly_0_and_nothing_can_be_interrupted(api: Any) -> None:
    progress = api.get_progress()
    assert progress["progress"] == 0
    assert progress["eta_relative"] == 0
    assert progress["state"]["job_count"] == 0
    assert progress["current_image"] is None
    assert api.interrupt() == {}
    assert api.skip() == {}
    api.util_wait_for_ready()


def test_progress_and_interrupt_are_those_of_the_callers_own_task(
    start_server: StartServer,
) -> None:
    server = start_server(*ENDLESS)
    body = {"width": 1024, "height": 1024, "steps": 1000}
    path = "/sdapi/v1/txt2img"
    mine, other = requests.Session(), requests.Session()
    mine.headers["User-Agent"], other.headers["User-Agent"] = "", "other"
    mine.headers["Accept-Encoding"] = other.headers["Accept-Encoding"] = "identity"

    def progress_of(session: requests.Session) -> Any:
        return session.get(server.url + "/sdapi/v1/progress", timeout=60).json()

    with connected(server, path, {"prompt": "mine", **body}) as connection:
        running = queued(server, "mine")
        server.wait_for(running, lambda status: status["steps_done"] >= 1)
        with connected(server, path, {"prompt": "mine, too", **body}):
            waiting = queued(server, "mine, too")
            native = server.submit()["task_id"]
            assert progress_of(other)["progress"] == 0
            other.post(server.url + "/sdapi/v1/interrupt", timeout=60)
            assert server.get("/status", task_id=running).json()["status"] == "running"
            progress = progress_of(mine)
            assert progress["state"]["job"] == running
            assert progress["state"]["sampling_steps"] == 1000
            assert 0 < progress["progress"] < 1
            assert progress["eta_relative"] > 0
            mine.post(server.url + "/sdapi/v1/interrupt", timeout=60)
            assert server.wait_until_ended(running)["status"] == "cancelled"
            answer = connection.recv(1_000_000).decode()
            assert answer.startswith("HTTP/1.1 200")
            assert server.get("/status", task_id=waiting).json()["status"] != "cancelled"
            assert server.get("/status", task_id=native).json()["status"] != "cancelled"


def test_a_task_that_another_client_deletes_is_an_error_for_the_caller(
    start_server: StartServer,
) -> None:
    server = start_server(*ENDLESS)
    body = {"prompt": "mine", "width": 1024, "height": 1024, "steps": 1000}
    with connected(server, "/sdapi/v1/txt2img", body) as connection:
        task_id = queued(server, "mine")
        requests.delete(server.url + "/delete", params={"task_id": task_id}, timeout=60)
        assert connection.recv(1_000_000).startswith(b"HTTP/1.1 410")


def test_a_mask_is_white_where_to_repaint_or_black_when_inverted(server: ServerProcess) -> None:
    picture = Image.new("RGB", (64, 64), "red")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    inverted = Image.eval(mask, lambda grey: 255 - grey)
    body = {"prompt": "x", "init_images": [encoded(picture)], "seed": 1, **SIDES}
    images = []
    for shown, invert in ((mask, 0), (inverted, 1)):
        fields = {
            "mask": "data:image/png;base64," + encoded(shown),
            "inpainting_mask_invert": invert,
        }
        answer = requests.post(
            server.url + "/sdapi/v1/img2img", json={**body, **fields}, timeout=60
        )
        assert json.loads(answer.json()["info"])["sd_model_name"] == "noise-fill"
        images.append(answer.json()["images"])
    assert images[0] == images[1]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"init_images": ["http://169.254.169.254/x.png"]}, "URLs are not fetched"),
        ({"init_images": ["/etc/passwd"]}, "not a picture"),
        ({"init_images": []}, "init_images"),
        ({}, "init_images is required"),
    ],
)
def test_nothing_that_a_client_sends_is_fetched_or_opened(
    server: ServerProcess, fields: dict[str, Any], word: str
) -> None:
    body = {"prompt": "x", **fields}
    answer = requests.post(server.url + "/sdapi/v1/img2img", json=body, timeout=60)
    assert answer.status_code == 400
    assert word in answer.json()["detail"]


def test_lora_tags_of_a_prompt_take_the_operators_adapters_alone(
    start_server: StartServer, tmp_path: Any
) -> None:
    (tmp_path / "loras").mkdir()
    tiny_models.write_lora(tmp_path / "loras" / "ink.safetensors", "noise-flux1")
    server = start_server("--model", "noise-flux1", "--lora-dir", str(tmp_path / "loras"))
    assert [lora["name"] for lora in server.get("/sdapi/v1/loras").json()] == ["ink"]

    def drawn(tags: str) -> str:
        answer = draw(server, prompt="a fox" + tags, seed=1).json()
        assert json.loads(answer["info"])["prompt"] == "a fox"
        image: str = answer["images"][0]
        return image

    plain = drawn("")
    assert drawn("<lora:../secret:1><lora:evil/repo:0.5>") == plain
    assert drawn("<lora:ink:0>") != drawn("<lora:ink:1>") != drawn("<lora:ink:0.5>")


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 0},
        {"width": 9000},
        {"batch_size": 50},
        {"seed": "x"},
        {"prompt": 5},
        {"n_iter": []},
    ],
)
def test_an_impossible_request_is_refused_in_the_form_of_this_api(
    server: ServerProcess, fields: dict[str, Any]
) -> None:
    answer = draw(server, **fields)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error", "detail", "body", "errors"}


def test_refusals_call_the_fields_by_their_names_of_this_api(server: ServerProcess) -> None:
    message = draw(server, batch_size=5, n_iter=4).json()["detail"]
    assert message == "batch_size x n_iter must be a whole number from 1 to 10, not 20."
    message = draw(server, width=9).json()["detail"]
    assert message == "width must be a whole number from 16 to 8192, not 9."
    picture = encoded(Image.new("RGB", (64, 64), "red"))
    body = {"prompt": "x", "init_images": [picture], "steps": 1, "denoising_strength": 0.3}
    answer = requests.post(server.url + "/sdapi/v1/img2img", json=body, timeout=60)
    assert answer.json()["detail"] == (
        "steps must be more than 1: 70% of the input image is kept, which leaves no step to draw."
    )
    body["init_images"] = [base64.b64encode(b"no picture at all").decode()]
    answer = requests.post(server.url + "/sdapi/v1/img2img", json=body, timeout=60)
    assert answer.status_code == 400
    assert "init_images" in answer.json()["detail"]


def test_errors_before_any_route_have_the_form_of_this_api(server: ServerProcess) -> None:
    for answer, status in (
        (requests.post(server.url + "/sdapi/v1/txt2img", data="{", timeout=60), 400),
        (server.get("/sdapi/v1/txt2img"), 405),
        (server.get("/sdapi/v1/controlnet"), 404),
    ):
        assert answer.status_code == status
        assert set(answer.json()) == {"error", "detail", "body", "errors"}
