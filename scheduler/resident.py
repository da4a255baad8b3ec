"""The weights in the memory of a machine."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import NamedTuple

from models.model_catalog import LoadSpec
from task import Stage


class Sizes:
    """Bytes of load specs in memory.

    Args:
        room_bytes: memory that several models may fill together; 0: unknown, all fit.
        measured: of the load specs that were loaded, by key. Others are estimated.
    """

    def __init__(self, room_bytes: int = 0, measured: Mapping[str, int] | None = None) -> None:
        self.room_bytes = room_bytes or inf
        self._measured = dict(measured or {})
        self._bytes: dict[str, float] = dict(self._measured)

    def now(self, room_bytes: int, measured: Mapping[str, int]) -> "Sizes":
        """These, after further ones were measured."""
        return Sizes(room_bytes, {**self._measured, **measured})

    def of(self, spec: LoadSpec) -> float:
        return self._bytes.setdefault(spec.key, spec.expected_bytes)

    def of_key(self, key: str) -> float:
        """Of a load spec that was loaded, or that of() was asked for."""
        return self._bytes.get(key, 0.0)


class Resident(NamedTuple):
    """The weights in a machine's memory."""

    sizes: Sizes
    keys: tuple[str, ...] = ()
    """Of their load specs, the latest used first."""
    most: int = 1
    """Load specs that the memory holds at a time, if they fit."""

    def after(self, spec: LoadSpec) -> "Resident":
        """What is there when these weights were used: those used last."""
        if self.keys[:1] == (spec.key,):
            return self
        self.sizes.of(spec)
        return self.of((spec.key, *(other for other in self.keys if other != spec.key)))

    def of(self, keys: Sequence[str]) -> "Resident":
        """What stays of these weights, the latest used first: as many as fit together. The first
        one always stays."""
        count, filled = 0, 0.0
        for key in keys[: self.most]:
            filled += self.sizes.of_key(key)
            if count and filled > self.sizes.room_bytes:
                break
            count += 1
        return self._replace(keys=tuple(keys[:count]))

    def loads(self, stages: Iterable[Stage]) -> tuple[list[LoadSpec], "Resident"]:
        """What has to be loaded for these stages, and what is there then."""
        loads, resident = [], self
        for stage in stages:
            if stage.load_spec.key not in resident.keys:
                loads.append(stage.load_spec)
            resident = resident.after(stage.load_spec)
        return loads, resident
