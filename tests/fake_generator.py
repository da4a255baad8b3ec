"""A generator without mflux."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from errors import ServerError
from models.model_catalog import LoadSpec, LoraFit
from task import Drawn, GenerationParams, Memory, Report, Stage


class FakeGenerator:
    """A generator that calls a function of the test instead of mflux."""

    def __init__(
        self, draw: Callable[[GenerationParams, Report], Image.Image] | None = None
    ) -> None:
        self.draw = draw or (lambda params, report: Image.new("RGB", (16, 16)))
        self.memory = Memory()

        self.resident: tuple[str, ...] = ()

    def load(self, weights: LoadSpec, report: object = None) -> int | None:
        self.resident = (weights.key,)
        return None

    def save_copies(self, may_continue: Callable[[], bool]) -> bool:
        return False

    def apply_adapters(self, weights: LoadSpec) -> None:
        assert weights.key in self.resident

    def unload(self) -> None:
        self.resident = ()

    def generate(self, stage: Stage, inputs: Path, report: Report) -> Drawn:
        return Drawn(self.draw(stage.params, report))

    def prepare(self, stage: Stage, inputs: Path, report: Report) -> str | Image.Image:
        raise NotImplementedError

    def refusal(self, stage: Stage, *, memory: bool = True) -> ServerError | None:
        return None

    def check_adapters(self, weights: LoadSpec) -> tuple[str, ...]:
        return ()

    def fit_of_adapter(self, path: Path, weights: LoadSpec) -> LoraFit:
        return LoraFit(1, 1)
