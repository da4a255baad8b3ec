"""The WSGI application: every route, and how errors are answered."""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

import errors
from api.answers import error_response
from api.api_docs import PAGE_ROUTE, install_docs
from api.client_queue import own_queue_of
from api.cors import Cors
from api.identity import Identity
from api.image_api import ImageRoutes
from api.keep_api import KEEP_SCHEMAS, KeepRoutes
from api.links import Links
from api.live_api import LiveRoutes
from api.machines_api import MachineRoutes
from api.metrics_api import MetricsRoutes
from api.models_api import ModelRoutes
from api.native_api import TaskRoutes
from api.operator_api import OperatorRoutes
from api.origin_check import AllowedHosts, install_origin_check
from api.pairing import pairing_routes
from api.query_values import check_query
from api.queue_api import QueueRoutes
from api.request_log import RequestLog
from api.routes import blueprint_of
from api.security_headers import install_security_headers
from api.server_api import ServerRoutes
from api.session_api import SESSION_SCHEMAS, SessionRoutes
from api.submission import Submission
from api.trusted_proxies import Network, trusting
from api.waiting_places import WaitingPlaces
from api.web_page import page_routes
from compat.install import ForeignOptions, foreign_error, install_foreign_apis
from generation.previews import Previews
from models.mflux_registry import read_catalog
from queue_manager import QueueManager
from workers.protocols import Generator
from workers.worker import Worker

log = logging.getLogger("mflux-server")

NATIVE_SCHEMAS = (*SESSION_SCHEMAS, *KEEP_SCHEMAS)


def create_app(
    queue: QueueManager,
    worker: Worker,
    generator: Generator,
    submission: Submission,
    *,
    places: WaitingPlaces,
    previews: Previews,
    data_dir: Path,
    max_body_bytes: int,
    allowed_hosts: AllowedHosts | None = None,
    identity: Identity | None = None,
    foreign: ForeignOptions | None = None,
    cors: Cors | None = None,
    trusted_proxies: Sequence[Network] = (),
) -> Flask:
    """Builds the WSGI application: routes at the root and under /api, foreign APIs beside them.

    Args:
        places: budget for requests that hold a thread for long.
        allowed_hosts: host names under which clients may address the server; None: any.
        trusted_proxies: whose X-Forwarded-* headers are read.
        identity, cors: None: everyone is trusted, no other origin is allowed.
    """
    cors, identity = cors or Cors(), identity or Identity(None, trusted=True)
    app, requests = _empty_app(max_body_bytes, trusted_proxies), RequestLog()
    _install_checks(app, requests, allowed_hosts or AllowedHosts("", "*"), identity, cors)
    own_queue, catalog, options = own_queue_of(queue), read_catalog(), foreign or ForeignOptions()
    links = _links(queue, identity, options)
    _register(
        app,
        {
            "tasks": TaskRoutes(own_queue, submission, places),
            "images": ImageRoutes(own_queue, places, links),
            "keep": KeepRoutes(own_queue, places, data_dir),
            "queue": QueueRoutes(own_queue, places),
            "operator": OperatorRoutes(queue, own_queue, identity, places),
            "machines": MachineRoutes(queue, places),
            "live": LiveRoutes(queue, own_queue, places, previews, submission.decoder),
            "server": ServerRoutes(queue, worker, generator, data_dir),
            "metrics": MetricsRoutes(queue, worker, generator, data_dir, requests),
            "models": ModelRoutes(queue, submission, catalog, generator.fit_of_adapter),
            "session": SessionRoutes(identity),
        },
    )
    schemas = install_foreign_apis(
        app,
        own_queue,
        submission,
        catalog,
        places=places,
        links=links,
        options=options,
        memory=lambda: generator.memory,
        preview=previews.look,
    )
    _register_pages(app, identity)
    install_docs(app, submission.limits, (*NATIVE_SCHEMAS, *schemas))
    identity.publish(app, "flasgger.", "openapi")
    return app


def _register_pages(app: Flask, identity: Identity) -> None:
    """What only browsers open."""
    app.register_blueprint(page_routes())
    app.register_blueprint(pairing_routes(identity))


def _install_checks(
    app: Flask, requests: RequestLog, hosts: AllowedHosts, identity: Identity, cors: Cors
) -> None:
    """What happens before and after each view."""
    requests.install(app)
    install_origin_check(app, hosts, cors.allows)
    install_security_headers(app)
    app.before_request(check_query)
    cors.install(app)
    identity.install(app)


def _links(queue: QueueManager, identity: Identity, options: ForeignOptions) -> Links:
    sign = None if identity.trusts_everyone else identity.sign
    return Links(queue, sign, options.public_url)


def _register(app: Flask, native: dict[str, object]) -> None:
    """Register the native routes at the root and under /api, by the name of their blueprint."""
    for name, routes in native.items():
        blueprint = blueprint_of(routes, name)
        app.register_blueprint(blueprint)
        app.register_blueprint(blueprint, url_prefix="/api", name=f"api_{name}")


class _App(Flask):
    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """No view and no hook here is a coroutine; Flask looks at each of them at each request."""
        return func


def _empty_app(max_body_bytes: int, proxies: Sequence[Network]) -> Flask:
    app = _App(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = max_body_bytes
    app.url_map.strict_slashes = False
    app.register_error_handler(Exception, _answer_error)
    inner = trusting(app.wsgi_app, proxies)
    app.wsgi_app = _without_double_slashes(inner)  # type: ignore[method-assign,assignment]
    app.json.sort_keys = False  # type: ignore[attr-defined]  # the specification, as written
    return app


def _without_double_slashes(inner: WSGIApplication) -> WSGIApplication:
    """Removes double slashes from paths, because apps append "/path" to a base URL that ends with a
    slash, and do not follow redirects."""

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        environ["PATH_INFO"] = re.sub("/{2,}", "/", environ.get("PATH_INFO", ""))
        return inner(environ, start_response)

    return application


def _answer_error(error: Exception) -> Response:
    if isinstance(error, RequestEntityTooLarge):
        error = errors.BodyTooLarge()
    headers: list[tuple[str, str]] = []
    if isinstance(error, errors.ServerError):
        problem = error.problem
    elif isinstance(error, HTTPException) and error.code is not None:
        if error.code < 400:
            return error.get_response()  # type: ignore[return-value]  # a redirect
        code = error.name.lower().replace(" ", "_")
        message = f"{request.method} {request.path[:200]}: {error.name}. See {PAGE_ROUTE}."
        problem = errors.Problem(error.code, code, message)
        headers = [header for header in error.get_headers() if header[0].lower() == "allow"]
    else:
        log.error("%s %s failed", request.method, request.path, exc_info=error)
        problem = errors.ServerError().problem
    if foreign := foreign_error(request.path, problem):
        body, status, own_headers = foreign
        answer = jsonify(body)
        answer.status_code = status
        answer.headers.update(own_headers)
    else:
        answer = error_response(problem)
    if problem.http_status == 401:
        answer.headers["WWW-Authenticate"] = 'Bearer realm="mflux-server"'
    answer.headers.extend(headers)
    return answer
