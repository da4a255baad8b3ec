"""Writes a checkpoint of Anima at full size with random weights: 2 billion parameters, Qwen3-0.6B
and the Qwen VAE, 5.6 GB in bfloat16, 3.1 GB at 4 bits.

The modules and the saver are mflux's own, so the folder is one that `mflux-save` could have
written. Its pictures are noise. The tokenizers know single bytes only: nothing is downloaded.

    python benchmarks/real_model.py FOLDER [--bits 4] [--small]
"""

import argparse
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common  # noqa: F401  # finds the modules of the server

from models.mlx_setup import give_back_memory, prepare_mlx
from models.tiny_modules import TEMPLATE, built_small
from models.tiny_recipes import add_qwen_vae
from models.tiny_weights import (
    QWEN_VOCABULARY,
    T5_VOCABULARY,
    byte_pairs,
    component,
    unigrams,
    write_tokenizer,
)

MODEL = "anima-turbo"
SEED = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, choices=(4, 5, 6, 8), help="default: bfloat16")
    parser.add_argument("--float32", action="store_true", help="not rounded: 11.3 GB")
    parser.add_argument("--small", action="store_true", help="a few layers, for a smoke run")
    options = parser.parse_args()
    write_anima(options.folder, options.bits, float32=options.float32, small=options.small)


def write_anima(
    folder: Path, bits: int | None = None, *, float32: bool = False, small: bool = False
) -> Path:
    """Write the checkpoint, unless the folder exists; returns the folder.

    Args:
        folder: it is renamed when it is complete.
        bits: of the transformer's quantized layers; None: bfloat16.
        float32: whether parameters stay in 32 bits. A CPU computes these many times faster: MLX
            has a fast BLAS for them alone.
        small: whether a few narrow layers are enough.
    """
    if folder.is_dir():
        return folder
    prepare_mlx()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        draft = Path(scratch, folder.name)
        modules: AbstractContextManager[None] = (
            built_small("noise-anima") if small else nullcontext()
        )
        with modules:
            components = _components()
            if small:  # a few channels: the parameters of the module have their full number
                del components["vae"]
                with component(draft / "vae", seed=SEED, biases=True) as weights:
                    add_qwen_vae(weights)
            while components:
                _save(draft, *components.popitem(), bits, float32)
                give_back_memory()
        for tokenizer in ("tokenizer", "tokenizer_2"):
            (draft / tokenizer).mkdir()
        config = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": TEMPLATE}
        write_tokenizer(draft / "tokenizer", byte_pairs(QWEN_VOCABULARY), config)
        write_tokenizer(draft / "tokenizer_2", unigrams(T5_VOCABULARY), {"extra_ids": 0})
        draft.rename(folder)
    return folder


def _components() -> dict[str, Any]:
    """Returns mflux's modules by the name of their folder, their parameters random and lazy."""
    import mlx.core as mx
    from mflux.models.anima.anima_initializer import AnimaInitializer

    mx.random.seed(SEED)
    model = SimpleNamespace()
    AnimaInitializer._init_models(model)
    return {name: getattr(model, name) for name in ("vae", "transformer", "text_encoder")}


def _save(folder: Path, name: str, module: Any, bits: int | None, float32: bool) -> None:
    """Save one component with mflux's saver, so that one at a time is in memory."""
    import mlx.core as mx
    from mflux.models.anima.weights.anima_weight_definition import AnimaWeightDefinition
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.common.weights.saving.model_saver import ModelSaver
    from mlx import nn

    precision = mx.float32 if float32 else ModelConfig.precision
    for layer in module.modules():
        for parameter, value in layer.items():
            if isinstance(value, mx.array):
                layer[parameter] = value.astype(precision)
                mx.eval(layer[parameter])
    definition = {one.name: one for one in AnimaWeightDefinition.get_components()}[name]
    if bits is not None and not definition.skip_quantization:
        predicate = AnimaWeightDefinition.quantization_predicate
        nn.quantize(module, class_predicate=predicate, bits=bits)
    model = SimpleNamespace(**{name: module})
    ModelSaver.save_model(model, bits, str(folder), AnimaWeightDefinition)


if __name__ == "__main__":
    main()
