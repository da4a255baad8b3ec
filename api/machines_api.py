"""The routes of the operator about the machines that draw."""

from flask import Response

import errors
from api.answers import json_response
from api.api_docs import documented, in_path, json_answer
from api.audit import audit
from api.identity import check_operator
from api.machine_answers import MachineAnswer, MachinesAnswer, machine_answer
from api.routes import route
from api.waiting_places import WaitingPlaces
from queue_manager import QueueManager

NAME_IN_PATH = in_path("name", "Name of the machine.")
ERRORS = (errors.OperatorOnly, errors.UnknownMachine, errors.StorageUnavailable)


class MachineRoutes:
    def __init__(self, queue: QueueManager, places: WaitingPlaces) -> None:
        self._queue = queue
        self._places = places

    @route("GET", "/machines")
    @documented(
        "List the machines",
        tag="operator",
        description="The server's own, and those of workers that have registered "
        "(docs/cluster.md).",
        answers={200: json_answer(MachinesAnswer, "The machines.")},
        errors=(errors.OperatorOnly,),
    )
    def machines(self) -> Response:
        check_operator()
        machines = [machine_answer(machine) for machine in self._queue.machines()]
        away_since = self._queue.health().broker_away_since
        return json_response(MachinesAnswer(machines=machines, broker_away_since=away_since))

    @route("POST", "/machines/<name>/drain")
    @documented(
        "Drain a machine: it gets no more tasks",
        tag="operator",
        description="What it draws goes on. Survives a restart of the server and of its worker.",
        parameters=[NAME_IN_PATH],
        answers={200: json_answer(MachineAnswer, "It gets no more tasks.")},
        errors=(*ERRORS, errors.TooManyWaiting),
    )
    def drain(self, name: str) -> Response:
        return self._drain(name, True)

    @route("POST", "/machines/<name>/resume")
    @documented(
        "Resume a machine: it gets tasks again",
        tag="operator",
        parameters=[NAME_IN_PATH],
        answers={200: json_answer(MachineAnswer, "It gets tasks.")},
        errors=(*ERRORS, errors.TooManyWaiting),
    )
    def resume(self, name: str) -> Response:
        return self._drain(name, False)

    def _drain(self, name: str, drained: bool) -> Response:
        check_operator()
        with self._places.place_for_change():
            self._queue.control.drain(name, drained)
        machine = next(one for one in self._queue.machines() if one.name == name)
        audit(f"{'drained' if drained else 'resumed'} the machine {name[:100]!r}")
        return json_response(machine_answer(machine))
