"""The tools of the form: models side by side, prompts and styles, wildcards, lines, grids."""

import re

from conftest import ServerProcess, needs_chromium
from pages import Visit
from playwright.sync_api import Route, expect

pytestmark = needs_chromium


def test_the_models_are_compared_found_and_chosen_with_the_keyboard(visit: Visit) -> None:
    me = visit().open()
    me.expected_statuses.add(422)  # large models may not fit into the memory of this machine
    me["#compare-models"].click()
    panel = me[".model-picker"]
    expect(panel.locator("h3:visible")).to_have_text(["Draw", "Repaint", "Control"])
    repaint = panel.get_by_role("list", name="Repaint")
    expect(repaint.locator(".name")).to_contain_text(["on disk"])
    expect(repaint).to_contain_text("Takes an input image, a mask, guidance and LoRAs.")
    dev = panel.locator(".pick").filter(has_text="FLUX.1 dev")
    expect(dev).to_contain_text("download 34 GB")
    expect(dev).to_contain_text("needs a licence")
    here = panel.locator("[aria-current=true] .availability")
    expect(here).to_be_visible()
    expect(here).to_have_text(re.compile("loaded|on disk"))
    expect(panel.locator("[aria-current=true] .speed")).to_have_text(re.compile(r"\d"))
    me.assert_accessible()
    me.picture("models")
    me.page.keyboard.type("nothing like it")
    expect(panel).to_contain_text("No model with these words.")
    panel.get_by_role("searchbox").fill("fill")
    expect(panel.locator(".pick:visible")).to_have_count(1)
    me.page.keyboard.press("ArrowDown")
    me.page.keyboard.press("Enter")
    expect(panel).to_have_count(0)
    expect(me["#model"]).to_have_value("noise-fill")


def test_prompts_are_remembered_and_styles_are_added_and_removed(visit: Visit) -> None:
    me = visit().open()
    me.draw("a lighthouse")
    me["#prompt"].fill("a fox")
    me["#prompts"].click()
    panel = me[".prompt-library"]
    panel.get_by_label("Name of a new style").fill("soft")
    panel.get_by_label("Its text").fill("watercolour, soft light")
    panel.get_by_role("button", name="Save").click()
    me.assert_accessible()
    me.picture("prompts")
    style = panel.get_by_role("button", name="soft watercolour")
    style.click()
    expect(me["#prompt"]).to_have_value("a fox, watercolour, soft light")
    style.click()
    expect(me["#prompt"]).to_have_value("a fox")
    panel.get_by_role("button", name="a lighthouse", exact=True).click()
    expect(me["#prompt"]).to_have_value("a lighthouse")
    me.page.reload()
    me["#prompts"].click()
    expect(style).to_be_visible()
    panel.get_by_role("button", name="Remove soft").click()
    panel.get_by_role("button", name="Remove a lighthouse").click()
    expect(panel.locator(".rows li")).to_have_count(0)
    expect(panel).to_contain_text("Prompts that you generate with appear here.")


def test_wildcards_are_shown_with_an_example_and_replaced(
    visit: Visit, served: ServerProcess
) -> None:
    me = visit().open()
    expect(me["#wildcards-option"]).to_be_hidden()
    me.choose("shape", "custom")
    me["#width"].fill("64")
    me["#height"].fill("64")
    me["#prompt"].fill("a {red|blue} fox")
    expect(me["#wildcards-example"]).to_have_text(re.compile("^a (red|blue) fox$"))
    me["#generate"].click()
    expect(me[".card.loaded"]).to_have_count(1)
    prompt = served.get("/status", task_id=me.task_ids()[0]).json()["params"]["prompt"]
    assert prompt in ("a red fox", "a blue fox")
    me["#expand_wildcards"].uncheck()
    expect(me["#wildcards-example"]).to_be_hidden()
    me["#generate"].click()
    expect(me.shown("a {red|blue} fox")).to_have_count(1)


def test_each_line_of_a_prompt_can_be_a_picture(visit: Visit, served: ServerProcess) -> None:
    me = visit().open()
    expect(me["#lines-option"]).to_be_hidden()
    me["#prompt"].fill("a red fox\n\n a blue fox ")
    expect(me["#lines-option"]).to_contain_text("One picture for each line (2)")
    me["#lines"].check()
    expect(me["#n"]).to_be_disabled()
    me["#generate"].click()
    for prompt in ("a red fox", "a blue fox"):
        expect(me.shown(prompt)).to_have_count(1)
    params = served.get("/status", task_id=me.task_ids()[0]).json()["params"]
    assert params["count"] == 2
    me["#prompt"].fill("\n".join(map(str, range(30))))
    too_many = "At most 10 pictures: the prompt has more lines."
    expect(me["#generate"]).to_contain_text(too_many)
    me["#generate"].click()
    expect(me["#prompt-error"]).to_have_text(too_many)


def test_a_grid_of_two_settings_is_drawn_and_shown_as_a_table(
    visit: Visit, served: ServerProcess
) -> None:
    me = visit().open()
    me["#model"].select_option("noise-z-image")
    me.choose("shape", "custom")
    me["#width"].fill("64")
    me["#height"].fill("64")
    me["#xy-grid"].click()
    expect(me["#prompt-error"]).to_have_text("Enter a prompt.")
    me["#prompt"].fill("in a grid")
    me["#xy-grid"].click()
    form = me[".panel.xy"]
    form.get_by_label("Values: Across").fill("1, x")
    expect(form).to_contain_text("Enter values, separated by commas.")
    form.get_by_label("Values: Across").fill("1, 2, 3")
    form.get_by_label("Values: Down").fill("2, 4")
    expect(form).to_contain_text("6 pictures")
    expect(form).to_contain_text(re.compile(r"All are ready in roughly \d+ (s|min)\."))
    me.assert_accessible()
    me.picture("grid-form")
    form.get_by_role("button", name="Generate").click()
    table = me[".grid-table table"]
    expect(table.locator("thead th")).to_have_text(["1", "2", "3"])
    expect(table.locator("tbody th")).to_have_text(["2", "4"])
    expect(table.locator("img")).to_have_count(6)
    me.assert_accessible()
    me.picture("grid")
    me.page.keyboard.press("Escape")
    drawn = [served.get("/status", task_id=one).json()["params"] for one in me.task_ids()]
    assert sorted((one["guidance"], one["steps"]) for one in drawn) == [
        (guidance, steps) for guidance in (2, 4) for steps in (1, 2, 3)
    ]
    assert len({one["seed"] for one in drawn}) == 1
    me.page.reload()
    me["#grids button"].click()
    table.locator("td button").last.click()
    expect(me["#viewer-params"]).to_contain_text("3")


def test_the_pictures_of_a_grid_that_cannot_be_sent_are_sent_when_the_server_is_back(
    visit: Visit,
) -> None:
    me = visit().open()
    me.unreachable_is_expected = True
    sent: list[str] = []

    def once(route: Route) -> None:
        sent.append(route.request.headers["idempotency-key"])
        if len(sent) == 1:
            route.continue_()
        else:
            route.abort()

    me.page.route("**/generate", once)
    me.choose("shape", "custom")
    me["#width"].fill("64")
    me["#height"].fill("64")
    me["#prompt"].fill("in a grid")
    me["#xy-grid"].click()
    form = me[".panel.xy"]
    form.get_by_label("Across", exact=True).select_option("steps")
    form.get_by_label("Values: Across").fill("1, 2")
    form.get_by_label("Down", exact=True).select_option("seed")
    form.get_by_label("Values: Down").fill("1, 2")
    form.get_by_role("button", name="Generate").click()
    table = me[".grid-table table"]
    expect(table.locator("td").filter(has_text="not sent")).to_have_count(3)
    expect(me["#pending .row"]).to_have_count(1)
    expect(me["#pending .row"]).to_contain_text("Grid: 3 pictures · Not sent yet.")
    me.page.unroute("**/generate")
    expect(table.locator("img")).to_have_count(4)
    expect(me["#pending .row"]).to_have_count(0)
    assert len(me.task_ids()) == 4


def test_a_long_list_of_loras_can_be_searched(visit: Visit) -> None:
    def changed(route: Route) -> None:
        answer = route.fetch().json()
        for model in answer["models"]:
            model["takes"].append("loras")
        models = [{"name": "noise-flux1", "keys": 2}]
        answer["loras"] = [
            {"name": f"style {number}", "keys": 2, "models": models} for number in range(20)
        ]
        route.fulfill(json=answer)

    me = visit()
    me.page.route("**/models", changed)
    me.open()
    me.expected_statuses.add(422)  # this server has no such LoRA
    me["#lora-list label"].filter(has_text="style 3").click()
    me["#lora-search"].fill("STYLE 17")
    expect(me["#lora-list li:visible label"]).to_have_text(["style 3", "style 17"])
