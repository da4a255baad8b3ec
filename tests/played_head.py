"""A head in this process whose workers are messages, under a clock that the test moves."""

from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

from conftest import GIVE_UP_S, PlayedQueue, allow, params_for, until

from cluster.carrier import Carrier, CarrierUnavailable, new_key
from cluster.dispatcher import Dispatcher
from cluster.inbox import Inbox
from cluster.messages import PROTOCOL
from cluster.registry import Registry
from scheduler.limits import QueueLimits
from scheduler.scheduler import Scheduler
from storage.task_store import TaskStore
from timing.speeds import Product
from timing_model import TimingModel

LEASE_S = 20.0
NO_SPEC: dict[str, Any] = {"quantize": None, "loras": [], "control_strength": None}


class PlayedHead:
    """Args:
    scheduler: of an application that has one; None: one that does not draw itself.
    """

    def __init__(
        self, folder: Path, *models: str, scheduler: Scheduler | None = None, **limits: Any
    ) -> None:
        self.at = 1000.0
        if scheduler is None:
            self.queue = PlayedQueue(
                allow(*(models or ("noise-flux1",))),
                TimingModel({Product.BF16: 1e10}),
                TaskStore(folder),
                QueueLimits(**{"local_worker": False, "max_delay_s": 0.0, **limits}),
                monotonic=self.clock,
                now=self.clock,
            )
            scheduler = self.queue.scheduler
        self.scheduler = scheduler
        self.carrier = create_autospec(Carrier, instance=True)
        self.carrier.put.side_effect = self._put
        self.blobs: dict[str, bytes] = {}
        self.carrier.get.side_effect = self.blobs.get
        self.carrier.drop.side_effect = self._drop
        self.registry = Registry(scheduler, LEASE_S)
        self.inbox = Inbox(scheduler, self.registry, self.carrier, lambda task_id, jpeg: None)
        self.dispatcher = Dispatcher(scheduler, self.registry, self.carrier)
        self._sessions: dict[str, str] = {}
        self._seen = 0

    def clock(self) -> float:
        return self.at

    def close(self) -> None:
        self.inbox.stop(GIVE_UP_S)
        self.scheduler.store.close()

    # -- workers ----------------------------------------------------------------------------------

    def say(self, name: str, kind: str, **content: Any) -> None:
        """A message of a worker arrives."""
        session = self._sessions.setdefault(name, new_key())
        worker = name.encode().hex().ljust(32, "0")
        self.inbox.handle({"kind": kind, "worker": worker, "session": session, **content})

    def beat(self, name: str, *held: tuple[str, int], **content: Any) -> None:
        """A heartbeat; `held`: its tasks, with their attempts."""
        models = [{"name": model.name} for model in self.scheduler.allowed.models]
        about = {
            "name": name, "hardware": "x", "system": "x", "memory_bytes": 0,
            "speeds": dict.fromkeys(Product, 1e12), "versions": {}, "models": models,
            "bits": [None], "loras": [], "lora_repos": False, "models_in_memory": 1,
        }  # fmt: skip
        tasks = [{"task_id": task_id, "attempt": attempt} for task_id, attempt in held]
        content = {"resident": [self.scheduler.allowed.first_spec.key], "held": tasks, **content}
        self.say(name, "heartbeat", protocol=PROTOCOL, registration=about, **content)

    def restarted(self, name: str) -> None:
        """Its process is another one from now on."""
        del self._sessions[name]

    def report(self, name: str, task_id: str, steps: int, attempt: int = 1, **content: Any) -> None:
        usual = {"phase": "denoising", "steps_total": 4, "stage": 0, "image": 0}
        content = {**usual, "steps_done": steps, **content}
        self.say(name, "report", task_id=task_id, attempt=attempt, **content)

    def image(self, name: str, task_id: str, content: bytes, attempt: int = 1) -> dict[str, Any]:
        """An image of a task comes; returns the answer."""
        request, key = new_key(), self._put(content)
        what = {"task_id": task_id, "attempt": attempt, "index": 0, "measured": []}
        self.say(name, "image", request=request, image=key, **what)
        found: list[dict[str, Any]] = []

        def is_answered() -> bool:
            found.extend(m for _, m in self.all_sent() if m.get("request") == request)
            return bool(found)

        until(is_answered)
        return found[0]

    # -- the head ---------------------------------------------------------------------------------

    def submit(self, prompt: str = "a lighthouse", priority: int = 0, **fields: Any) -> str:
        params = params_for(prompt, steps=4, **fields)
        return self.queue.submit(params, priority=priority)[0].task_id

    def step(self, seconds: float = 0.0, *beating: str) -> list[tuple[str, dict[str, Any]]]:
        """So many seconds pass, in which these workers beat and hold what they had; the dispatcher
        works. Returns what was sent: name of the worker and message."""
        self.at += seconds
        for name in beating:
            remote = self.registry.named(name)
            held = [*remote.held.items()] if remote else []
            self.beat(name, *held)
        self.dispatcher.step(0.0)
        self.dispatcher.step(0.0)
        sent = self.all_sent()[self._seen :]
        self._seen += len(sent)
        return [one for one in sent if one[1]["kind"] != "heard"]

    def all_sent(self) -> list[tuple[str, dict[str, Any]]]:
        calls = [call.args for call in self.carrier.send.call_args_list]
        return [(bytes.fromhex(to).rstrip(b"\0").decode(), message) for to, message in calls]

    def offers(self, *more: Any) -> list[tuple[str, str]]:
        """What was offered since step() was called last: name of the worker and task."""
        return [(to, m["task_id"]) for to, m in self.step(*more) if m["kind"] == "offer"]

    def broker_leaves(self) -> None:
        gone = CarrierUnavailable("nobody is there")
        self.carrier.announce.side_effect = self.carrier.send.side_effect = gone

    def broker_returns(self) -> None:
        self.carrier.announce.side_effect = self.carrier.send.side_effect = None

    def _put(self, content: bytes, key: str | None = None) -> str:
        key = key or new_key()
        self.blobs[key] = content
        return key

    def _drop(self, *keys: str) -> None:
        for key in keys:
            self.blobs.pop(key, None)


def drawing(head: PlayedHead, name: str, **fields: Any) -> str:
    """A task that this worker draws, after a step."""
    head.beat(name)
    task_id = head.submit(format="PNG", **fields)
    assert (name, task_id) in head.offers()
    head.beat(name, (task_id, 1))
    head.report(name, task_id, 0)
    head.report(name, task_id, 1)
    return task_id
