"""The documentation agrees with the code: specification, pages, README, links."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import FOREIGN_PATHS, ROOT, ServerProcess, allow, needs_chromium, seen_by_all
from fake_generator import FakeGenerator
from flask import Flask
from memory_stores import memory_store
from pages import WAIT_MS
from playwright.sync_api import Browser

from api.generate_request import GenerateRequest, Limits
from api.submission import Submission
from api.task_answers import StatusAnswer
from api.waiting_places import WaitingPlaces
from application import create_app
from compat.ollama import PATHS as OLLAMAS
from generation.previews import Previews
from queue_manager import QueueManager
from scheduler.scheduler import Scheduler
from scheduler.worker_api import WorkerApi
from settings import Settings, flag_of, variable_of
from timing_model import TimingModel
from workers.worker import Worker

sys.path.insert(0, str(ROOT / "docs"))

PAGES = {
    "/",
    "/operator",
    "/pair",
    "/web/<name>",
    "/web/<wanted>/<name>",
    "/swagger",
    "/openapi.json",
    "/apidocs/index.html",
    "/oauth2-redirect.html",
}


@pytest.fixture(scope="module")
def app() -> Flask:
    allowed = allow("noise-flux1")
    scheduler = Scheduler(allowed, TimingModel(), memory_store())
    queue = QueueManager(scheduler)
    generator = FakeGenerator()
    return create_app(
        queue,
        Worker(WorkerApi(scheduler), generator, lambda error: None),
        generator,
        Submission(
            seen_by_all(queue),
            allowed,
            Limits(max_steps=42),
            generator.refusal,
            places=WaitingPlaces(1),
        ),
        places=WaitingPlaces(1),
        previews=Previews(on=False),
        data_dir=ROOT,
        max_body_bytes=1_000_000,
    )


@pytest.fixture(scope="module")
def spec(app: Flask) -> dict[str, Any]:
    answer = app.test_client().get("/openapi.json")
    document: dict[str, Any] = answer.get_json()
    return document


def routes_of(app: Flask) -> set[tuple[str, str]]:
    return {
        (re.sub("<(.+?)>", "{\\1}", rule.rule), method)
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if rule.rule not in PAGES and not rule.rule.startswith("/flasgger_static")
    }


def test_the_specification_and_the_url_map_name_the_same_routes(
    app: Flask, spec: dict[str, Any]
) -> None:
    documented = {
        (path, method.upper()) for path, methods in spec["paths"].items() for method in methods
    }
    copies = {route for route in routes_of(app) if route[0].startswith("/api/")}
    native = routes_of(app) - {route for route in copies if route[0] not in OLLAMAS}
    assert documented == native
    copied = {route for route in native if not route[0].startswith(FOREIGN_PATHS)}
    assert {(f"/api{path}", method) for path, method in copied} == routes_of(app) - native


def test_every_field_of_the_request_is_documented_with_the_operators_limits(
    spec: dict[str, Any],
) -> None:
    schema = spec["components"]["schemas"]["GenerateRequest"]
    assert set(schema["properties"]) == set(GenerateRequest.model_fields)
    assert all(field["description"] for field in schema["properties"].values())
    assert not {"ge", "le"} & set(schema["properties"]["seed"])
    assert schema["properties"]["steps"]["maximum"] == 42
    assert schema["properties"]["width"]["default"] == 1024


def test_every_field_of_every_answer_is_described(spec: dict[str, Any]) -> None:
    assert "StatusAnswer" in spec["components"]["schemas"]
    for name, schema in spec["components"]["schemas"].items():
        for field, described in schema.get("properties", {}).items():
            assert described.get("description"), (name, field)


def test_every_operation_documents_its_errors_with_examples(spec: dict[str, Any]) -> None:
    assert "/generate" in spec["paths"]
    for path, methods in spec["paths"].items():
        for operation in methods.values():
            assert operation["summary"]
            assert "200" in operation["responses"]
            for status, response in operation["responses"].items():
                assert response["description"], (path, status)
                if status >= "400" and path != "/health":
                    assert response["content"]["application/json"]["examples"], (path, status)
                if status == "429":
                    assert "Retry-After" in response["headers"]


def test_every_reference_of_the_specification_leads_somewhere(spec: dict[str, Any]) -> None:
    references = set(re.findall(r"'\$ref': '#/components/schemas/(\w+)'", str(spec)))
    assert references
    assert references <= set(spec["components"]["schemas"])


def test_every_answer_has_the_documented_fields(server: ServerProcess) -> None:
    task_id = server.submit()["task_id"]
    status = server.wait_until_ended(task_id)
    assert set(status) <= set(StatusAnswer.model_fields)
    StatusAnswer.model_validate(status)


def test_the_page_of_options_is_what_the_settings_say() -> None:
    from make_reference_pages import OPTIONS_PAGE, options_page

    page = OPTIONS_PAGE.read_text(encoding="utf-8")
    assert page == options_page(), "run make pages"
    for option in fields(Settings):
        assert f"`{flag_of(option.name)}`" in page
        assert f"`{variable_of(option.name)}`" in page


def test_the_page_of_fields_is_what_the_request_says() -> None:
    from make_reference_pages import FIELDS_PAGE, fields_page

    page = FIELDS_PAGE.read_text(encoding="utf-8")
    assert page == fields_page(), "run make pages"
    for name in GenerateRequest.model_fields:
        assert f"`{name}`" in page


def test_the_page_of_models_is_what_the_catalog_says() -> None:
    from make_models_page import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run make pages"


PAGES_OF_TEXT = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])


@pytest.mark.parametrize("page", PAGES_OF_TEXT, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def test_the_readme_is_short_enough_for_a_newcomer() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_help_lists_every_option_with_its_variable() -> None:
    shown = subprocess.run(
        [sys.executable, "server.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert fields(Settings)
    for option in fields(Settings):
        assert flag_of(option.name) in shown
        assert variable_of(option.name) in shown.replace("\n", "").replace(" ", "") or (
            variable_of(option.name) in shown
        )


@needs_chromium
def test_try_it_out_works_for_the_whole_flow_in_a_real_browser(
    browser: Browser, server: ServerProcess, tmp_path: Path
) -> None:
    page = browser.new_page()
    page.set_default_timeout(WAIT_MS)
    asked_elsewhere: list[str] = []
    broken: list[str] = []
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((server.url, "data:", "blob:"))
            else asked_elsewhere.append(request.url)
        ),
    )
    page.goto(server.url + "/swagger")

    def try_out(operation: str) -> Any:
        block = page.locator(f"#operations-{operation}")
        block.locator(".opblock-summary").first.click()
        block.locator("button.try-out__btn").click()
        return block

    generate = try_out("images-post_generate")  # with the example body as it stands
    generate.locator("button.execute").click()
    shown = generate.locator(".live-responses-table .highlight-code").first.inner_text()
    task_id = re.search(r'"task_id": "(\w+)"', shown)
    assert task_id
    server.wait_until_ended(task_id[1])

    for operation, expected in (("status", '"done"'), ("image", None)):
        block = try_out(f"images-get_{operation}")
        block.locator('input[placeholder^="task_id"]').fill(task_id[1])
        block.locator("button.execute").click()
        if expected:
            result = block.locator(".live-responses-table .highlight-code").first
            assert expected in result.inner_text()
        else:
            picture = block.locator(".live-responses-table img")
            picture.wait_for()
            assert (
                picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 1024
            )
    page.close()
    assert asked_elsewhere == []
    assert broken == []
