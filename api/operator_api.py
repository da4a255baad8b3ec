"""The routes of the operator: pausing and clearing the queue, moving tasks, the clients."""

from flask import Response, request

import errors
from api.answers import json_response
from api.api_docs import documented, in_path, json_answer, query
from api.audit import audit
from api.client_queue import OwnQueue
from api.identity import Identity, check_operator
from api.operator_answers import (
    ClearedAnswer,
    ClientAnswer,
    ClientsAnswer,
    PausedAnswer,
    PlaceAnswer,
    place_answer,
)
from api.query_values import number_value, text_value
from api.routes import route
from api.waiting_places import WaitingPlaces
from monitoring.accounts import Account
from queue_manager import QueueManager

CHANGE_ERRORS = (errors.OperatorOnly, errors.TooManyWaiting, errors.StorageUnavailable)
TASK_ID_IN_PATH = in_path("task_id", "The id that /generate gave.", 64)


class OperatorRoutes:
    def __init__(
        self, queue: QueueManager, own_queue: OwnQueue, identity: Identity, places: WaitingPlaces
    ) -> None:
        self._queue = queue
        self._own_queue = own_queue
        self._identity = identity
        self._places = places

    @route("POST", "/queue/pause")
    @documented(
        "Pause the queue",
        tag="operator",
        description="No task is started until it is resumed, also after a restart of the server. "
        "The running task ends as always. Tasks are accepted and wait.",
        answers={200: json_answer(PausedAnswer, "The queue is paused.")},
        errors=CHANGE_ERRORS,
    )
    def pause(self) -> Response:
        return self._pause(True)

    @route("POST", "/queue/resume")
    @documented(
        "Resume the queue",
        tag="operator",
        answers={200: json_answer(PausedAnswer, "The queue goes on.")},
        errors=CHANGE_ERRORS,
    )
    def resume(self) -> Response:
        return self._pause(False)

    @route("DELETE", "/queue")
    @documented(
        "Cancel all waiting tasks",
        tag="operator",
        description="Running tasks go on.",
        parameters=[
            query("client", "Only tasks of the client of this name.", {"type": "string"}),
        ],
        answers={200: json_answer(ClearedAnswer, "They are cancelled.")},
        errors=(errors.InvalidInput, *CHANGE_ERRORS),
    )
    def clear(self) -> Response:
        check_operator()
        name = text_value("client") if "client" in request.args else None
        with self._places.place_for_change():
            cancelled = self._queue.control.clear(name)
        whose = "" if name is None else f" of {name[:100]!r}"
        audit(f"cancelled the waiting tasks{whose}: {cancelled}")
        return json_response(ClearedAnswer(cancelled=cancelled))

    @route("POST", "/tasks/<task_id>/front")
    @documented(
        "Move a task to the front",
        tag="operator",
        description="It runs next, before urgent tasks, too; of several, the one that was moved "
        "last. Its place survives a restart.",
        parameters=[TASK_ID_IN_PATH],
        answers={200: json_answer(PlaceAnswer, "It is next.")},
        errors=(errors.UnknownTask, errors.WrongStatus, errors.Gone, *CHANGE_ERRORS),
    )
    def move_to_front(self, task_id: str) -> Response:
        check_operator()
        with self._places.place_for_change():
            self._queue.control.move_to_front(task_id)
        audit(f"moved task {task_id} to the front")
        return json_response(place_answer(self._queue.status(task_id)))

    @route("POST", "/tasks/<task_id>/retry")
    @documented(
        "Try a failed task again",
        tag="queue",
        description="For the client of the task and for operators. It keeps its id and its stored "
        "images, and waits as if it were submitted now, without `max_age_s`. A task with input "
        "images cannot be tried again, because they were removed when it failed.",
        parameters=[TASK_ID_IN_PATH],
        answers={200: json_answer(PlaceAnswer, "It waits.")},
        errors=(
            errors.UnknownTask,
            errors.WrongStatus,
            errors.Gone,
            errors.ModelNotAllowed,
            errors.NotSupported,
            errors.QueueFull,
            errors.ClientLimit,
            errors.TooManyWaiting,
            errors.StorageUnavailable,
            errors.NoWorker,
        ),
    )
    def retry(self, task_id: str) -> Response:
        with self._places.place_for_change():
            return json_response(place_answer(self._own_queue().retry(task_id)))

    @route("GET", "/clients")
    @documented(
        "List the clients",
        tag="operator",
        parameters=[
            query(
                "limit",
                "Most clients in the answer.",
                {"type": "integer", "default": 100, "minimum": 1, "maximum": 10_000},
            )
        ],
        answers={200: json_answer(ClientsAnswer, "The clients.")},
        errors=(errors.InvalidInput, errors.OperatorOnly, errors.StorageUnavailable),
    )
    def clients(self) -> Response:
        check_operator()
        limit = number_value("limit", 100, 1, 10_000)
        accounts = self._queue.accounts()
        weights = {known.name: known.weight for known in self._identity.known_clients}
        today_s = sum(account.today_s for account in accounts.values())
        clients = []
        for name in {*accounts, *weights}:
            account = accounts.get(name, Account(name))
            clients.append(
                ClientAnswer(
                    name=name,
                    has_key=name in weights,
                    waiting=account.waiting,
                    running=account.running,
                    gpu_seconds_today=account.today_s,
                    gpu_seconds=account.gpu_s,
                    weight=weights.get(name, 1.0),
                    share_today=account.today_s / today_s if today_s > 0 else 0.0,
                    last_seen_at=self._identity.requests.last_seen_at(name),
                )
            )
        clients.sort(key=lambda client: (-client.gpu_seconds_today, client.name))
        return json_response(ClientsAnswer(length=len(clients), clients=clients[:limit]))

    def _pause(self, paused: bool) -> Response:
        check_operator()
        with self._places.place_for_change():
            self._queue.control.pause(paused)
        audit("paused the queue" if paused else "resumed the queue")
        health = self._queue.health()
        return json_response(
            PausedAnswer(paused=health.paused, waiting=health.waiting, running=health.running)
        )
