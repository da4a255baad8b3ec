"""The foreign APIs, built and registered."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from flask import Flask

from api.api_docs import ForeignSchemas
from api.submission import Submission
from api.waiting_places import WaitingPlaces
from compat.a1111 import PREFIX as A1111_PREFIX
from compat.a1111 import SCHEMAS_OF_A1111, Checkpoint, a1111_error, a1111_routes
from compat.a1111_callers import Callers
from compat.a1111_lists import a1111_lists
from compat.openai_images import PREFIX as OPENAI_PREFIX
from compat.openai_images import SCHEMAS_OF_OPENAI, openai_error, openai_routes
from compat.sync_calls import SyncCalls
from errors import Problem
from models.model_catalog import Catalog
from queue_manager import QueueManager
from task import Memory


@dataclass(frozen=True)
class ForeignOptions:
    """What the operator has set."""

    sync_max_wait_s: float = 280.0
    clamp: bool = True
    public_url: str = ""
    model_switch: bool = False


def install_foreign_apis(
    app: Flask,
    queue: QueueManager,
    submission: Submission,
    catalog: Catalog,
    *,
    places: WaitingPlaces,
    options: ForeignOptions,
    memory: Callable[[], Memory],
    preview: Callable[[str], bytes | None],
) -> ForeignSchemas:
    """Registers the routes; returns the schemas that their documentation names.

    Args:
        preview: the picture of a running task so far, by task_id; None where there is none.
    """
    calls = SyncCalls(
        queue,
        submission,
        catalog,
        places,
        max_wait_s=options.sync_max_wait_s,
        clamp=options.clamp,
    )
    checkpoint = Checkpoint(calls, options.model_switch)
    app.register_blueprint(
        openai_routes(calls, preview, public_url=options.public_url, started_at=time.time())
    )
    app.register_blueprint(a1111_routes(calls, checkpoint, Callers(queue), preview))
    app.register_blueprint(a1111_lists(calls, checkpoint, memory))
    return (*SCHEMAS_OF_OPENAI, *SCHEMAS_OF_A1111)


def foreign_error(path: str, problem: Problem) -> tuple[object, int, dict[str, str]] | None:
    """The body, the status and the headers of an error in the form of the API that this path
    belongs to; None: it is the native one's."""
    if path.startswith(OPENAI_PREFIX):
        return openai_error(problem)
    if path.startswith(A1111_PREFIX):
        return a1111_error(problem)
    return None
