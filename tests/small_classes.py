"""mflux's classes of families that no tiny model has, with small random weights.

Their transformers are mflux's own, and so is the text encoder of Lens. Other text encoders and all
decoders are stand-ins: they hold a few numbers, and take the shapes of the others.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from generation import pipelines
from models.model_catalog import LoadSpec

WIDTH = 128
TOKENS = 7
BYTES_OF_A_TOKEN = 5


@dataclass(frozen=True)
class Small:
    """A class of mflux, built small."""

    transformer: str
    """Its class, as the module of the pipeline knows it."""
    sizes: Mapping[str, Any]
    """Arguments of its constructor."""
    encoder: str
    """The method that encodes a prompt; empty: no method of the class does."""
    embeddings: Callable[[str], Any] = lambda prompt: None
    """Returns the embeddings of a prompt."""
    latent_side: int = 8
    """Pixels for each number of the latents, in a row."""


def numbers(prompt: str, *shape: int) -> Any:
    """Random numbers that depend on the length of a prompt."""
    import mlx.core as mx

    return mx.random.normal(shape, key=mx.random.key(len(prompt)))


def _iris_embeddings(prompt: str) -> Any:
    import mlx.core as mx

    return numbers(prompt, 1, TOKENS, 12, WIDTH), mx.ones((1, TOKENS), mx.int32)


SMALL: Mapping[str, Small] = {
    "boogu-image-turbo": Small(
        "BooguImageTransformer",
        {
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_double_stream_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 1,
            "num_kv_heads": 1,
            "axes_dim_rope": (32, 48, 48),
            "instruction_feat_dim": WIDTH,
        },
        "_encode_instruction",
        lambda prompt: numbers(prompt, 1, TOKENS, WIDTH),
    ),
    # Its width is in mflux's code, so it has no layers.
    "fibo": Small(
        "FiboTransformer",
        {"num_layers": 0, "num_single_layers": 0},
        "",
        lambda prompt: (prompt, numbers(prompt, 2, TOKENS, 4096), []),
        latent_side=16,
    ),
    "iris-3b": Small(
        "IrisTransformer",
        {
            "hidden_size": WIDTH,
            "depth": 2,
            "dual_depth": 1,
            "num_heads": 1,
            "num_kv_heads": 1,
            "text_dim": WIDTH,
            "text_layer_num_heads": 1,
            "pixel_depth": 1,
            "pixel_attn_hidden_size": WIDTH,
            "pixel_num_heads": 1,
        },
        "_encode_prompt",
        _iris_embeddings,
    ),
    "lens-turbo": Small(
        "LensTransformer",
        {"num_layers": 1, "num_attention_heads": 2, "enc_hidden_dim": WIDTH},
        "",
        latent_side=16,
    ),
    "ming-image-design": Small(
        "MingTransformer",
        {
            "dim": WIDTH,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 1,
            "cap_feat_dim": WIDTH,
        },
        "encode_prompt",
        lambda prompt: (numbers(prompt, TOKENS, WIDTH), numbers(prompt, TOKENS, WIDTH)),
    ),
    "moss-image-sft": Small(
        "MOSSImageTransformer",
        {"dim": WIDTH, "ffn_dim": WIDTH, "num_heads": 1, "num_layers": 23, "text_dim": WIDTH},
        "_encode_prompt",
        lambda prompt: numbers(prompt, 1, TOKENS, WIDTH),
        latent_side=16,
    ),
}
"""By the name of a model. It stands for its family."""


@contextmanager
def small_classes() -> Iterator[None]:
    """While they are loaded and drawn with: classes of SMALL are built small."""
    fibo = importlib.import_module("mflux.models.fibo.variants.txt2img.fibo")
    encoder = SimpleNamespace(encode_prompt=lambda prompt, **_: SMALL["fibo"].embeddings(prompt))
    with (
        patch.object(pipelines, "build_class", _build_small),
        patch.object(fibo, "PromptEncoder", encoder),
    ):
        yield


def _build_small(weights: LoadSpec, data_dir: Path) -> Any:
    from mflux.callbacks.callback_registry import CallbackRegistry
    from mflux.models.common.config.model_config import AVAILABLE_MODELS
    from mlx import nn

    model, small = weights.model, SMALL[weights.model.name]
    module = importlib.import_module(weights.pipeline.module)
    real = getattr(module, weights.pipeline.name)
    built = real.__new__(real)
    if isinstance(built, nn.Module):
        nn.Module.__init__(built)
    built.transformer = getattr(module, small.transformer)(**small.sizes)
    built.vae = _decoder(small.latent_side)
    built.text_encoder = _lens_encoder(module) if model.family == "lens" else None
    built.tokenizers = {"fibo": None}
    built.model_config = AVAILABLE_MODELS[model.key]
    built.callbacks = CallbackRegistry()
    built.bits = built.tiling_config = built.lora_paths = built.lora_scales = None
    if small.encoder:
        setattr(built, small.encoder, small.embeddings)
    return built


def _decoder(latent_side: int) -> Any:
    import mlx.core as mx
    from mlx import nn

    class Decoder(nn.Module):  # type: ignore[misc]
        spatial_scale = latent_side

        def __init__(self) -> None:
            super().__init__()
            self.weight = mx.ones((3, 1, 1))

        def decode(self, latents: Any) -> Any:
            height, width = (latent_side * side for side in latents.shape[-2:])
            return latents.mean() * mx.broadcast_to(self.weight, (1, 3, height, width))

        def decode_packed_latents(self, latents: Any, tiling_config: Any = None) -> Any:
            return self.decode(latents)

    return Decoder()


def _lens_encoder(module: Any) -> Any:
    """The text encoder of Lens."""
    from mflux.models.common_models.gpt_oss.gpt_oss import Model, ModelArgs

    encoder = module.LensGptOssEncoder.__new__(module.LensGptOssEncoder)
    encoder.model = Model(
        ModelArgs(
            num_hidden_layers=24,  # it reads the last
            num_local_experts=4,
            vocab_size=256,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_attention_heads=1,
            num_key_value_heads=1,
            rope_theta=10000,
        )
    )
    encoder.tokenizer = SimpleNamespace(
        encode=lambda text, **_: SimpleNamespace(ids=[*text.encode()[::BYTES_OF_A_TOKEN]])
    )
    return encoder
