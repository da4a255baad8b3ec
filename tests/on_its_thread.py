"""A generator on one thread of its own, and input images for it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from generator import MfluxGenerator
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec
from task import GenerationParams, InputImage, Stage

Result = TypeVar("Result")
FILES = {name: InputImage(name, 64, 64) for name in ("start", "mask", "control", "first", "second")}


class OnItsThread:
    """A generator on one thread of its own, as MLX wants it."""

    def __init__(self, data_dir: Path, **options: Any) -> None:
        prepare_mlx()
        self._thread = ThreadPoolExecutor(1)
        self.generator = MfluxGenerator(data_dir, **options)
        self.inputs = data_dir

    def run(self, function: Callable[..., Result], *values: Any) -> Result:
        return self._thread.submit(function, *values).result()

    def load(self, weights: LoadSpec) -> int | None:
        return self.run(self.generator.load, weights)

    def draw(self, weights: LoadSpec, asked: GenerationParams) -> Image.Image:
        if weights.key not in self.generator.resident:
            self.load(weights)
        self.run(self.generator.apply_adapters, weights)
        stage = Stage(weights, asked)
        return self.run(self.generator.generate, stage, self.inputs, lambda *_: None).picture

    def pipeline(self, weights: LoadSpec) -> Any:
        return self.generator._loaded[weights.key].pipeline


PROMPTED: dict[str, dict[str, Any]] = {
    "noise-flux1": {},
    "noise-flux2": {},
    "noise-kontext": {"images": (FILES["first"],)},
    "noise-redux": {"images": (FILES["first"], FILES["second"])},
    "noise-controlnet": {"control_image": FILES["first"]},
    "noise-fill": {"init_image": FILES["first"], "mask": FILES["mask"]},
    "noise-z-image": {"guidance": 3.0, "negative_prompt": "red"},
    "noise-qwen": {"guidance": 3.0, "negative_prompt": "red"},
}
