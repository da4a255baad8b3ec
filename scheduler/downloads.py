"""Weights that are not on this machine: which are wanted, the running download, and its speed.

Tasks wait for them in pending.py. Not thread-safe: the scheduler calls it under its lock.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import inf

from cachetools import TTLCache

from models.model_catalog import LoadSpec, Model
from task import Task

USUAL_BYTES_PER_S = 20e6
"""Assumed speed before the first measurement."""
PACE_AFTER_S = 5.0
"""Seconds of a download after which its speed is measured."""
FAILURE_KEPT_S = 300.0
"""Seconds for which the error of a download is known."""


@dataclass(frozen=True)
class Download:
    """The running download, at one moment."""

    spec: LoadSpec
    bytes_done: int
    """Bytes on disk so far."""
    began_at: float
    """Monotonic seconds."""
    bytes_before: int
    """Bytes on disk when it began."""


class Downloads:
    """Which weights are on this machine, and the downloads of the others.

    Args:
        monotonic: the clock, in seconds.
        needs_download: whether a model's weights are not on this machine.
        on_disk: the server's own model, which the worker fetches before anything else.
    """

    def __init__(
        self,
        monotonic: Callable[[], float],
        needs_download: Callable[[Model], bool] = lambda model: False,
        on_disk: Model | None = None,
    ) -> None:
        self.current: Download | None = None
        self.done = self.failed = 0
        """Downloads that have ended since the start."""
        self.pace_known = False
        """Whether a download has been measured."""
        self.ordered: dict[str, LoadSpec] = {}
        """By model, weights that are downloaded even if no task waits for them."""
        self._monotonic = monotonic
        self._bytes_per_s = USUAL_BYTES_PER_S
        self._needs_download = needs_download
        self._on_disk = {on_disk.name} if on_disk else set()
        self._failures = TTLCache[str, str](inf, FAILURE_KEPT_S, monotonic)
        """By model, why its download failed lately."""

    def is_on_disk(self, spec: LoadSpec) -> bool:
        """Whether it is known already that these weights need no download."""
        return spec.model.name in self._on_disk

    def is_missing(self, spec: LoadSpec) -> bool:
        """Whether these weights have to be downloaded. It may look at the disk: any thread may ask,
        without a lock."""
        if not self.is_on_disk(spec) and self._needs_download(spec.model):
            return True
        self._on_disk.add(spec.model.name)
        return False

    def missing(self, task: Task) -> tuple[LoadSpec, ...]:
        """The weights of a task that have to be downloaded before it can run. As is_missing()."""
        return tuple(s.load_spec for s in task.stages if self.is_missing(s.load_spec))

    def order(self, spec: LoadSpec) -> None:
        """Download these weights, even if no task waits for them."""
        self.ordered.setdefault(spec.model.name, spec)

    def begin(self, spec: LoadSpec, bytes_before: int) -> None:
        """A download begins, with this many bytes on disk from an earlier one."""
        self.current = Download(spec, bytes_before, self._monotonic(), bytes_before)

    def progress(self, bytes_done: int) -> None:
        """This many bytes of the weights are on disk now."""
        download = self.current
        if download is None:
            return
        self.current = replace(download, bytes_done=bytes_done)
        seconds, came = self._monotonic() - download.began_at, bytes_done - download.bytes_before
        if seconds >= PACE_AFTER_S and came > 0:
            self._bytes_per_s = came / seconds
            self.pace_known = True

    def interrupt(self) -> None:
        """The download has ended without a result: no task needs it, or it will be tried again."""
        self.current = None

    def fail(self, model: Model, message: str) -> None:
        """This model cannot be downloaded."""
        self.failed += 1
        self.current = None
        self.ordered.pop(model.name, None)
        self._failures[model.name] = message

    def failure(self, model: Model) -> str | None:
        """Returns the error of a recent download of this model."""
        return self._failures.get(model.name)

    def finish(self, model: Model) -> None:
        """This model is on disk."""
        self.done += self.current is not None
        self.current = None
        self._on_disk.add(model.name)
        self.ordered.pop(model.name, None)

    def arrivals_s(self, specs: Iterable[LoadSpec]) -> dict[str, float]:
        """By model, seconds until its weights are on disk: one model after the other, the running
        download first, then these in their order."""
        at_s, arrivals = 0.0, {}
        if self.current is not None:
            model = self.current.spec.model
            at_s = max(model.download_bytes - self.current.bytes_done, 0.0) / self._bytes_per_s
            arrivals[model.name] = at_s
        for spec in specs:
            if spec.model.name not in arrivals:
                at_s += spec.model.download_bytes / self._bytes_per_s
                arrivals[spec.model.name] = at_s
        return arrivals
