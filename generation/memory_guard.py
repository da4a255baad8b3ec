"""Decides whether a picture fits into memory, and whether it is decoded in tiles.

The figures are those of generation/picture_memory.py. Where a measured picture differs from them by
more than BAND, the model's figure is replaced by what was measured, for all sizes in proportion.
Within the band nothing changes: a request gets the same answer before and after other pictures.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from errors import StorageUnavailable
from generation.memory_advice import SMALLER_MODEL, ask_for_less, fewer_bits, in_words
from generation.picture_memory import (
    RELEASED,
    TEXT_TOKENS,
    TILES,
    PictureMemory,
    can_tile,
    encoding_of_pictures,
    largest_side,
    picture_memory,
    size,
    tokens_of_text,
)
from generation.process_memory import PROCESS_BYTES, available_bytes, machine_bytes, used_bytes
from models.model_catalog import LoadSpec
from task import Stage

log = logging.getLogger(__name__)

MARGIN = 1.1
"""Of the picture's estimate."""
BAND = 1.25
"""Measured pictures that differ from the estimate by less than this factor teach nothing."""
LEAST_LEARNED = 300_000_000
"""Bytes: smaller ones say little about larger ones."""
LEAST = {"width": 64, "height": 64, "prompt": "", "negative_prompt": None, "images": ()}
"""What a request asks for at the least."""
Tiling = int | None
"""Side of the decoder's tiles in pixels; None: the whole picture."""


class LearnedMemory(Protocol):
    """storage/state_store.py."""

    def memory(self) -> dict[str, float]: ...
    def keep_memory(self, name: str, value: float) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How a picture is to be drawn."""

    tile: Tiling = None
    picture_bytes: float = 0.0
    """That it takes beside the weights."""
    refusal: str | None = None
    """Why it does not fit, with the figure."""
    field: str = "width"
    """That is at fault then."""


class MemoryGuard:
    """Args:
    limit_bytes: that the whole process may use; None: what the machine has for it.
    gpu: whether MLX has a GPU.
    on: whether pictures are refused.
    tiling: "auto": in tiles if the picture does not fit otherwise; "off": never; a number: always,
    the side of the
        tiles in pixels.
    bits: that tasks may ask for (quantize).
    """

    def __init__(
        self,
        limit_bytes: int | None = None,
        gpu: bool = False,
        *,
        on: bool = True,
        tiling: str | int = "auto",
        bits: Collection[int] = (),
    ) -> None:
        self.limit_bytes = limit_bytes or machine_bytes(gpu)
        self._limited = " (--memory-limit)" if limit_bytes else ""
        self.on = on
        self.count_tokens: Callable[[str, str], int | None] = lambda model, text: None
        """Tokens of a text, by name of the model; None: its tokenizer was not loaded."""
        self._gpu = gpu
        self._tiling = tiling
        self.bits = bits
        self._learned: dict[str, float] = {}
        """Bytes of the weights of load specs, and by model and phase: measured / figure."""
        self._store: LearnedMemory | None = None

    def restore(self, store: LearnedMemory) -> None:
        """Start with what was learned before, and keep there what is learned."""
        self._store = store
        self._learned.update(store.memory())

    def plan(self, stage: Stage) -> Plan:
        """How a picture is drawn if no other model is in memory. Any thread may call."""
        weights = self.weights_bytes(stage.load_spec)
        room = self.limit_bytes - PROCESS_BYTES - weights
        plan = self._plan(stage, room)
        if not self.on or plan.picture_bytes <= room:
            return plan
        needed = (plan.picture_bytes + weights + PROCESS_BYTES) / 1e9
        reason = (
            f"needs about {needed:.1f} GB of memory "
            f"({weights / 1e9:.1f} GB for the weights of {stage.load_spec.model.name}), this "
            f"machine has {self.limit_bytes / 1e9:.1f} GB for it{self._limited}: "
            f"{in_words(self._ways(stage, plan, room))}."
        )
        return self._refused(stage, plan, reason)

    def plan_now(self, stage: Stage, give_back: Iterator[bool], missing_bytes: float = 0.0) -> Plan:
        """How a picture is drawn now, with its weights in memory.

        Args:
            give_back: gives some memory back at each step.
            missing_bytes: of its weights, that mflux has released until the next text.
        """
        plan = self.plan(stage)
        if not self.on or plan.refusal:
            return plan
        room = self._free_bytes() - missing_bytes
        while plan.picture_bytes > room and next(give_back, False):
            room = self._free_bytes() - missing_bytes
        if plan.picture_bytes <= room:
            return plan
        smaller = self._plan(stage, room)
        if smaller.picture_bytes <= room:
            return smaller
        ways = self._ways(stage, smaller, room)
        who = f" of the {self.limit_bytes / 1e9:.1f} GB that the server may use{self._limited}: "
        if self._free_bytes() < self.limit_bytes - used_bytes():
            who, ways = ": other programs use the rest. ", ["End some of them", *ways]
        reason = (
            f"needs about {smaller.picture_bytes / 1e9:.1f} GB of memory beside the weights, and "
            f"{max(room, 0) / 1e9:.1f} GB are free{who}{in_words(ways)}."
        )
        return self._refused(stage, smaller, reason)

    def load_refusal(self, spec: LoadSpec, new_bytes: int, loaded_bytes: int) -> str | None:
        """Why weights do not fit even if all others are dropped for them; None: they fit.

        Args:
            new_bytes: that they take.
            loaded_bytes: of the weights in memory.
        """
        room, available = float(self.limit_bytes), available_bytes()
        reason = f"this machine has {room / 1e9:.1f} GB for it{self._limited}: "
        ways = ["raise --memory-limit"] if self._limited else []
        if loaded_bytes and available is not None and available + loaded_bytes < room:
            room = max(available + loaded_bytes, 0.0)  # at the start the operator decides
            reason = f"{room / 1e9:.1f} GB can be had: other programs use the rest. "
            ways = ["End some of them"]
        if not self.on or new_bytes <= room:
            return None
        fewer = fewer_bits(spec, self.bits, lambda less: self.weights_bytes(less) <= room)
        ways += fewer or [SMALLER_MODEL]
        size = f"The weights of {spec.model.name} take {new_bytes / 1e9:.1f} GB of memory"
        return f"{size}, and {reason}{in_words(ways)}."

    def weights_bytes(self, spec: LoadSpec) -> float:
        """Of what was loaded once, measured; else expected."""
        return self._learned.get(_weights(spec), spec.expected_bytes)

    def learn_weights(self, spec: LoadSpec, weights_bytes: int) -> None:
        """The weights take this much in memory. Who loads them keeps it."""
        self._learned[_weights(spec)] = weights_bytes

    def learn(self, stage: Stage, tile: Tiling, measured: PictureMemory) -> None:
        """A picture has taken this much beside the weights."""
        released = self._released(stage.load_spec)
        figures = self._figures(stage, tile)
        phases = zip(_phases(stage, tile), measured, figures, released, strict=True)
        for phase, taken, figure, less in phases:
            estimate = figure * self._learned.get(phase, 1.0)
            if figure and taken > LEAST_LEARNED and not 1 / BAND < (taken + less) / estimate < BAND:
                log.info("%s takes %.2f of the estimated memory", phase, (taken + less) / estimate)
                self._learn(phase, (taken + less) / figure)

    def _plan(self, stage: Stage, room: float) -> Plan:
        """The first choice that fits, else the smallest."""
        plans = [
            Plan(tile, MARGIN * max(self._estimate(stage, tile))) for tile in self._choices(stage)
        ]
        return next((plan for plan in plans if plan.picture_bytes <= room), plans[-1])

    def _choices(self, stage: Stage) -> list[Tiling]:
        """Sides of tiles to try, the first choice first."""
        if self._tiling == "off" or not can_tile(stage):
            return [None]
        if isinstance(self._tiling, int):
            return [self._tiling if largest_side(stage) > self._tiling else None]
        return [None, *(side for side in TILES if largest_side(stage) > side)]

    def _estimate(self, stage: Stage, tile: Tiling) -> PictureMemory:
        """Beside all weights, less those that mflux has released by then."""
        figures, phases = self._figures(stage, tile), _phases(stage, tile)
        taken = (
            f * self._learned.get(phase, 1.0) for f, phase in zip(figures, phases, strict=True)
        )
        released = self._released(stage.load_spec)
        return PictureMemory(*(max(t - less, 0.0) for t, less in zip(taken, released, strict=True)))

    def _figures(self, stage: Stage, tile: Tiling) -> PictureMemory:
        return picture_memory(stage, tile, gpu=self._gpu, text_tokens=self._text_tokens(stage))

    def _text_tokens(self, stage: Stage) -> int:
        model = stage.load_spec.model.name
        return tokens_of_text(stage, lambda text: self.count_tokens(model, text))

    def _released(self, spec: LoadSpec) -> PictureMemory:
        """Bytes of weights that mflux has released before each phase."""
        share = RELEASED if spec.options.low_ram else 0.0
        released = share * self.weights_bytes(spec)
        return PictureMemory(0.0, released, released)

    def _refused(self, stage: Stage, plan: Plan, reason: str) -> Plan:
        """Args: reason: the sentence without its subject, which is what needs the memory."""
        width, height = size(stage)
        made_from = f", made from {len(stage.params.images)} reference images,"
        tiled = f", decoded in tiles of {plan.tile}," if plan.tile else ""
        picture = f"A picture of {width} x {height}"
        field = self._at_fault(stage, plan)
        subject = {
            "prompt": f"The text encoder with a prompt of {self._text_tokens(stage)} tokens",
            "images": picture + made_from,
            "width": picture + tiled,
        }[field]
        return replace(plan, refusal=f"{subject} {reason}", field=field)

    def _ways(self, stage: Stage, plan: Plan, room: float) -> list[str]:
        """What would make a picture fit.

        Args:
            room: bytes that it may take beside its weights.
        """
        spec, field = stage.load_spec, self._at_fault(stage, plan)
        weights = self.weights_bytes(spec)
        fewer = fewer_bits(
            spec,
            self.bits,
            lambda less: self._fits(stage, room + weights - self.weights_bytes(less)),
        )
        least = stage.params.model_copy(update=LEAST)
        if not self._fits(replace(stage, params=least), room):
            return fewer
        return [ask_for_less(stage, field), *fewer]

    def _fits(self, stage: Stage, room: float) -> bool:
        return self._plan(stage, room).picture_bytes <= room

    def _at_fault(self, stage: Stage, plan: Plan) -> str:
        """The field without which a picture would take much less."""
        estimate = self._estimate(stage, plan.tile)
        of_pictures = encoding_of_pictures(stage, plan.tile, self._gpu)
        is_text = self._figures(stage, plan.tile).encoding > of_pictures
        if self._text_tokens(stage) > TEXT_TOKENS and is_text and estimate[0] == max(estimate):
            return "prompt"
        without = stage.params.model_copy(update={"images": ()})
        alone = self._estimate(replace(stage, params=without), plan.tile)
        return "images" if max(alone) < max(estimate) / 2 else "width"

    def _free_bytes(self) -> float:
        """Memory that this process may still take."""
        own = self.limit_bytes - used_bytes()
        available = available_bytes()
        return own if available is None else min(own, available)

    def _learn(self, name: str, value: float) -> None:
        if self._learned.get(name) != value:
            self._learned[name] = value
            if self._store:
                with suppress(StorageUnavailable):  # it is learned again after the next start
                    self._store.keep_memory(name, value)


def _weights(spec: LoadSpec) -> str:
    return f"weights of {spec.key.partition('+')[0]}"  # LoRAs are small, and there are many


def _phases(stage: Stage, tile: Tiling) -> tuple[str, str, str]:
    """Names of what is learned about a picture."""
    name = stage.load_spec.model.name + stage.load_spec.options.suffix
    in_tiles = " in tiles" if tile else ""
    return f"encoding with {name}", f"denoising with {name}", f"decoding with {name}{in_tiles}"
