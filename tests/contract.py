"""mflux's classes without weights: what one of them accepts is found out by calling it.

An object is made by __new__, so that nothing is loaded. Everything that mflux computes before it
needs a weight runs: the checks of generate_image, the schedule, the noise. Then a stand-in for the
weights ends the call.
"""

import importlib
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image

from generation.pipelines import arguments
from models.model_catalog import Model, Pipeline
from task import Stage


class FirstUse(Exception):
    """mflux has come to the first use of a weight."""


class Weights:
    """Stands in for modules and tokenizers: every use of it ends the call.

    Args:
        known: attributes that say how large a module is, and hold no weights.
    """

    def __init__(self, **known: Any) -> None:
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        raise FirstUse

    def _used(self, *_: Any, **__: Any) -> Any:
        raise FirstUse

    __call__ = __getitem__ = __iter__ = __len__ = __contains__ = __fspath__ = _used


SIZES: dict[str, dict[str, Weights]] = {
    "MOSSImage": {"transformer": Weights(layers=range(42))},
    "QwenImage21Edit": {
        # preprocessor_config.json of Qwen3-VL
        "processor": Weights(
            image_processor=mock.Mock(size={"shortest_edge": 256**2, "longest_edge": 4096**2})
        )
    },
    "ZImageTurboControlnet": {"controlnet": Weights(config=mock.Mock(control_in_dim=33))},
}
"""Of modules whose size a class looks at before it computes with them."""


@dataclass(frozen=True)
class Called:
    """What mflux did with a call."""

    refusal: str | None
    """Why it refused, or why what it would draw is ruined; None: it would draw."""
    steps: int | None = None
    """Steps, guidance and size that it would draw with; None where it did not come to that."""
    guidance: float | None = None
    size: tuple[int, int] | None = None


def call(stage: Stage, inputs: Path) -> Called:
    """Call mflux with what a stage becomes.

    Args:
        inputs: folder of the pictures that its params name.
    """
    weights = stage.load_spec
    return call_with(weights.model, weights.pipeline, arguments(stage, inputs))


def call_with(model: Model, pipeline: Pipeline, values: dict[str, Any]) -> Called:
    """Call generate_image of a class with these arguments."""
    from mflux.models.common.config.config import Config

    configs: list[Any] = []
    build = Config.__init__

    def recorded(self: Any, *positional: Any, **named: Any) -> None:
        build(self, *positional, **named)
        configs.append(self)

    refusal = None
    with (
        mock.patch.object(Config, "__init__", recorded),
        mock.patch.object(Image.Image, "resize", _resized_quickly),
    ):
        try:
            bare(model, pipeline).generate_image(**values)
        except FirstUse:
            pass
        except Exception as error:
            refusal = f"{type(error).__name__}: {error}"
    if refusal or not configs:
        return Called(refusal)
    config = configs[-1]
    size = (config.width, config.height)
    return Called(_ruined(config, pipeline), config.num_inference_steps, config.guidance, size)


RESIZE = Image.Image.resize


def _resized_quickly(image: Image.Image, size: tuple[int, int], *_: Any, **__: Any) -> Image.Image:
    """Pixels are not looked at here, and smooth ones take most of the time of a call."""
    return RESIZE(image, size, Image.Resampling.NEAREST)


def bits_refused(model: Model, pipeline: Pipeline, bits: int) -> bool:
    """Whether a class refuses to quantize its weights to so many bits."""
    from mflux.models.common.resolution.path_resolution import PathResolution
    from mflux.models.common.weights.loading.weight_loader import WeightLoader

    ends = mock.Mock(side_effect=FirstUse)
    with (
        mock.patch.object(PathResolution, "resolve", ends),
        mock.patch.object(WeightLoader, "load", ends),
    ):
        try:
            class_of(pipeline)(quantize=bits, model_config=config_of(model))
        except FirstUse:
            return False
        except ValueError:
            return True
    raise AssertionError("it was built without weights")


def config_of(model: Model) -> Any:
    from mflux.models.common.config.model_config import AVAILABLE_MODELS

    return AVAILABLE_MODELS[model.key]


def class_of(pipeline: Pipeline) -> Any:
    return getattr(importlib.import_module(pipeline.module), pipeline.name)


def bare(model: Model, pipeline: Pipeline) -> Any:
    """An object of a class with everything but weights."""
    from mflux.callbacks.callback_registry import CallbackRegistry

    real = class_of(pipeline)
    made: Any = type(real.__name__, (real,), {"__getattr__": lambda self, name: Weights()})
    pipeline_object = made.__new__(made)
    vars(pipeline_object).update(
        {
            "model_config": config_of(model),
            "callbacks": CallbackRegistry(),
            "prompt_cache": {},
            "tokenizers": defaultdict(Weights),
            "bits": None,
            "tiling_config": None,
            "small_decoder": False,
            "small_text_encoder": False,
            "float32": False,
            "lora_paths": None,
            "lora_scales": None,
            "_noise_override": None,
            **SIZES.get(pipeline.name, {}),
        }
    )
    return pipeline_object


def _ruined(config: Any, pipeline: Pipeline) -> str | None:
    """Why a schedule cannot lead to a picture."""
    import numpy as np

    try:
        sigmas = np.array(config.scheduler.sigmas.astype(np_float32()))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not np.isfinite(sigmas).all():
        return "the schedule holds values that are not numbers"
    if _reads_timesteps(pipeline.module.split(".")[2]):
        timesteps = np.array(config.scheduler.timesteps)
        if not np.allclose(timesteps, 1000 * sigmas[: len(timesteps)], rtol=0.01, atol=1):
            return f"the transformer gets the steps {timesteps[:4]} for noise of {sigmas[:4]}"
    return None


def np_float32() -> Any:
    import mlx.core as mx

    return mx.float32


@cache
def _reads_timesteps(family: str) -> bool:
    """Whether the transformer of a family gets the scheduler's timesteps, which must be 1000 times
    its sigmas, and not the sigmas."""
    package = importlib.import_module(f"mflux.models.{family}")
    files = [*Path(package.__path__[0]).rglob("*.py")]
    reads = re.compile(r"config\.scheduler\.timesteps\[")
    return any(
        reads.search(file.read_text(encoding="utf-8"))
        for file in files
        if "training" not in str(file)
    )
