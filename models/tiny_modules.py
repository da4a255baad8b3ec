"""Tiny checkpoints of the families whose modules can be built small.

Their classes take all sizes as arguments, but mflux's initializers give none; and some evaluate the
whole model at once, before slim() could remove a layer. So while such a tiny model is loaded, its
initializer finds subclasses with small sizes under the names of its modules. The checkpoint holds
the parameters that these have.

Depends on mflux and mlx.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.tiny_recipes import add_flux2_vae, add_qwen_vae
from models.tiny_slimming import slim_flux2_vae, slim_qwen_vae
from models.tiny_weights import (
    QWEN_VOCABULARY,
    T5_VOCABULARY,
    VAE_CHANNELS,
    WIDTH,
    Weights,
    byte_pairs,
    component,
    unigrams,
    write_tokenizer,
)

GAIN = 2.0
"""Of all matrices, so that prompts and pictures change what is drawn."""
FEW = 16
"""Width of layers that mflux never quantizes."""
ERNIE_TEXT_WIDTH = 3072
IMAGE_TOKEN = {"<|image_pad|>": 151655}
"""Stands for a part of a picture; its number is in mflux's code."""
MROPE = [12, 10, 10]
"""Pairs of WIDTH that a text encoder turns by time, row and column."""
TEMPLATE = "{% for message in messages %}> {{ message.content }}{% endfor %}"
"""Makes tokens even of an empty prompt."""


@dataclass(frozen=True)
class Part:
    """A module of a model."""

    name: str
    """Its class, as the initializer knows it."""
    folder: str
    """Its folder in the checkpoint."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the constructor."""
    change: Callable[[Any], None] = lambda module: None
    """Called with the module after it was built."""
    add: Callable[[Weights], None] | None = None
    """Writes its weights, if random parameters would not do."""


@dataclass(frozen=True)
class Family:
    initializer: str
    """The module of mflux that builds the parts."""
    parts: tuple[Part, ...]
    seed: int
    tokenizers: tuple[str, ...] = ("tokenizer",)
    """Folders of tokenizers of single bytes."""
    t5_tokenizers: tuple[str, ...] = ()
    image_processor: str = ""
    """Folder of the settings of a processor of pictures; empty: it has none."""


def _few_t5_tokens(transformer: Any) -> None:
    adapter = type(transformer.llm_adapter)
    transformer.llm_adapter = adapter(
        vocab_size=len(T5_VOCABULARY), dim=WIDTH, num_layers=1, num_heads=1, mlp_ratio=1
    )


def _few_tokens(text_encoder: Any) -> None:
    """mflux has the numbers of some tokens in its code: of a picture, and of an empty prompt."""
    embedding = type(text_encoder.embed_tokens)

    class Wrapped(embedding):  # type: ignore[misc, valid-type]
        def __call__(self, ids: Any) -> Any:
            return super().__call__(ids % len(QWEN_VOCABULARY))

    text_encoder.embed_tokens = Wrapped(*text_encoder.embed_tokens.weight.shape)


def _as_wide_as_ernie(text_encoder: Any) -> None:
    """mflux pads the shorter of two prompts with vectors of this width."""
    import mlx.core as mx

    class Widened(type(text_encoder)):  # type: ignore[misc]
        def __call__(self, *values: Any) -> Any:
            hidden = super().__call__(*values)
            return mx.pad(hidden, [(0, 0), (0, 0), (0, ERNIE_TEXT_WIDTH - hidden.shape[-1])])

    text_encoder.__class__ = Widened


_QWEN_VAE = Part("QwenVAE", "vae", change=slim_qwen_vae, add=add_qwen_vae)
_FLUX2_VAE = Part("Flux2VAE", "vae", change=slim_flux2_vae, add=add_flux2_vae)


def _qwen3(width: int, layers: int) -> dict[str, Any]:
    """Arguments of text encoders like Qwen3."""
    return {
        "vocab_size": len(QWEN_VOCABULARY),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": width,
        "head_dim": width,
    }


FAMILIES: Mapping[str, Family] = {
    "noise-krea2": Family(
        "mflux.models.krea2.krea2_initializer",
        (
            _QWEN_VAE,
            Part(
                "Krea2Transformer",
                "transformer",
                {
                    "features": WIDTH,
                    "tdim": WIDTH,
                    "txtdim": FEW,
                    "heads": 1,
                    "kvheads": 1,
                    "multiplier": 1,
                    "layers": 1,
                    "txtheads": 1,
                    "txtkvheads": 1,
                },
            ),
            # It reads the hidden states of twelve layers; the last is the 35th.
            Part("Krea2TextEncoder", "text_encoder", _qwen3(FEW, 35)),
        ),
        seed=100,
    ),
    "noise-anima": Family(
        "mflux.models.anima.anima_initializer",
        (
            _QWEN_VAE,
            Part(
                "AnimaTransformer",
                "transformer",
                {
                    "dim": WIDTH,
                    "num_blocks": 1,
                    "num_heads": 1,
                    "mlp_ratio": 1,
                    "context_dim": WIDTH,
                    "adaln_lora_dim": WIDTH,
                },
                change=_few_t5_tokens,
            ),
            Part("Qwen3TextEncoder", "text_encoder", _qwen3(WIDTH, 1), change=_few_tokens),
        ),
        seed=110,
        t5_tokenizers=("tokenizer_2",),
    ),
    "noise-flux3": Family(
        "mflux.models.flux3.flux3_initializer",
        (
            _FLUX2_VAE,
            Part(
                "Flux3Transformer",
                "transformer",
                {
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "attention_head_dim": WIDTH,
                    "num_attention_heads": 1,
                    "joint_attention_dim": 8 * WIDTH,
                    "timestep_channels": WIDTH,
                    "mlp_ratio": 1.0,
                    "axes_dims_rope": (WIDTH // 4,) * 4,
                    "flow_map": False,
                },
            ),
            # It reads every fourth hidden state, up to the 32nd.
            Part("Qwen3TextEncoder", "text_encoder", _qwen3(WIDTH, 32)),
        ),
        seed=120,
        tokenizers=("text_encoder",),
    ),
    "noise-ernie": Family(
        "mflux.models.ernie_image.ernie_image_initializer",
        (
            _FLUX2_VAE,
            Part(
                "ErnieTransformer",
                "transformer",
                {
                    "hidden_size": WIDTH,
                    "num_attention_heads": 1,
                    "num_layers": 1,
                    "ffn_hidden_size": WIDTH,
                    "text_in_dim": ERNIE_TEXT_WIDTH,
                    "rope_axes_dim": [16, 24, 24],
                },
            ),
            Part(
                "ErnieMistralTextEncoder",
                "text_encoder",
                _qwen3(WIDTH, 2),
                change=_as_wide_as_ernie,
            ),
        ),
        seed=130,
    ),
    "noise-qwen21": Family(
        "mflux.models.qwen21.qwen21_initializer",
        (
            Part(
                "Qwen21VAE",
                "vae",
                {
                    "config": {
                        "base_dim": VAE_CHANNELS,
                        "decoder_base_dim": VAE_CHANNELS,
                        "dim_mult": [1] * 5,
                        "num_res_blocks": 1,
                    }
                },
            ),
            Part(
                "Qwen21Transformer",
                "transformer",
                {
                    "num_layers": 1,
                    "attention_head_dim": WIDTH,
                    "num_attention_heads": 1,
                    "context_in_dim": WIDTH,
                    "mlp_ratio": 1,
                    "axes_dims_rope": (16, 24, 24),
                },
            ),
            Part(
                "Qwen21TextEncoder",
                "text_encoder",
                {**_qwen3(WIDTH, 1), "mrope_section": MROPE},
            ),
        ),
        seed=140,
        tokenizers=("processor",),
    ),
    "noise-fibo2": Family(
        "mflux.models.fibo2.fibo2_initializer",
        (
            _FLUX2_VAE,
            Part(
                "Fibo2Transformer",
                "transformer",
                {
                    "dim": WIDTH,
                    "n_layers": 1,
                    "n_refiner_layers": 0,
                    "n_heads": 1,
                    "cap_feat_dim": 3 * WIDTH,
                    "injection_layer_ids": (0,),
                    "perceiver_num_layers": 1,
                    "axes_dims": (16, 24, 24),
                },
            ),
            Part(
                "Fibo2TextEncoder",
                "text_encoder",
                {
                    "text_config": {
                        **_qwen3(WIDTH, 35),  # it reads hidden states up to the 35th
                        "max_position_embeddings": 4096,
                        "rope_theta": 10000.0,
                        "rope_scaling": {"mrope_section": MROPE},
                        "attention_bias": False,
                        "rms_norm_eps": 1e-6,
                    },
                    "vision_config": {
                        "depth": 1,
                        "hidden_size": WIDTH,
                        "intermediate_size": WIDTH,
                        "num_heads": 1,
                        "out_hidden_size": WIDTH,
                        "num_position_embeddings": 16,
                        "deepstack_visual_indexes": [0],
                    },
                },
                change=lambda encoder: _few_tokens(encoder.language_model),
            ),
        ),
        seed=150,
        tokenizers=("processor",),
        image_processor="processor",
    ),
}


@contextmanager
def built_small(name: str) -> Iterator[None]:
    """While a model of FAMILIES is loaded: mflux builds its modules small."""
    family = FAMILIES[name]
    initializer = importlib.import_module(family.initializer)
    original = {part.name: getattr(initializer, part.name) for part in family.parts}
    try:
        for part in family.parts:
            setattr(initializer, part.name, _small(original[part.name], part))
        yield
    finally:
        for class_name, full_size in original.items():
            setattr(initializer, class_name, full_size)


def _small(full_size: Any, part: Part) -> Any:
    class Small(full_size):  # type: ignore[misc]
        def __init__(self, **_: Any) -> None:
            super().__init__(**part.sizes)
            part.change(self)

    Small.__name__ = part.name
    return Small


def write_checkpoint(name: str, folder: Path) -> None:
    """Writes the checkpoint of a model of FAMILIES into a new folder."""
    from mlx.utils import tree_flatten

    family = FAMILIES[name]
    initializer = importlib.import_module(family.initializer)
    for number, part in enumerate(family.parts):
        with component(folder / part.folder, seed=family.seed + number, biases=True) as weights:
            if part.add:
                part.add(weights)
                continue
            module = _small(getattr(initializer, part.name), part)()
            for parameter, value in tree_flatten(module.parameters()):
                weights.parameter(parameter, np.array(value), GAIN)
    for tokenizer in family.tokenizers:
        config = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": TEMPLATE}
        special = IMAGE_TOKEN if family.image_processor else {}
        write_tokenizer(folder / tokenizer, byte_pairs(QWEN_VOCABULARY), config, special)
    for tokenizer in family.t5_tokenizers:
        write_tokenizer(folder / tokenizer, unigrams(T5_VOCABULARY), {"extra_ids": 0})
    if family.image_processor:
        settings = json.dumps({"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2})
        path = folder / family.image_processor / "preprocessor_config.json"
        path.write_text(settings, encoding="utf-8")
