"""Units and lists of the extension sd-webui-controlnet, with the real webuiapi package."""

import base64
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import webuiapi
from conftest import ServerProcess, allow
from drawing_app import DrawingApp, drawing_app, png, shown
from served import served

from api.generate_request import Limits
from api.submission import Submission
from api.waiting_places import WaitingPlaces
from compat.a1111_checkpoint import Checkpoint
from compat.a1111_controlnet import controls_of
from compat.a1111_shapes import ImageToImage, TextToImage
from compat.bodies import read_body
from compat.sync_calls import SyncCalls
from errors import InvalidInput
from fields import Takes
from models.mflux_registry import read_catalog

PICTURE = base64.b64encode(png()).decode()
OTHER = base64.b64encode(png(colour="blue")).decode()
SMALL = {"prompt": "x", "width": 64, "height": 64, "steps": 2}
UNION = "z-image-turbo-controlnet-union-2.1"
QWEN = "qwen-image-2.1-controlnet-union"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    yield from served(tmp_path_factory.mktemp("server"), "--models", "noise-flux1,noise-controlnet")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DrawingApp]:
    with drawing_app(tmp_path_factory.mktemp("app"), "noise-flux1", "noise-controlnet") as app:
        yield app


def with_units(*units: Any, **fields: Any) -> dict[str, Any]:
    return {**SMALL, **fields, "alwayson_scripts": {"controlnet": {"args": list(units)}}}


def info_of(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    info: dict[str, Any] = json.loads(answer.get_json()["info"])
    return info


def fields_with(models: tuple[str, ...], body: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The fields that a body means for a server with these models."""
    allowed = allow(*models)
    own_queue: Any = None
    places = WaitingPlaces(2)
    submission = Submission(own_queue, allowed, Limits(), lambda stage: None, places=places)
    calls = SyncCalls(own_queue, submission, read_catalog(), places)
    shape = ImageToImage if "init_images" in body else TextToImage
    given = frozenset({Takes.INIT_IMAGE} if "init_images" in body else ())
    checkpoint = Checkpoint(calls, False)
    named = options.get("named")
    return controls_of(read_body(shape, body), named, given, calls, checkpoint)


def test_a_unit_of_the_real_package_is_followed(server: ServerProcess) -> None:
    address = urlsplit(server.url)
    api: Any = webuiapi.WebUIApi(host=address.hostname, port=address.port)
    plain = api.txt2img(prompt="x", width=64, height=64)
    assert plain.info["sd_model_name"] == "noise-flux1"
    model = api.controlnet_model_list()[0]
    unit = webuiapi.ControlNetUnit(image=shown(PICTURE), module="canny", model=model, weight=0.5)
    scripts: dict[str, Any] = {}  # the package would keep the unit in its own for later calls
    result = api.txt2img(
        prompt="x", width=64, height=64, controlnet_units=[unit], alwayson_scripts=scripts
    )
    assert result.image.size == (64, 64)
    assert result.info["sd_model_name"] == "noise-controlnet"
    assert result.info["warnings"] == []
    assert api.controlnet_module_list() == ["none"]
    assert api.controlnet_version() == 3
    assert api.get_scripts() == {"txt2img": ["controlnet"], "img2img": ["controlnet"]}


@pytest.mark.parametrize(
    "image",
    [
        {"image": PICTURE},
        {"input_image": PICTURE},
        {"image": {"image": PICTURE, "mask": PICTURE}},
        {"image": "data:image/png;base64," + PICTURE},
    ],
)
def test_the_picture_of_a_unit_has_many_forms(image: dict[str, Any]) -> None:
    fields = fields_with(("noise-flux1", "noise-controlnet"), with_units({**image, "weight": 1.5}))
    assert fields == {
        "model": "noise-controlnet",
        "control_image": png(),
        "control_strength": 1.5,
    }


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("canny", "canny"),
        ("depth_midas", "depth"),
        ("depth_anything_v2", "depth"),
        ("softedge_pidinet", "hed"),
        ("dw_openpose_full", "pose"),
        ("MLSD", "mlsd"),
        ("none", "ready"),
        (None, "ready"),
    ],
)
def test_a_preprocessor_becomes_the_kind_of_control(module: Any, kind: str) -> None:
    fields = fields_with((UNION,), with_units({"image": PICTURE, "module": module}))
    assert fields["control_type"] == kind


def test_several_units_are_several_controls() -> None:
    units = [
        {"image": PICTURE, "module": "canny", "weight": 1},
        {"image": PICTURE, "enabled": False, "module": "no such"},
        {"image": OTHER, "module": "depth", "weight": 0.5},
    ]
    fields = fields_with((UNION,), with_units(*units))
    assert fields["control_images"] == [png(colour="blue")]
    assert (fields["control_types"], fields["control_strengths"]) == (["depth"], [0.5])


def test_in_img2img_the_control_may_be_the_picture_itself() -> None:
    body = with_units({"module": "depth"}, init_images=[OTHER])
    fields = fields_with(("noise-flux1", QWEN), body)
    assert (fields["model"], fields["control_image"]) == (QWEN, png(colour="blue"))


def test_the_model_of_the_unit_draws_else_that_of_the_request() -> None:
    models = ("noise-flux1", "noise-controlnet", UNION)
    unit = {"image": PICTURE, "model": f"{UNION} [abcd1234]"}
    assert fields_with(models, with_units(unit), named="noise-flux1")["model"] == UNION
    unit = {"image": PICTURE, "model": "None"}
    assert fields_with(models, with_units(unit), named=UNION)["model"] == UNION
    assert fields_with(models, with_units(unit))["model"] == "noise-controlnet"
    with pytest.raises(InvalidInput, match="Models that follow a control: noise-controlnet"):
        fields_with(models, with_units(unit), named="noise-flux1")


@pytest.mark.parametrize(
    ("unit", "field"),
    [
        ({}, ".image"),
        ({"image": 7}, ".image"),
        ({"image": {"image": ["x"]}}, ".image"),
        ({"image": "http://10.0.0.1/"}, ".image"),
        ({"image": PICTURE, "module": "lineart"}, ".module"),
        ({"image": PICTURE, "module": ["canny"] * 1000}, ""),
        ({"image": PICTURE, "weight": 3}, ".weight"),
        ({"image": PICTURE, "weight": "heavy"}, ".weight"),
        ({"image": PICTURE, "enabled": "perhaps"}, ".enabled"),
        ({"image": PICTURE, "model": "noise-flux1"}, ".model"),
    ],
)
def test_a_unit_that_cannot_be_used_is_refused_by_name(unit: Any, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        fields_with((UNION, "noise-flux1"), with_units(unit))
    assert str(caught.value.field).startswith(f"alwayson_scripts.controlnet.args[0]{field}")
    with pytest.raises(InvalidInput, match="at most 4"):
        fields_with((UNION,), with_units(*[{"image": PICTURE}] * 5))


def test_errors_of_units_have_the_form_of_the_api(app: DrawingApp) -> None:
    answer = app.http.post("/sdapi/v1/txt2img", json=with_units({"image": "aGVsbG8="}))
    assert answer.status_code == 400
    assert answer.get_json()["error"] == "invalid_input"
    assert "alwayson_scripts.controlnet" in answer.get_json()["detail"]


@pytest.mark.parametrize(
    "scripts",
    [{}, [], 7, {"controlnet": None}, {"controlnet": []}, {"ControlNet": {"args": [None, 7]}}],
)
def test_scripts_without_a_unit_change_nothing(app: DrawingApp, scripts: Any) -> None:
    info = info_of(app.http.post("/sdapi/v1/txt2img", json={**SMALL, "alwayson_scripts": scripts}))
    assert (info["sd_model_name"], info["warnings"]) == ("noise-flux1", [])


def test_other_scripts_are_ignored_and_named_and_no_picture_is_sent_back(app: DrawingApp) -> None:
    scripts = {
        "ADetailer": {"args": [{"ad_model": "face_yolov8n.pt"}]},
        "controlnet": {"args": [{"image": PICTURE}]},
    }
    answer = app.http.post("/sdapi/v1/txt2img", json={**SMALL, "alwayson_scripts": scripts})
    [warning] = info_of(answer)["warnings"]
    assert warning == "alwayson_scripts: 'ADetailer' is not available here and was ignored."
    assert answer.get_json()["parameters"]["alwayson_scripts"] == dict.fromkeys(scripts)
    many = {str(number) * 200: 1 for number in range(1000)}
    answer = app.http.post("/sdapi/v1/txt2img", json={**SMALL, "alwayson_scripts": many})
    assert len(info_of(answer)["warnings"][0]) < 4000


def test_the_lists_are_those_that_a_plugin_for_krita_reads(app: DrawingApp) -> None:
    def read(path: str) -> Any:
        return app.http.get(path).get_json()

    assert read("/queue/status")["queue_size"] == 0
    assert read("/controlnet/model_list?update=true") == {"model_list": ["noise-controlnet"]}
    modules = read("/controlnet/module_list?alias_names=true")
    assert set(modules["module_detail"]) == set(modules["module_list"])
    assert read("/controlnet/control_types")["control_types"]["All"]["model_list"] == [
        "None",
        "noise-controlnet",
    ]
    assert read("/controlnet/settings") == {"control_net_unit_count": 4}
    detect = app.http.post("/controlnet/detect", json={})
    assert detect.status_code == 404
    assert set(detect.get_json()) == {"error", "detail", "body", "errors"}


def test_a_unit_is_drawn_with_what_a_plugin_for_krita_sends(server: ServerProcess) -> None:
    unit = {
        "enabled": True,
        "module": "none",
        "model": "noise-controlnet",
        "weight": 1.0,
        "resize_mode": "Crop and Resize",
        "lowvram": False,
        "processor_res": 512,
        "threshold_a": 64,
        "threshold_b": 64,
        "guidance_start": 0.0,
        "guidance_end": 1.0,
        "control_mode": "Balanced",
        "pixel_perfect": False,
        "image": {"image": PICTURE},
    }
    answer = requests.post(server.url + "/sdapi/v1/txt2img", json=with_units(unit), timeout=60)
    assert answer.status_code == 200, answer.text
    assert shown(answer.json()["images"][0]).size == (64, 64)
