"""The foreign APIs, built and registered."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from flask import Flask

from api.api_docs import ForeignSchemas
from api.client_queue import OwnQueue
from api.links import Links
from api.routes import blueprint_of
from api.submission import Submission
from api.waiting_places import WaitingPlaces
from compat.a1111 import SCHEMAS_OF_A1111, A1111Routes
from compat.a1111_callers import Callers
from compat.a1111_checkpoint import Checkpoint
from compat.a1111_errors import a1111_error
from compat.a1111_lists import A1111Lists, ControlNetRoutes, GradioRoutes, without_effect
from compat.mcp import PATH as MCP_PATH
from compat.mcp import SCHEMAS_OF_MCP, McpRoutes, mcp_error
from compat.mcp_results import Results
from compat.ollama import SCHEMAS_OF_OLLAMA, OllamaRoutes, is_ollamas, ollama_error
from compat.openai_chat import SCHEMAS_OF_CHAT, ChatRoutes
from compat.openai_errors import openai_error
from compat.openai_images import SCHEMAS_OF_OPENAI, OpenAIRoutes
from compat.openai_responses import SCHEMAS_OF_RESPONSES, ResponsesRoutes
from compat.sync_calls import SyncCalls
from errors import Problem
from models.model_catalog import Catalog
from task import Memory

OPENAI_PREFIX = "/v1"
A1111_PREFIX = "/sdapi/v1"
CONTROLNET_PREFIX = "/controlnet"
OLLAMA_PREFIX = "/api"
NATIVE_GENERATE = "api_tasks.generate"
"""The endpoint of POST /api/generate, which Ollama's API has, too."""
FOREIGN_SCHEMAS: ForeignSchemas = (
    *SCHEMAS_OF_OPENAI,
    *SCHEMAS_OF_RESPONSES,
    *SCHEMAS_OF_CHAT,
    *SCHEMAS_OF_A1111,
    *SCHEMAS_OF_OLLAMA,
    *SCHEMAS_OF_MCP,
)


@dataclass(frozen=True)
class ForeignOptions:
    """Options of the operator."""

    sync_max_wait_s: float = 280.0
    clamp: bool = True
    public_url: str = ""
    model_switch: bool = False


def install_foreign_apis(
    app: Flask,
    own_queue: OwnQueue,
    submission: Submission,
    catalog: Catalog,
    *,
    places: WaitingPlaces,
    links: Links,
    options: ForeignOptions,
    memory: Callable[[], Memory],
    preview: Callable[[str], bytes | None],
) -> ForeignSchemas:
    """Registers the routes, after the native ones; returns the schemas that their documentation
    names.

    Args:
        preview: the picture of a running task so far, by task_id; None where there is none.
    """
    calls = SyncCalls(
        own_queue,
        submission,
        catalog,
        places,
        max_wait_s=options.sync_max_wait_s,
        clamp=options.clamp,
    )
    checkpoint = Checkpoint(calls, options.model_switch)
    openai = OpenAIRoutes(calls, preview, links, started_at=time.time())
    a1111 = A1111Routes(calls, checkpoint, Callers(own_queue), preview)
    lists = A1111Lists(calls, checkpoint, memory)
    mcp = McpRoutes(calls, Results(links, calls.decoder))
    app.register_blueprint(blueprint_of(mcp, "mcp"))
    app.register_blueprint(blueprint_of(openai, "openai", OPENAI_PREFIX))
    app.register_blueprint(
        blueprint_of(ResponsesRoutes(calls, preview), "openai_responses", OPENAI_PREFIX)
    )
    app.register_blueprint(blueprint_of(ChatRoutes(calls, preview), "openai_chat", OPENAI_PREFIX))
    app.register_blueprint(blueprint_of(a1111, "a1111", A1111_PREFIX))
    app.register_blueprint(blueprint_of(lists, "a1111_lists", A1111_PREFIX))
    app.register_blueprint(without_effect("a1111_without_effect", A1111_PREFIX))
    app.register_blueprint(blueprint_of(ControlNetRoutes(calls), "controlnet", CONTROLNET_PREFIX))
    app.register_blueprint(blueprint_of(GradioRoutes(calls), "gradio"))
    ollama = OllamaRoutes(calls, started_at=time.time())
    app.register_blueprint(blueprint_of(ollama, "ollama", OLLAMA_PREFIX))
    app.view_functions[NATIVE_GENERATE] = ollama.generate_or(app.view_functions[NATIVE_GENERATE])
    return FOREIGN_SCHEMAS


def foreign_error(path: str, problem: Problem) -> tuple[object, int, dict[str, str]] | None:
    """The body, the status and the headers of an error in the form of the API that this path
    belongs to; None: it is the native one's."""
    if path.startswith(f"{OPENAI_PREFIX}/"):
        return openai_error(problem)
    if path.startswith(("/sdapi/", f"{CONTROLNET_PREFIX}/")):
        return a1111_error(problem)
    if is_ollamas(path):
        return ollama_error(problem)
    if path == MCP_PATH:
        return mcp_error(problem)
    return None
