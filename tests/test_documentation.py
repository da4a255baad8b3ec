"""The documentation agrees with the code: specification, pages, README, imports, locks."""

import ast
import re
import subprocess
import sys
from dataclasses import fields
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    FOREIGN_PATHS,
    ROOT,
    FakeGenerator,
    ServerProcess,
    allow,
    needs_chromium,
    seen_by_all,
)
from flask import Flask
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
from storage.task_store import TaskStore
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
    scheduler = Scheduler(allowed, TimingModel(), TaskStore(None))
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


def test_the_architecture_page_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert all(sources_of(part) for part in PARTS)
    for part in sorted(PARTS):
        for path in sources_of(part):
            if path.stem != "__init__":
                assert re.search(rf"\b{path.stem}\b", page), path


def test_the_first_table_of_the_architecture_page_names_code_that_exists() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| where is | in |")[2].partition("\n\n")[0]
    places = re.findall(r"`([\w/]+\.py)`: `([\w.]+)(?:\(\))?`", table)
    assert len(places) >= 6
    for path, name in [*places, *re.findall(r"`([\w/]+\.py)`: .*? and `([\w.]+)\(\)`", table)]:
        text = (ROOT / path).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"\b(def|class) {part}\b", text), (path, name)


def test_the_architecture_page_lists_every_lock() -> None:
    """A row of its table names the module of each Lock, Condition and Semaphore."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("\n## Locks\n")[2].partition("\n## ")[0]
    makes_one = re.compile(r"\b(R?Lock|Condition|(Bounded)?Semaphore)\(")
    assert makes_one.search((ROOT / "scheduler" / "scheduler.py").read_text(encoding="utf-8"))
    for part in sorted(PARTS):
        for path in sources_of(part):
            if makes_one.search(path.read_text(encoding="utf-8")):
                assert f"{path.stem}.py" in section, path


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


MODULES = {path.stem for path in ROOT.glob("*.py")}
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"client"}
PARTS = MODULES | PACKAGES
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "log_output": set(),
    "option_values": set(),
    "config_file": set(),
    "doctor": {
        "allowed",
        "configuration",
        "errors",
        "generation.process_memory",
        "models",
        "settings",
    },
    "keep_awake": set(),
    "lan": {"errors"},
    "tracing": {"errors", "queue_manager", "scheduler", "supervision", "task"},
    "commands": {
        "announcements",
        "api",
        "configuration",
        "doctor",
        "errors",
        "generation",
        "key_file",
        "lan",
        "models",
        "settings",
        "storage",
    },
    "announcements": {"allowed", "api", "configuration", "errors", "lan", "models", "settings"},
    "option_groups": set(),
    "option_parser": {"config_file", "option_groups", "option_values", "version"},
    "settings": {"option_parser", "option_values"},
    "supervision": set(),
    "timing": set(),
    "timing_laws": {"timing"},
    "timing_model": {"timing", "timing_laws"},
    "fields": set(),
    "models": {"fields"},
    "images": {"errors"},
    "key_file": {"errors"},
    "decoding": {"errors", "images"},
    "task": {"fields", "models", "timing_model"},
    "allowed": {"errors", "fields", "models", "task"},
    "declared": {"allowed", "errors", "models"},
    "storage": {"errors", "task", "timing", "timing_model"},
    "clocks": {"supervision"},
    "scheduler": {
        "errors",
        "models",
        "allowed",
        "clocks",
        "monitoring.phase_seconds",
        "storage",
        "supervision",
        "task",
        "timing",
        "timing_model",
    },
    "monitoring": {"allowed", "models", "scheduler", "storage", "task", "timing", "timing_model"},
    "queue_manager": {
        "allowed",
        "errors",
        "models",
        "monitoring",
        "scheduler",
        "task",
        "timing_model",
    },
    "generation": {"errors", "images", "models", "supervision", "task", "timing.speeds"},
    "generator": {"generation", "errors", "models", "task"},
    "outgoing": set(),
    "workers": {
        "errors",
        "images",
        "models",
        "outgoing",
        "supervision",
        "task",
        "timing_model",
    },
    "checks": {"errors", "supervision"},
    "api": {
        "version",
        "decoding",
        "key_file",
        "generation.previews",
        "errors",
        "fields",
        "images",
        "models",
        "monitoring",
        "outgoing",
        "allowed",
        "queue_manager",
        "scheduler",
        "storage.callback_store",
        "supervision",
        "task",
        "timing_model",
        "workers",
    },
    "compat": {
        "api",
        "decoding",
        "errors",
        "fields",
        "images",
        "models",
        "queue_manager",
        "scheduler",
        "task",
        "version",
    },
    "application": {
        "api",
        "compat",
        "errors",
        "generation.previews",
        "models",
        "queue_manager",
        "workers",
    },
    "cluster": {
        "allowed",
        "errors",
        "images",
        "models",
        "scheduler",
        "supervision",
        "task",
        "timing",
        "timing_model",
    },
    "configuration": {
        "allowed",
        "api",
        "declared",
        "errors",
        "generation.memory_guard",
        "generation.previews",
        "generation.recognition",
        "generator",
        "key_file",
        "models",
        "scheduler",
        "settings",
        "storage",
        "workers",
    },
    "console": set(),
    "service_manager": set(),
    "version": set(),
    "server": PARTS,
    "remote_worker": PARTS,
}
"""By module or package at the top level: the modules and packages that it may import."""
HOMES: dict[str, set[str]] = {
    "client": set(),
    "requests": set(),
    "mlx": {
        "generator",
        "generation",
        "models.cpu_products",
        "models.mlx_setup",
        "models.painter",
        "models.tiny_modules",
    },
    "mflux": {"generation", "models.mflux_registry", "models.hub_cache", "models.painter"},
    "huggingface_hub": {"generation", "models.hub_cache"},
    "cachetools": {"api", "compat", "generation"},
    "flasgger": {"api.api_docs"},
    "flask": {"application", "api", "compat"},
    "waitress": {"api.http_server", "api.http_loop", "api.http_channel", "api.http_request"},
    "celery": {"cluster.carrier"},
    "certifi": {"outgoing"},
    "jiter": {"api.json_text"},
    "kombu": {"cluster.carrier"},
    "sqlite3": {"storage.database"},
    "PIL": {
        "images",
        "task",
        "workers",
        "generation.pipelines",
        "generation.helpers",
        "generation.inpainting",
        "generator",
        "generation.previews",
        "decoding",
        "models.painter",
    },
    "numpy": {
        "generation.inpainting",
        "generation.previews",
        "scheduler.baselines",
        "scheduler.columns",
        "scheduler.fair_share",
        "scheduler.plan",
        "scheduler.policy",
        "scheduler.prompts",
        "scheduler.schedule",
        "scheduler.walk",
        "models.painter",
        "models.tiny_modules",
        "timing",
        "timing_laws",
        "models.tiny_recipes",
        "models.tiny_weights",
    },
    "pydantic": {"fields", "key_file", "task", "api", "cluster", "compat"},
    "prometheus_client": {"api", "monitoring"},
    "redis": {"cluster.carrier"},
}
"""By library: the modules and packages that may import it."""


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def sources_of(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py")) if part in PACKAGES else [ROOT / f"{part}.py"]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def is_within(name: str, allowed: str) -> bool:
    return f"{name}.".startswith(f"{allowed}.")


@pytest.mark.parametrize("part", sorted(PARTS))
def test_imports_point_down_as_the_table_says(part: str) -> None:
    assert sources_of(part)
    for path in sources_of(part):
        for name in imports_of(path):
            if name.split(".")[0] in PARTS - {part}:
                assert any(is_within(name, allowed) for allowed in MAY_IMPORT[part]), (path, name)


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_is_imported_only_where_allowed(library: str) -> None:
    users = {
        module_of(path)
        for part in PARTS
        for path in sources_of(part)
        if any(is_within(name, library) for name in imports_of(path))
    }
    at_home = {user for user in users if any(is_within(user, home) for home in HOMES[library])}
    assert users == at_home
    for home in HOMES[library]:
        assert any(is_within(user, home) for user in users), home


def test_no_import_leads_in_a_circle() -> None:
    modules = {module_of(path): path for part in PARTS for path in sources_of(part)}
    imported = {
        module: {other for name in imports_of(path) for other in modules if is_within(name, other)}
        for module, path in modules.items()
    }
    assert set(TopologicalSorter(imported).static_order()) == set(modules)


@pytest.mark.parametrize("path", sorted((ROOT / "client").glob("*.py")), ids=lambda p: p.name)
def test_the_client_knows_http_only(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports_of(path)} & PARTS
    ast.parse(path.read_text(), feature_version=(3, 9))  # it also runs on older versions


def test_no_package_hides_a_module_of_the_standard_library() -> None:
    assert not PARTS & set(sys.stdlib_module_names)


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
