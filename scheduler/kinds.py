"""Kinds of stages: many waiting tasks have the same work."""

import numpy as np

from models.model_catalog import LoadSpec
from scheduler.columns import Floats
from scheduler.estimates import Estimates
from task import Stage
from timing_model import Work


class Kinds:
    """Kinds of stages: those with the same work and the same weights are alike.

    The seconds of all kinds of one timing key are computed together, and again only when that key
    has learned something.
    """

    def __init__(self, estimates: Estimates) -> None:
        self._estimates = estimates
        self._numbers: dict[tuple[Work, str], int] = {}
        self._works: dict[str, list[tuple[int, Work]]] = {}  # by timing key: kind, work
        self._gpu_s: Floats = np.zeros(0)
        self._as_of: dict[str, tuple[int, int]] = {}  # by timing key: what _gpu_s was made of
        self._seconds: tuple[object, Floats, Floats] | None = None
        self._image_encoding: tuple[object, Floats] | None = None
        self.specs: list[LoadSpec] = []
        self.spec_numbers: dict[str, int] = {}
        """Index in `specs`, by key."""
        self.spec = np.zeros(0, np.intp)
        """Of each kind, the index in `specs`."""

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, stage: Stage) -> int:
        """Of the kind of a stage."""
        work, spec = self._estimates.work(stage), stage.load_spec
        number = self._numbers.setdefault((work, spec.key), len(self))
        if number == len(self.spec):
            if spec.key not in self.spec_numbers:
                self.spec_numbers[spec.key] = len(self.specs)
                self.specs.append(spec)
            self._works.setdefault(work.model, []).append((number, work))
            self._gpu_s = np.append(self._gpu_s, 0.0)
            self.spec = np.append(self.spec, self.spec_numbers[spec.key])
            self._seconds = self._image_encoding = None
        return number

    def image_encoding_s(self) -> Floats:
        """Of each kind, seconds of encoding the last image."""
        version = self._estimates.version
        if self._image_encoding is None or self._image_encoding[0] != version:
            seconds = [self._estimates.image_encoding_s(work) for work, _ in self._numbers]
            self._image_encoding = version, np.array(seconds)
        return self._image_encoding[1]

    def seconds(self) -> tuple[Floats, Floats]:
        """Of each kind, seconds of the GPU and of loading its weights."""
        version = self._estimates.version
        if self._seconds is None or self._seconds[0] != version:
            for key, works in self._works.items():
                as_of = (self._estimates.version_of(key), len(works))
                if self._as_of.get(key) != as_of:
                    numbers = [number for number, _ in works]
                    self._gpu_s[numbers] = self._estimates.gpu_s([work for _, work in works])
                    self._as_of[key] = as_of
            load_s = np.array([self._estimates.load_s(spec) for spec in self.specs])
            own_load_s = load_s[self.spec] if len(self) else np.zeros(0)
            self._seconds = version, self._gpu_s, own_load_s
        return self._seconds[1:]
