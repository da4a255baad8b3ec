"""Helper models (models/helpers.py) as mflux has them: what a task needs before it is drawn.

One of the files that know mflux and mlx.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from errors import NotSupported
from models.model_catalog import LoadSpec
from task import Stage

SEED = 42
"""Of FIBO-VLM, as in mflux's commands: the same prompt gives the same JSON."""


class Helper:
    """A loaded helper model."""

    def parameters(self) -> Any:
        """Its MLX arrays."""
        return {}

    def run(self, stage: Stage, inputs: Path, going_on: Callable[[], None]) -> str | Image.Image:
        """Returns the prompt or the control image for the stage that draws.

        Args:
            inputs: the folder of the pictures that the stage's params name.
            going_on: called now and then; may raise to end the work.
        """
        raise NotImplementedError


class PromptWriter(Helper):
    """FIBO-VLM: from plain text, and perhaps a picture to edit, to the JSON that FIBO draws."""

    def __init__(self, quantize: int | None, path: str | None) -> None:
        from mflux.models.fibo_vlm.model.fibo_vlm import FiboVLM

        self._vlm = FiboVLM(quantize=quantize, model_path=path)

    def parameters(self) -> Any:
        return self._vlm.decoder.parameters()

    def run(self, stage: Stage, inputs: Path, going_on: Callable[[], None]) -> str:
        decoder = self._vlm.decoder
        self._vlm.decoder = _EachToken(decoder, going_on)
        try:
            return _checked(self._written(stage, inputs))
        except ValueError as error:
            raise NotSupported(
                f"FIBO-VLM could not write a JSON prompt for this {{field}} ({error}). Send other "
                "words, or JSON.",
                field="prompt",
            ) from error
        finally:
            self._vlm.decoder = decoder

    def _written(self, stage: Stage, inputs: Path) -> str:
        params = stage.params
        if not params.images:
            return str(self._vlm.generate(prompt=params.prompt, seed=SEED))
        with Image.open(inputs / f"{params.images[0].file}.png") as opened:
            picture = opened.convert("RGB")
        if params.mask is not None:
            with Image.open(inputs / f"{params.mask.file}.png") as opened:
                mask = opened.convert("L").resize(picture.size)
            picture = Image.composite(Image.new("RGB", picture.size, GREY), picture, mask)
        masked = params.mask is not None
        text = self._vlm.edit(
            image=picture, edit_instruction=params.prompt, use_mask=masked, seed=SEED
        )
        return str(text)


GREY = (128, 128, 128)
"""What FIBO sees where a mask is white."""


class DepthMap(Helper):
    def __init__(self, quantize: int | None, path: str | None) -> None:
        from mflux.models.depth_pro.model.depth_pro import DepthPro

        self._model = DepthPro(quantize=quantize)

    def parameters(self) -> Any:
        return self._model._depth_pro_model.parameters()

    def run(self, stage: Stage, inputs: Path, going_on: Callable[[], None]) -> Image.Image:
        depth: Image.Image = self._model.create_depth_map(_control_path(stage, inputs)).depth_image
        return depth.convert("RGB")


class EdgeMap(Helper):
    def __init__(self, quantize: int | None, path: str | None) -> None:
        from mflux.models.hed import HED

        self._model = HED()

    def run(self, stage: Stage, inputs: Path, going_on: Callable[[], None]) -> Image.Image:
        with Image.open(_control_path(stage, inputs)) as picture:
            edges: Image.Image = self._model.edge_map(picture.convert("RGB"))
        return edges


class PoseMap(Helper):
    def __init__(self, quantize: int | None, path: str | None) -> None:
        from mflux.models.openpose import OpenPoseBody

        self._model = OpenPoseBody()

    def run(self, stage: Stage, inputs: Path, going_on: Callable[[], None]) -> Image.Image:
        with Image.open(_control_path(stage, inputs)) as picture:
            poses: Image.Image = self._model.pose_map(picture.convert("RGB"))
        return poses


CLASSES: dict[str, Callable[[int | None, str | None], Helper]] = {
    "fibo-vlm": PromptWriter,
    "depth-pro": DepthMap,
    "hed": EdgeMap,
    "openpose": PoseMap,
}


def build_helper(weights: LoadSpec) -> Helper:
    """Returns a helper with its weights; downloads what is missing."""
    return CLASSES[weights.model.key](weights.quantize, weights.model.path)


class _EachToken:
    """FIBO-VLM's decoder; calls a function before each token."""

    def __init__(self, decoder: Any, going_on: Callable[[], None]) -> None:
        self._decoder, self._going_on = decoder, going_on

    def __call__(self, *values: Any, **named: Any) -> Any:
        self._going_on()
        return self._decoder(*values, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


def _checked(text: str) -> str:
    """Raises: ValueError: the text is no JSON object."""
    if not isinstance(json.loads(text), dict):
        raise ValueError("its answer is no JSON object")
    return text.strip()


def _control_path(stage: Stage, inputs: Path) -> Path:
    image = stage.params.control_image
    assert image is not None
    return inputs / f"{image.file}.png"
