"""The structure of the code: imports, and the pages that name its modules and locks."""

import ast
import re
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT
from sources import PARTS, sources_of


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
    "cachetools": {"api", "cluster", "compat", "generation", "scheduler"},
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
