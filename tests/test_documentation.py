"""What is promised is checked: specification, page, README, the picture of the rooms."""

import ast
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import CHROMIUM, ROOT, FakeGenerator, ServerProcess, needs_chromium, offer_of
from flask import Flask

from generate_request import GenerateRequest, Limits
from previews import Previews
from queue_manager import QueueManager
from server import create_app
from settings import Settings, flag_of, variable_of
from submission import Submission
from task_answers import StatusAnswer
from task_store import TaskStore
from timing_model import TimingModel
from waiting_places import WaitingPlaces
from worker import Worker

PAGES = {
    "/",
    "/web/<name>",
    "/swagger",
    "/openapi.json",
    "/apidocs/index.html",
    "/oauth2-redirect.html",
}


@pytest.fixture(scope="module")
def app() -> Flask:
    offer = offer_of("tiny")
    queue = QueueManager(offer, TimingModel(), TaskStore(None))
    generator = FakeGenerator()
    return create_app(
        queue,
        Worker(queue, generator, lambda error: None),
        generator,
        Submission(queue, offer, Limits(max_steps=42), generator.refusal),
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
    native = {route for route in routes_of(app) if not route[0].startswith("/api/")}
    assert documented == native
    copied = {route for route in native if not route[0].startswith(("/v1/", "/sdapi/"))}
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
    for name, schema in spec["components"]["schemas"].items():
        for field, described in schema.get("properties", {}).items():
            assert described.get("description"), (name, field)


def test_every_operation_documents_its_errors_with_examples(spec: dict[str, Any]) -> None:
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


def test_the_readme_names_every_option_with_its_variable() -> None:
    readme = (ROOT / "README.md").read_text()
    for option in fields(Settings):
        assert f"`{flag_of(option.name)}`" in readme
        assert f"`{variable_of(option.name)}`" in readme


def test_the_page_of_models_is_what_the_catalog_says() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    from make_models_page import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run make models"


def test_the_readme_names_every_field() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in GenerateRequest.model_fields:
        assert f"`{name}`" in readme


def test_help_lists_every_option_with_its_variable() -> None:
    shown = subprocess.run(
        [sys.executable, "server.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for option in fields(Settings):
        assert flag_of(option.name) in shown
        assert variable_of(option.name) in shown.replace("\n", "").replace(" ", "") or (
            variable_of(option.name) in shown
        )


OWN_MODULES = {path.stem for path in ROOT.glob("*.py")}
MAY_IMPORT: dict[str, set[str]] = {
    "work_source": {"errors", "events", "model_catalog", "queue_core", "task"},
    "wait_forecast": {
        "affinity",
        "live_state",
        "model_catalog",
        "task",
        "task_view",
        "timing_model",
    },
    "queue_core": {
        "errors",
        "events",
        "kept_tasks",
        "live_queue",
        "model_catalog",
        "offer",
        "queue_state",
        "task",
        "task_store",
        "timing_model",
        "troubles",
    },
    "live_state": {
        "held_tasks",
        "model_catalog",
        "task",
        "timing_model",
        "work_forecast",
        "work_line",
    },
    "affinity": {"live_state", "task"},
    "errors": set(),
    "images": {"errors"},
    "model_catalog": set(),
    "settings": set(),
    "tiny_models": {"tiny_recipes", "tiny_slimming"},
    "tiny_slimming": {"tiny_recipes"},
    "tiny_recipes": set(),
    "timing_laws": set(),
    "timing_model": {"timing_laws"},
    "waiting_line": set(),
    "events": set(),
    "previews": {"images"},
    "webhooks": {
        "callback_store",
        "errors",
        "events",
        "generate_request",
        "queue_manager",
        "task_answers",
    },
    "waiting_places": set(),
    "query_values": {"errors"},
    "event_texts": {"errors", "events", "queue_manager", "task_answers"},
    "live_api": {
        "answers",
        "api_docs",
        "errors",
        "event_texts",
        "events",
        "images",
        "previews",
        "query_values",
        "queue_manager",
        "task",
        "waiting_places",
    },
    "long_poll": {"queue_manager", "task_view", "waiting_places"},
    "cors": set(),
    "hub_cache": {"model_catalog"},
    "mlx_setup": set(),
    "prompt_cache": set(),
    "task": {"model_catalog", "timing_model"},
    "generate_request": {"errors", "images", "model_catalog", "task"},
    "offer": {"errors", "model_catalog", "task"},
    "mflux_registry": {"mlx_setup", "model_catalog", "tiny_models"},
    "pipelines": {"errors", "model_catalog", "prompt_cache", "task", "tiny_models"},
    "generator": {
        "errors",
        "hub_cache",
        "model_catalog",
        "pipelines",
        "previews",
        "prompt_cache",
        "task",
    },
    "file_store": {"errors"},
    "database": {"errors"},
    "timing_store": {"database", "timing_model"},
    "callback_store": {"database"},
    "task_store": {
        "callback_store",
        "database",
        "errors",
        "file_store",
        "stored_task",
        "task",
        "timing_model",
        "timing_store",
    },
    "stored_task": {"database", "task", "timing_model"},
    "work_forecast": {"model_catalog", "task", "timing_model"},
    "work_line": {"model_catalog", "task", "timing_model", "waiting_line"},
    "task_view": {"task", "timing_model", "work_line"},
    "held_tasks": {"model_catalog", "task"},
    "downloads": {"errors", "hub_cache", "model_catalog"},
    "live_queue": {
        "affinity",
        "live_state",
        "model_catalog",
        "task",
        "task_view",
        "timing_model",
        "wait_forecast",
    },
    "queue_state": {"held_tasks", "model_catalog", "timing_model"},
    "troubles": {"errors"},
    "kept_tasks": {
        "stored_task",
        "errors",
        "events",
        "queue_state",
        "task",
        "task_store",
        "task_view",
        "troubles",
    },
    "queue_manager": {
        "errors",
        "events",
        "kept_tasks",
        "model_catalog",
        "queue_state",
        "task",
        "task_view",
        "timing_model",
        "work_source",
    },
    "worker": {"errors", "hub_cache", "images", "model_catalog", "task"},
    "submission": {
        "errors",
        "generate_request",
        "images",
        "model_catalog",
        "offer",
        "queue_manager",
        "task",
    },
    "answers": set(),
    "model_answers": {"answers", "model_catalog"},
    "task_answers": {
        "answers",
        "model_answers",
        "queue_state",
        "task",
        "task_view",
        "timing_model",
    },
    "server_answers": {"answers", "model_answers", "queue_state", "timing_model"},
    "api_docs": {
        "answers",
        "errors",
        "generate_request",
        "model_answers",
        "server_answers",
        "task_answers",
    },
    "queue_api": {
        "answers",
        "api_docs",
        "errors",
        "query_values",
        "queue_manager",
        "task",
        "task_answers",
    },
    "models_api": {
        "answers",
        "api_docs",
        "errors",
        "hub_cache",
        "model_answers",
        "model_catalog",
        "offer",
        "queue_manager",
        "queue_state",
    },
    "server_api": {
        "answers",
        "api_docs",
        "models_api",
        "queue_manager",
        "queue_state",
        "server_answers",
        "worker",
    },
    "native_api": {
        "answers",
        "api_docs",
        "errors",
        "generate_request",
        "images",
        "long_poll",
        "models_api",
        "query_values",
        "queue_manager",
        "queue_state",
        "submission",
        "task",
        "task_answers",
        "task_view",
        "waiting_places",
    },
    "web_page": set(),
    "http_server": {"answers", "errors"},
    "server": OWN_MODULES
    - {"server", "tiny_models", "images", "live_queue", "waiting_line", "work_line"},
}
HOMES: dict[str, set[str]] = {
    "client": set(),
    "mlx": {"generator", "mlx_setup", "prompt_cache"},
    "mflux": {"mflux_registry", "pipelines"},
    "flasgger": {"api_docs"},
    "flask": {
        "answers",
        "api_docs",
        "cors",
        "http_server",
        "live_api",
        "models_api",
        "native_api",
        "query_values",
        "queue_api",
        "server",
        "server_api",
        "web_page",
    },
    "waitress": {"http_server"},
    "requests": set(),
    "certifi": {"webhooks"},
    "sqlite3": {"database"},
    "PIL": {"images", "previews", "submission", "task", "generator", "worker"},
    "numpy": {"previews", "tiny_recipes"},
    "pydantic": {
        "task",
        "generate_request",
        "api_docs",
        "answers",
        "task_answers",
        "model_answers",
        "server_answers",
    },
}


def imports_of(module: str) -> set[str]:
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("module", sorted(OWN_MODULES))
def test_imports_point_the_way_the_picture_shows(module: str) -> None:
    imports = imports_of(module)
    assert imports & OWN_MODULES <= MAY_IMPORT[module]
    for library, homes in HOMES.items():
        if library in imports:
            assert module in homes


@pytest.mark.parametrize("path", sorted((ROOT / "client").glob("*.py")), ids=lambda p: p.name)
def test_the_client_knows_http_only(path: Path) -> None:
    assert not imports_of(f"client/{path.stem}") & OWN_MODULES
    ast.parse(path.read_text(), feature_version=(3, 9))  # it shall run where the server does not


def test_no_module_hides_one_of_the_standard_library() -> None:
    assert not OWN_MODULES & set(sys.stdlib_module_names)


@needs_chromium
def test_try_it_out_works_for_the_whole_flow_in_a_real_browser(
    server: ServerProcess, tmp_path: Path
) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
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
                    picture.evaluate("image => image.decode().then(() => image.naturalWidth)")
                    == 1024
                )
        browser.close()
    assert asked_elsewhere == []
    assert broken == []
