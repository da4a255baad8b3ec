"""The front door: routes, JSON errors, and main(), which builds, starts and stops everything."""

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from threading import Event, Thread

from flask import Blueprint, Flask, Response, redirect, request
from waitress.channel import HTTPChannel
from waitress.server import create_server
from waitress.task import ErrorTask
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

import errors
from answers import (
    Answer,
    DeleteAnswer,
    ErrorAnswer,
    ErrorBody,
    GenerateAnswer,
    HealthAnswer,
    QueueAnswer,
    StatusAnswer,
    params_answer,
    queue_answer,
    status_answer,
)
from api_docs import PAGE_ROUTE, TASK_ID, documented, install_docs, json_answer, query
from generator import MfluxGenerator, MlxMissing, prepare_mlx
from images import CONTENT_TYPES, EXTENSIONS, to_base64
from model_catalog import DEFAULT_MODEL, DEFAULT_MODEL_WITHOUT_GPU, MODELS, Model, find_model
from queue_manager import QueueManager, ServerState
from settings import Settings
from task import Limits, TaskStatus, parse_request, resolve
from timing_model import TimingModel
from worker import Generator, Worker

log = logging.getLogger("mflux-server")

STOP_S = 2.0
"""Seconds that a running step gets when the server stops."""
SEND_BYTES = 64 * 1024


def create_app(queue: QueueManager, limits: Limits, max_body_bytes: int) -> Flask:
    """The WSGI application: every route at the root and under /api."""
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = max_body_bytes
    app.url_map.strict_slashes = False
    app.json.sort_keys = False  # type: ignore[attr-defined]  # the specification, as written
    routes = native_routes(queue, limits)
    app.register_blueprint(routes)
    app.register_blueprint(routes, url_prefix="/api", name="api")
    app.register_error_handler(Exception, _answer_error)
    app.add_url_rule("/", "home", lambda: redirect(PAGE_ROUTE))
    install_docs(app, limits)
    return app


def native_routes(queue: QueueManager, limits: Limits) -> Blueprint:
    routes = Blueprint("native", __name__)
    started_at = time.monotonic()

    @routes.post("/generate")
    @documented(
        "Ask for an image",
        tag="pictures",
        description="Puts a task into the queue and answers at once.",
        body="GenerateRequest",
        answers={200: json_answer(GenerateAnswer, "The task is in the queue.")},
        errors=(
            errors.InvalidInput,
            errors.BodyTooLarge,
            errors.UnsupportedMediaType,
            errors.QueueFull,
            errors.NoWorker,
        ),
    )
    def generate() -> Response:
        # Asking for this header also keeps foreign web pages out: a browser lets no page send it
        # to another origin without that origin's consent, which this server does not give.
        if not request.is_json:
            raise errors.UnsupportedMediaType
        asked = parse_request(request.get_data(), limits)
        params = resolve(asked, queue.model, limits)
        task, others = queue.submit(params, urgent=bool(asked.priority))
        ignored = asked.guidance is not None and params.guidance is None
        return _json(
            GenerateAnswer(
                task_id=task.task_id,
                status=task.status,
                task_length=others,
                expected_time_seconds=task.wait_s or 0.0,
                pos=task.pos or 0,
                params=params_answer(params, task.urgent),
                ignored_fields=["guidance"] if ignored else [],
                server=queue.counts().state,
            )
        )

    @routes.get("/status")
    @documented(
        "How far a task is",
        tag="pictures",
        description="Good enough to drive a progress bar. Ask about once per second.",
        parameters=[TASK_ID],
        answers={200: json_answer(StatusAnswer, "The task as it stands.")},
        errors=(errors.InvalidInput, errors.UnknownTask, errors.Gone),
    )
    def status() -> Response:
        view = queue.status(_task_id())
        return _json(status_answer(view, queue.counts().state))

    @routes.get("/image")
    @documented(
        "Fetch an image",
        tag="pictures",
        description="By default this removes the image, once its bytes were sent.",
        parameters=[
            TASK_ID,
            query(
                "base64",
                "Answer base64 text instead of the bytes.",
                {"type": "boolean", "default": False},
            ),
            query(
                "delete",
                "Remove the image after it was sent.",
                {"type": "boolean", "default": True},
            ),
        ],
        answers={
            200: {
                "description": "The image; base64 text if that was asked for.",
                "content": {
                    **{
                        content_type: {"schema": {"type": "string", "format": "binary"}}
                        for content_type in CONTENT_TYPES.values()
                    },
                    "text/plain": {"schema": {"type": "string", "format": "byte"}},
                },
            }
        },
        errors=(errors.InvalidInput, errors.UnknownTask, errors.NotReady, errors.Gone),
    )
    def image() -> Response:
        task_id = _task_id()
        as_base64, delete = _flag("base64", False), _flag("delete", True)
        data, params = queue.image(task_id)
        if as_base64:
            data = to_base64(data).encode("ascii")

        def send() -> Iterator[bytes]:
            for start in range(0, len(data), SEND_BYTES):
                yield data[start : start + SEND_BYTES]
            if delete:
                queue.forget(task_id, "The image was fetched and removed.")

        answer = Response(send())
        answer.content_type = "text/plain" if as_base64 else CONTENT_TYPES[params.format]
        answer.content_length = len(data)
        name = f"{task_id}.{EXTENSIONS[params.format]}"
        answer.headers["Content-Disposition"] = f'inline; filename="{name}"'
        answer.headers["Cache-Control"] = "no-store"
        return answer

    @routes.get("/queue")
    @documented(
        "List the queue",
        tag="queue",
        description="Every task that is not finished, in the order in which they run.",
        answers={200: json_answer(QueueAnswer, "The queue.")},
        errors=(),
    )
    def list_queue() -> Response:
        return _json(queue_answer(queue.queue()))

    @routes.route("/delete", methods=["DELETE", "POST"])
    @documented(
        "Cancel or remove a task",
        tag="queue",
        description="Takes a waiting task out of the queue, stops a running one at its next step, "
        "removes a finished one with its image.",
        parameters=[TASK_ID],
        answers={200: json_answer(DeleteAnswer, "What happened.")},
        errors=(errors.InvalidInput, errors.UnknownTask, errors.Gone),
    )
    def delete() -> Response:
        task_id = _task_id()
        was = queue.delete(task_id)
        message = {
            TaskStatus.WAITING: "The task was taken out of the queue.",
            TaskStatus.RUNNING: "The task was cancelled; its generation ends at the next step.",
            TaskStatus.DONE: "The image was removed.",
        }.get(was, "The record of the task was removed.")
        return _json(DeleteAnswer(task_id=task_id, was=was, message=message))

    @routes.get("/health")
    @documented(
        "Health of the server",
        tag="server",
        answers={
            200: json_answer(HealthAnswer, "loading, ready or busy."),
            503: json_answer(HealthAnswer, "draining or failed."),
        },
        errors=(),
    )
    def health() -> Response:
        counts = queue.counts()
        answer = HealthAnswer(
            status=counts.state,
            model=queue.model.name,
            model_title=queue.model.title,
            quantize=counts.quantize,
            uptime_s=time.monotonic() - started_at,
            waiting=counts.waiting,
            running=counts.running,
            done=counts.done,
            images_bytes=counts.images_bytes,
        )
        works = counts.state not in (ServerState.DRAINING, ServerState.FAILED)
        return _json(answer, 200 if works else 503)

    return routes


def _json(answer: Answer, status: int = 200) -> Response:
    return Response(answer.as_json(), status, mimetype="application/json")


def _task_id() -> str:
    task_id = request.args.get("task_id", "")
    if not 1 <= len(task_id) <= 64:
        raise errors.InvalidInput(
            "task_id is required in the query: the id that /generate gave, 1 to 64 characters.",
            field="task_id",
        )
    return task_id


def _flag(name: str, default: bool) -> bool:
    text = request.args.get(name, "").lower()
    if text == "":
        return default
    if text not in ("true", "1", "false", "0"):
        raise errors.InvalidInput(f"{name} must be true or false.", field=name)
    return text in ("true", "1")


def _answer_error(error: Exception) -> Response:
    if isinstance(error, RequestEntityTooLarge):
        error = errors.BodyTooLarge()
    if isinstance(error, errors.ServerError):
        answer = error_answer(error.http_status, error.code, error.message, error.field)
        if isinstance(error, errors.QueueFull):
            answer.headers["Retry-After"] = str(error.retry_after_s)
        return answer
    if isinstance(error, HTTPException) and error.code is not None:
        if error.code < 400:
            return error.get_response()  # type: ignore[return-value]  # a redirect
        code = error.name.lower().replace(" ", "_")
        answer = error_answer(error.code, code, error.description or error.name)
        for name, value in error.get_headers():
            if name == "Allow":
                answer.headers[name] = value
        return answer
    log.error("%s %s failed", request.method, request.path, exc_info=error)
    unexpected = errors.ServerError()
    return error_answer(unexpected.http_status, unexpected.code, unexpected.message)


def error_answer(status: int, code: str, message: str, field: str | None = None) -> Response:
    error = ErrorBody(code=code, message=message, field=field)
    return _json(ErrorAnswer(error=error), status)


class Server:
    """Everything that runs, connected: queue, worker, HTTP. Nothing starts before start()."""

    def __init__(self, settings: Settings, model: Model, generator: Generator) -> None:
        """Binds the port.

        Raises:
            OSError: the port cannot be had.
        """
        limits = Limits(max_pixels=settings.max_pixels, max_steps=settings.max_steps)
        self.queue = QueueManager(
            model,
            TimingModel(),
            max_queue=settings.max_queue,
            keep_s=settings.keep_s,
            keep_bytes=settings.keep_bytes,
        )
        self.ended = Event()
        self.exit_code = 0
        self._worker = Worker(self.queue, generator, on_load_failure=self._load_failed)
        self._http = create_server(
            create_app(self.queue, limits, settings.max_body_bytes),
            host=settings.host,
            port=settings.port,
            threads=settings.threads,
            connection_limit=5000,
            backlog=1024,
            asyncore_use_poll=True,
            max_request_body_size=settings.max_body_bytes,
            ident="mflux-server",
        )
        self._http.channel_class = _JsonErrorChannel
        self._http_thread = Thread(target=self._http.run, name="http", daemon=True)

    @property
    def port(self) -> int:
        return int(self._http.effective_port)

    def start(self) -> None:
        self._http_thread.start()
        self._worker.start()

    def stop(self) -> bool:
        """Stop accepting tasks, leave the running one at its next step, close the port.

        Returns:
            Whether the worker has ended in time.
        """
        ended = self._worker.stop(STOP_S)
        self._http.task_dispatcher.shutdown(timeout=0.5)
        self._http.close()
        return ended

    def _load_failed(self, error: errors.ModelLoadError) -> None:
        log.error("%s", error)
        self.exit_code = 1
        self.ended.set()


class _JsonErrorTask(ErrorTask):  # type: ignore[misc]
    """What waitress refuses before the application sees it, answered as JSON like the rest."""

    def execute(self) -> None:
        error = self.request.error
        code = error.reason.lower().replace(" ", "_")
        body = ErrorAnswer(error=ErrorBody(code=code, message=error.body)).as_json()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.response_headers.append(("Connection", "close"))
        self.content_length = len(body)
        self.close_on_finish = True
        self.write(body.encode())


class _JsonErrorChannel(HTTPChannel):  # type: ignore[misc]
    error_task_class = _JsonErrorTask


def choose_model(name: str | None, has_gpu: bool) -> Model:
    """The model to load: the one asked for, else the default of this machine.

    Raises:
        ModelLoadError: there is no model of this name.
    """
    if name is None and not has_gpu:
        log.warning(
            "MLX has no GPU here: serving the built-in %s model, which draws abstract noise. "
            "Name a model with --model to load it all the same.",
            DEFAULT_MODEL_WITHOUT_GPU,
        )
        name = DEFAULT_MODEL_WITHOUT_GPU
    model = find_model(name or DEFAULT_MODEL)
    if model is None:
        known = ", ".join(model.name for model in MODELS)
        raise errors.ModelLoadError(f"There is no model {name!r}. Models: {known}.")
    return model


def main(argv: list[str]) -> int:
    settings = Settings.read(argv, os.environ)
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    try:
        has_gpu = prepare_mlx()
        model = choose_model(settings.model, has_gpu)
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        generator = MfluxGenerator(model, settings.quantize, settings.path, settings.data_dir)
        server = Server(settings, model, generator)
    except (MlxMissing, errors.ModelLoadError) as error:
        print(f"server.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"port {settings.port}: " if error.errno == errno.EADDRINUSE else ""
        print(f"server.py: cannot start: {where}{error}", file=sys.stderr)
        return 1
    if settings.host not in ("127.0.0.1", "localhost", "::1"):
        log.warning("listening on %s: everyone who reaches this address may use it", settings.host)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.ended.set())
    server.start()
    log.info("serving %s on http://%s:%d", model.name, settings.host, server.port)
    log.info("documentation: http://%s:%d%s", settings.host, server.port, PAGE_ROUTE)
    server.ended.wait()
    log.info("stopping")
    if not server.stop():
        log.info("the running step did not end in time: leaving it")
    return server.exit_code


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    logging.shutdown()
    # Everything is stopped and saved here. Python's own way out would take apart what MLX's
    # threads still use, which now and then ends in an abort.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
