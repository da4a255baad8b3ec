"""What is promised is checked: specification, page, README, the picture of the rooms."""

import ast
import re
import subprocess
import sys
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from conftest import CHROMIUM, ROOT, FakeGenerator, ServerProcess, needs_chromium, offer_of
from flask import Flask

from api.generate_request import GenerateRequest, Limits
from api.submission import Submission
from api.task_answers import StatusAnswer
from api.waiting_places import WaitingPlaces
from drawing.previews import Previews
from queue_manager import QueueManager
from server import create_app
from settings import Settings, flag_of, variable_of
from storage.task_store import TaskStore
from timing_model import TimingModel
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
        Submission(queue, offer, Limits(max_steps=42), generator.refusal, places=WaitingPlaces(1)),
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


MODULES = {path.stem for path in ROOT.glob("*.py")}
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"client"}
ROOMS = MODULES | PACKAGES
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "settings": set(),
    "supervision": set(),
    "timing_laws": set(),
    "timing_model": {"timing_laws"},
    "models": set(),
    "images": {"errors"},
    "decoding": {"errors", "images"},
    "task": {"models", "timing_model"},
    "offer": {"errors", "models", "task"},
    "storage": {"errors", "task", "timing_model"},
    "queueing": {"errors", "models", "offer", "storage", "supervision", "task", "timing_model"},
    "queue_manager": {"errors", "models", "queueing", "task", "timing_model"},
    "drawing": {"errors", "images", "models", "supervision", "task"},
    "generator": {"drawing", "errors", "models", "task"},
    "worker": {"errors", "images", "models", "supervision", "task"},
    "downloads": {"errors", "models", "supervision"},
    "storage_check": {"errors", "supervision"},
    "api": {
        "decoding",
        "drawing.previews",
        "errors",
        "images",
        "models",
        "offer",
        "queue_manager",
        "queueing",
        "storage.callback_store",
        "supervision",
        "task",
        "timing_model",
        "worker",
    },
    "compat": {
        "api",
        "decoding",
        "errors",
        "images",
        "models",
        "queue_manager",
        "queueing",
        "task",
    },
    "server": ROOMS,
}
"""Rooms, or modules of them."""
HOMES: dict[str, set[str]] = {
    "client": set(),
    "requests": set(),
    "mlx": {"generator", "drawing", "models.mlx_setup"},
    "mflux": {"drawing", "models.mflux_registry"},
    "flasgger": {"api.api_docs"},
    "flask": {"server", "api", "compat"},
    "waitress": {"api.http_server", "api.http_loop", "api.http_channel", "api.http_request"},
    "certifi": {"api.webhooks"},
    "jiter": {"api.json_text"},
    "sqlite3": {"storage.database"},
    "PIL": {"images", "task", "worker", "generator", "drawing.previews", "decoding"},
    "numpy": {"drawing.previews", "models.tiny_recipes"},
    "pydantic": {"task", "api", "compat"},
}
"""Rooms, or modules of them, that may import a library."""


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources_of(room: str) -> list[Path]:
    return sorted((ROOT / room).glob("*.py")) if room in PACKAGES else [ROOT / f"{room}.py"]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def is_within(name: str, allowed: str) -> bool:
    return f"{name}.".startswith(f"{allowed}.")


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_point_the_way_the_picture_shows(room: str) -> None:
    for path in sources_of(room):
        for name in imports_of(path):
            if name.split(".")[0] in ROOMS - {room}:
                assert any(is_within(name, allowed) for allowed in MAY_IMPORT[room]), (path, name)


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_has_its_homes(library: str) -> None:
    users = {
        module_of(path)
        for room in ROOMS
        for path in sources_of(room)
        if any(is_within(name, library) for name in imports_of(path))
    }
    for user in users:
        assert any(is_within(user, home) for home in HOMES[library]), user
    for home in HOMES[library]:
        assert any(is_within(user, home) for user in users), home


def test_no_import_leads_in_a_circle() -> None:
    modules = {module_of(path): path for room in ROOMS for path in sources_of(room)}
    imported = {
        module: {other for name in imports_of(path) for other in modules if is_within(name, other)}
        for module, path in modules.items()
    }
    assert set(TopologicalSorter(imported).static_order()) == set(modules)


@pytest.mark.parametrize("path", sorted((ROOT / "client").glob("*.py")), ids=lambda p: p.name)
def test_the_client_knows_http_only(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports_of(path)} & ROOMS
    ast.parse(path.read_text(), feature_version=(3, 9))  # it shall run where the server does not


def test_no_room_hides_a_module_of_the_standard_library() -> None:
    assert not ROOMS & set(sys.stdlib_module_names)


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
