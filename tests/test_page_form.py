"""The form of the page: what a model takes, errors beside their fields, pictures as input."""

import re

import pytest
from conftest import ServerProcess, needs_chromium
from pages import UNION, Visit, picture_file
from playwright.sync_api import Route, expect

pytestmark = needs_chromium


def test_the_kinds_of_control_are_those_that_the_server_can_make(visit: Visit) -> None:
    me = visit().open()
    me["#model"].select_option(UNION)
    expect(me["#control_type"]).to_be_hidden()
    me["#control_image"].set_input_files(picture_file(64, 64, "navy"))
    expect(me["#control_type"]).to_be_visible()
    expect(me["#control_type"].locator("option")).to_have_text(
        ["default", "canny", "mlsd", "hed", "ready"]
    )


def test_a_forecast_leaves_the_error_of_an_empty_prompt(visit: Visit) -> None:
    me = visit().open()
    with me.page.expect_response(lambda answer: answer.url.endswith("/estimate")):
        me["#steps"].fill("3")
        me["#generate"].click()
        expect(me["#prompt-error"]).to_have_text("Enter a prompt.")
    expect(me["#forecast"]).to_contain_text(re.compile("about|roughly"))
    expect(me["#prompt-error"]).to_have_text("Enter a prompt.")


def test_an_error_is_shown_beside_its_field(visit: Visit) -> None:
    me = visit().open()
    me["#generate"].click()
    expect(me["#prompt-error"]).to_have_text("Enter a prompt.")
    expect(me["#prompt"]).to_be_focused()
    me["#steps"].fill("9999")
    expect(me["#steps-error"]).to_have_text("Enter a number from 1 to 100.")
    expect(me["#steps"]).to_have_attribute("aria-invalid", "")
    me["#steps"].fill("3")
    expect(me["#steps-error"]).to_be_empty()
    me.choose("shape", "custom")
    me.expected_statuses.add(400)
    me["#width"].fill("8192")
    me["#height"].fill("8192")
    expect(me["#width-error"]).to_contain_text("width x height must be at most")


def test_tags_are_entered_shown_and_kept_with_the_settings(
    visit: Visit, served: ServerProcess
) -> None:
    me = visit().open()
    me["#tags"].fill(" christmas card, draft,,")
    me.hold()
    me.draw("with tags")
    card = me.card("with tags")
    expect(card.locator(".tags li")).to_have_text(["christmas card", "draft"])
    task_id = me.task_ids()[0]
    listed = served.get("/queue", tag="christmas card").json()["tasks"]
    assert [task["task_id"] for task in listed] == [task_id]
    card.get_by_role("button", name="Cancel").click()
    expect(card).to_contain_text("Cancelled.")
    me["#tags"].fill("")
    card.get_by_role("button", name="Again").click()
    expect(me["#tags"]).to_have_value("christmas card, draft")
    me.go_on()
    me.draw("small with tags")
    expect(me.shown("small with tags").locator(".tags li")).to_have_count(2)
    me.picture("tags")
    me.shown("small with tags").locator(".open").click()
    expect(me["#viewer-params"]).to_contain_text("christmas card, draft")
    me.page.keyboard.press("Escape")
    me.expected_statuses.add(400)
    me["#tags"].fill("x" * 41)
    expect(me["#tags-error"]).to_contain_text("1 to 40 characters")


def test_the_form_shows_what_the_model_takes(visit: Visit, served: ServerProcess) -> None:
    me = visit().open()
    expect(me["[data-field=guidance]"]).to_be_hidden()
    expect(me["#model-inputs"]).to_have_text("Needs a prompt. Optional: an input image and a mask.")
    me["#model"].select_option("noise-z-image")
    expect(me["#model-inputs"]).to_have_text(
        "Needs a prompt. Optional: guidance, a negative prompt, an input image and a mask."
    )
    expect(me["#guidance"]).to_have_value("3.5")
    me["#negative_prompt"].fill("fog")
    me["#guidance"].fill("2")
    me.draw("guided")
    expect(me.shown("guided")).to_have_count(1)
    params = served.get("/status", task_id=me.task_ids()[0]).json()["params"]
    assert (params["guidance"], params["negative_prompt"]) == (2, "fog")
    me["#guidance"].fill("1")
    expect(me["#negative_prompt"]).to_be_disabled()
    expect(me["#negative_prompt-note"]).to_have_text("Needs guidance above 1.")

    me["#model"].select_option("noise-fill")
    expect(me["#model-inputs"]).to_have_text(
        "Needs a prompt, an input image and a mask. Optional: guidance."
    )
    expect(me["#forecast"]).to_have_text("needs an input image")
    me["#prompt"].fill("filled")
    me["#generate"].click()
    expect(me["#init_image-error"]).to_contain_text("needs an input image")
    me["#init_image"].set_input_files(picture_file(128, 96, "teal"))
    expect(me["#forecast"]).to_have_text("needs a mask")
    me.choose("shape", "input")
    me["#mask"].set_input_files(picture_file(128, 96, "white"))
    expect(me["#forecast"]).to_contain_text(re.compile(r"\d s"))
    me["#generate"].click()
    expect(me.shown("filled")).to_have_count(1)
    params = served.get("/status", task_id=me.task_ids()[0]).json()["params"]
    assert (params["width"], params["height"]) == (128, 96)
    assert params["mask"]["width"] == 128

    me["#model"].select_option("noise-flux2")
    me["[data-field=init_image] [aria-label='Remove this image']"].click()
    me["#images"].set_input_files([picture_file(64, 64, "red"), picture_file(64, 64, "blue")])
    expect(me["[data-field=images] .picks img"]).to_have_count(2)
    me.draw("edited")
    expect(me.shown("edited")).to_have_count(1)
    params = served.get("/status", task_id=me.task_ids()[0]).json()["params"]
    assert len(params["images"]) == 2


def test_the_form_offers_the_loras_that_fit_the_model(visit: Visit) -> None:
    fits = {
        "wild": ("noise-flux1",),
        "calm": ("noise-z-image",),
        "both": ("noise-flux1", "noise-z-image"),
    }

    def changed(route: Route) -> None:
        answer = route.fetch().json()
        for model in answer["models"]:
            model["takes"].append("loras")
        answer["loras"] = [
            {"name": name, "keys": 2, "models": [{"name": model, "keys": 2} for model in models]}
            for name, models in fits.items()
        ]
        route.fulfill(json=answer)

    me = visit()
    me.page.route("**/models", changed)
    me.open()
    offered = me["#lora-list li:visible label"]
    expect(offered).to_have_text(["wild", "both"])
    me["#model"].select_option("noise-z-image")
    expect(offered).to_have_text(["calm", "both"])
    me["#model"].select_option("noise-fill")
    expect(me["#loras"]).to_be_hidden()


def test_the_form_offers_what_the_list_of_models_says(visit: Visit) -> None:
    def changed(route: Route) -> None:
        answer = route.fetch().json()
        for model in answer["models"]:
            if model["name"] == "noise-flux1":
                model["takes"] += ["control_image", "control_type"]
                model |= {"control_types": ["pose", "ready"], "least_steps": 2}
                model |= {"side_step": 48, "least_side": 480, "most_side": 600}
        route.fulfill(json=answer)

    me = visit()
    me.page.route("**/models", changed)
    me.open()
    me["#model"].select_option("noise-flux1")
    expect(me["#size-words"]).to_contain_text("600")
    me.choose("scale", "Small")
    expect(me["#size-words"]).to_contain_text("480")
    expect(me["#steps"]).to_have_attribute("min", "2")
    expect(me["#control_type option"]).to_have_text(["default", "pose", "ready"])


def test_a_mask_can_be_added_to_the_input_image_of_any_model_that_takes_one(
    visit: Visit, served: ServerProcess
) -> None:
    me = visit().open()
    expect(me["[data-field=mask]"]).to_be_hidden()
    me["#init_image"].set_input_files(picture_file(128, 96, "teal"))
    expect(me["[data-field=mask]"]).to_be_visible()
    me["#mask"].set_input_files(picture_file(128, 96, "white"))
    me.draw("repainted")
    expect(me.shown("repainted")).to_have_count(1)
    params = served.get("/status", task_id=me.task_ids()[0]).json()["params"]
    assert params["mask"]["width"] == 128
    me["[data-field=init_image] [aria-label='Remove this image']"].click()
    expect(me["[data-field=mask]"]).to_be_hidden()
    me.draw("from noise")  # the mask stays in the form and is not sent
    expect(me.shown("from noise")).to_have_count(1)


def test_after_a_change_of_the_model_only_pictures_that_go_together_are_sent(
    visit: Visit, served: ServerProcess
) -> None:
    def changed(route: Route) -> None:
        answer = route.fetch().json()
        for model in answer["models"]:
            if model["name"] == "noise-flux1":  # as if one of its classes took reference images
                model["takes"].append("images")
                model["pictures_together"].append(["images"])
        route.fulfill(json=answer)

    me = visit()
    me.page.route("**/models", changed)
    me.open()
    me["#model"].select_option("noise-flux2")
    me["#images"].set_input_files(picture_file(64, 64, "red"))
    expect(me["[data-field=images] .picks img"]).to_be_visible()
    me["#model"].select_option("noise-flux1")
    me["#init_image"].set_input_files(picture_file(64, 64, "teal"))
    not_used = "Not used: this model cannot combine it with the other picture."
    expect(me["[data-field=images]"]).to_contain_text(not_used)
    expect(me["[data-field=init_image]"]).not_to_contain_text(not_used)
    me.draw("only one of them")
    expect(me.shown("only one of them")).to_have_count(1)
    params = served.get("/status", task_id=me.task_ids()[0]).json()["params"]
    assert params["init_image"]["width"] == 64
    assert not params.get("images")


def test_the_size_shows_what_upscaling_makes_of_it(visit: Visit) -> None:
    def changed(route: Route) -> None:
        answer = route.fetch().json()
        for model in answer["models"]:
            model["takes"].append("upscale")
        route.fulfill(json=answer)

    me = visit()
    me.page.route("**/models", changed)
    me.open()
    me.expected_statuses.add(422)  # this server has no upscaler
    me["#upscale"].select_option("2")
    expect(me["#size-words"]).to_have_text(re.compile("1024 . 1024 → 2048 . 2048"))


def test_a_model_that_only_upscales_leaves_the_pictures_of_other_models_as_they_are(
    visit: Visit,
) -> None:
    def changed(route: Route) -> None:
        answer = route.fetch().json()
        for model in answer["models"]:
            model["takes"].append("upscale")
            if model["name"] == "noise-fill":
                model["needs"].append("upscale")
        route.fulfill(json=answer)

    me = visit()
    me.page.route("**/models", changed)
    me.open()
    me.expected_statuses.add(422)  # this server has no upscaler
    me["#model"].select_option("noise-fill")
    expect(me["#upscale"]).to_have_value("2")
    me["#model"].select_option("noise-flux1")
    expect(me["#upscale"]).to_have_value("")
    expect(me["#size-words"]).to_have_text(re.compile("^1024 . 1024$"))


GIVE = """(kind) => new Promise((resolve) => {
  const canvas = document.createElement("canvas");
  canvas.width = 48;
  canvas.height = 32;
  canvas.toBlob((blob) => {
    const data = new DataTransfer();
    data.items.add(new File([blob], "given.png", {type: "image/png"}));
    const options = {bubbles: true, cancelable: true};
    document.body.dispatchEvent(kind === "paste"
      ? new ClipboardEvent("paste", {...options, clipboardData: data})
      : new DragEvent(kind, {...options, dataTransfer: data}));
    resolve();
  });
})"""


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_a_picture_can_be_pasted_or_dropped_anywhere(visit: Visit, kind: str) -> None:
    me = visit().open()
    if kind == "drop":
        me.page.evaluate(GIVE, "dragenter")
        expect(me["#drop"]).to_be_visible()
    me.page.evaluate(GIVE, kind)
    expect(me["#drop"]).to_be_hidden()
    expect(me["[data-field=init_image] .picks img"]).to_have_js_property("naturalWidth", 48)
    expect(me["#size-words"]).to_have_text("as the input image")
    expect(me["#image_strength"]).to_be_visible()


def test_on_a_phone_in_landscape_the_form_leaves_room_and_shows_its_button(visit: Visit) -> None:
    me = visit(viewport={"width": 844, "height": 390}, has_touch=True, is_mobile=True).open()
    box, button = me[".compose"].bounding_box(), me["#generate"].bounding_box()
    assert box
    assert button
    assert box["width"] < 844 / 2
    assert button["y"] + button["height"] <= 390
