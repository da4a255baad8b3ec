"""Routes as methods of a class, which has what they call as attributes.

    class QueueRoutes:
        def __init__(self, queue: QueueManager) -> None: ...

        @route("GET", "/queue")
        @documented("List the queue", ...)
        def list_queue(self) -> Response: ...

    app.register_blueprint(blueprint_of(QueueRoutes(queue), "queue"))

A route reads the request, calls, answers.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from flask import Blueprint

View = TypeVar("View", bound=Callable[..., Any])


def route(method: str, path: str) -> Callable[[View], View]:
    """Note the HTTP method and the path under which this method of a class answers. May be used
    several times."""

    def note(view: View) -> View:
        view.routes = [(method, path), *getattr(view, "routes", ())]  # type: ignore[attr-defined]
        return view

    return note


def blueprint_of(views: object, name: str, url_prefix: str | None = None) -> Blueprint:
    """The routes of this object, in the order in which its class defines them."""
    blueprint = Blueprint(name, __name__, url_prefix=url_prefix)
    for attribute, member in vars(type(views)).items():
        for method, path in getattr(member, "routes", ()):
            blueprint.add_url_rule(path, view_func=getattr(views, attribute), methods=[method])
    return blueprint
