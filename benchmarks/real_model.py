"""Writes a checkpoint at full size with random weights: Anima (2 billion parameters, Qwen3-0.6B and
the Qwen VAE, 5.6 GB in bfloat16, 3.1 GB at 4 bits) or FLUX.2 klein 4B (4 billion parameters and
Qwen3-4B, 4.6 GB at 4 bits).

The modules and the saver are mflux's own, so the folder is one that `mflux-save` could have
written. Its pictures are noise. The tokenizers know single bytes only: nothing is downloaded. One
component is in memory at a time.

    python benchmarks/real_model.py FOLDER [--model flux2-klein-4b] [--bits 4] [--small]
"""

import argparse
import importlib
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import common  # noqa: F401  # finds the modules of the server

from models.mlx_setup import give_back_memory, prepare_mlx
from models.tiny_models import TINY_CONFIGS
from models.tiny_modules import TEMPLATE, built_small
from models.tiny_recipes import add_flux2_vae, add_qwen_vae
from models.tiny_weights import (
    QWEN_VOCABULARY,
    T5_VOCABULARY,
    Weights,
    byte_pairs,
    component,
    unigrams,
    write_tokenizer,
)

MODEL = "anima-turbo"
SEED = 16


class Recipe(NamedTuple):
    """How mflux builds the modules of a model."""

    initializer: str
    """Module and name of the class that builds them."""
    definition: str
    """Module and name of the class that says how they are saved and quantized."""
    tiny: str
    """The tiny model of the same class."""
    add_vae: Callable[[Weights], None]
    """Writes a VAE of a few channels."""
    t5: bool = False
    """Whether it has a second tokenizer, like T5's."""
    small_modules: bool = False
    """Whether built_small() makes its modules small; else the configuration of the tiny model."""


RECIPES: Mapping[str, Recipe] = {
    MODEL: Recipe(
        "mflux.models.anima.anima_initializer:AnimaInitializer",
        "mflux.models.anima.weights.anima_weight_definition:AnimaWeightDefinition",
        "noise-anima",
        add_qwen_vae,
        t5=True,
        small_modules=True,
    ),
    "flux2-klein-4b": Recipe(
        "mflux.models.flux2.flux2_initializer:Flux2Initializer",
        "mflux.models.flux2.weights.flux2_weight_definition:Flux2KleinWeightDefinition",
        "noise-flux2",
        add_flux2_vae,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=RECIPES, default=MODEL)
    parser.add_argument("--bits", type=int, choices=(4, 5, 6, 8), help="default: bfloat16")
    parser.add_argument("--float32", action="store_true", help="not rounded: twice the size")
    parser.add_argument("--small", action="store_true", help="a few layers, for a smoke run")
    options = parser.parse_args()
    write_model(
        options.folder,
        options.bits,
        name=options.model,
        float32=options.float32,
        small=options.small,
    )


def write_model(
    folder: Path,
    bits: int | None = None,
    *,
    name: str = MODEL,
    float32: bool = False,
    small: bool = False,
) -> Path:
    """Write a checkpoint, unless the folder exists; returns the folder.

    Args:
        folder: it is renamed when it is complete.
        bits: of the quantized layers; None: bfloat16.
        name: one of RECIPES.
        float32: whether parameters stay in 32 bits. A CPU computes these many times faster: MLX
            has a fast BLAS for them alone.
        small: whether a few narrow layers are enough.
    """
    if folder.is_dir():
        return folder
    prepare_mlx()
    recipe = RECIPES[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        draft = Path(scratch, folder.name)
        modules: AbstractContextManager[None] = (
            built_small(recipe.tiny) if small and recipe.small_modules else nullcontext()
        )
        with modules:
            components = _components(name, recipe, small=small)
            if small:  # a few channels: the parameters of the module have their full number
                del components["vae"]
                with component(draft / "vae", seed=SEED, biases=True) as weights:
                    recipe.add_vae(weights)
            definition = _named(recipe.definition)
            while components:
                part, module = components.popitem()
                _prepare(part, module, definition, bits, float32)
                _save(draft, part, module, definition, bits)
                del module
                give_back_memory()
        (draft / "tokenizer").mkdir()
        config = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": TEMPLATE}
        write_tokenizer(draft / "tokenizer", byte_pairs(QWEN_VOCABULARY), config)
        if recipe.t5:
            (draft / "tokenizer_2").mkdir()
            write_tokenizer(draft / "tokenizer_2", unigrams(T5_VOCABULARY), {"extra_ids": 0})
        draft.rename(folder)
    return folder


def _components(name: str, recipe: Recipe, *, small: bool) -> dict[str, Any]:
    """Returns mflux's modules by the name of their folder, their parameters random and lazy."""
    import mlx.core as mx
    from mflux.models.common.config.model_config import AVAILABLE_MODELS, ModelConfig

    mx.random.seed(SEED)
    config = ModelConfig(**TINY_CONFIGS[recipe.tiny]) if small else AVAILABLE_MODELS[name]
    model = SimpleNamespace(model_config=config, small_text_encoder=False)
    _named(recipe.initializer)._init_models(model)
    return {part: getattr(model, part) for part in ("vae", "transformer", "text_encoder")}


def _prepare(name: str, module: Any, definition: Any, bits: int | None, float32: bool) -> None:
    """Round or quantize the parameters of a component, and draw them, one after the other."""
    import mlx.core as mx
    from mflux.models.common.config.model_config import ModelConfig
    from mlx import nn
    from mlx.utils import tree_flatten

    precision = mx.float32 if float32 else ModelConfig.precision
    for layer in module.modules():
        for parameter, value in layer.items():
            if isinstance(value, mx.array):
                layer[parameter] = value.astype(precision)
    parts = {one.name: one for one in definition.get_components()}
    if bits is not None and not parts[name].skip_quantization:
        nn.quantize(module, class_predicate=definition.quantization_predicate, bits=bits)
    for _, array in tree_flatten(module):
        mx.eval(array)


def _save(folder: Path, name: str, module: Any, definition: Any, bits: int | None) -> None:
    """Save one component with mflux's saver."""
    from mflux.models.common.weights.saving.model_saver import ModelSaver

    ModelSaver.save_model(SimpleNamespace(**{name: module}), bits, str(folder), definition)


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    main()
