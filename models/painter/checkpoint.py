"""The built-in model as a folder that mflux's Flux1 loads: with random weights, then trained."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from models.painter.dimensions import USUAL, Dimensions
from models.painter.patches import Array, Patches, vae_weights
from models.painter.vocabulary import (
    CLIP_LENGTH,
    T5_LENGTH,
    clip_vocabulary,
    t5_capitals,
    t5_pieces,
    write_tokenizers,
)
from models.tiny_weights import model_config

Parts = dict[str, dict[str, Array]]
"""Weights by folder ("transformer", "text_encoder", "text_encoder_2", "vae") and name."""
WEIGHTS = Path(__file__).with_name("weights.safetensors")
"""The trained weights."""
CONFIG = model_config(
    "tiny", max_sequence_length=T5_LENGTH, supports_guidance=False, requires_sigma_shift=False
)
"""Keyword arguments of mflux's ModelConfig."""
TOKEN_VALUES = 64  # 2 x 2 latent pixels of 16 channels
_TIMESTEP_WIDTH = 256  # fixed in mflux
# A channel that is the same for all tokens. It keeps the normalization of layers from scaling the
# noise of each token otherwise, which the output must hold exactly (it is noise minus picture).
_STEADY = 30.0
_T5_HEADS = 64 * 64  # fixed in mflux


def initial_weights(dimensions: Dimensions, patches: Patches, seed: int) -> Parts:
    """Returns weights to start a training from."""
    random = np.random.default_rng(seed)
    parts: Parts = {"vae": vae_weights(patches)}

    def draw(*shape: int, scale: float) -> Array:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    def linear(part: str, name: str, inputs: int, outputs: int, *, gain: float = 1.0) -> None:
        arrays = parts.setdefault(part, {})
        arrays[f"{name}.weight"] = draw(outputs, inputs, scale=gain * inputs**-0.5)
        if part != "text_encoder_2":
            arrays[f"{name}.bias"] = np.zeros(outputs, np.float32)

    _add_transformer(linear, parts, dimensions)
    _add_clip(linear, draw, parts, dimensions)
    width = dimensions.text_width
    t5 = parts["text_encoder_2"] = {}
    t5["shared.weight"] = draw(len(t5_pieces()), width, scale=1)
    t5["final_layer_norm.weight"] = np.ones(width, np.float32)
    for number in range(dimensions.t5_layers):
        block = f"t5_blocks.{number}"
        attention = f"{block}.attention.SelfAttention"
        for name in ("q", "k", "v"):
            gain = 0.35 if name in "qk" else 1.0  # its attention is not scaled
            linear("text_encoder_2", f"{attention}.{name}", width, _T5_HEADS, gain=gain)
        linear("text_encoder_2", f"{attention}.o", _T5_HEADS, width, gain=0.7)
        t5[f"{attention}.relative_attention_bias.weight"] = draw(32, 64, scale=1.5)
        t5[f"{block}.attention.layer_norm.weight"] = np.ones(width, np.float32)
        t5[f"{block}.ff.layer_norm.weight"] = np.ones(width, np.float32)
        for name in ("wi_0", "wi_1"):
            linear("text_encoder_2", f"{block}.ff.DenseReluDense.{name}", width, 2 * width)
        linear("text_encoder_2", f"{block}.ff.DenseReluDense.wo", 2 * width, width)
    return parts


def write_checkpoint(folder: Path, parts: Parts) -> None:
    """Writes a folder of at most a few megabytes, in half precision."""
    pieces = len(t5_pieces())
    rows = [*range(pieces), *t5_capitals().values()]
    for part, arrays in parts.items():
        stored = {name: array.astype(np.float16) for name, array in arrays.items()}
        if part == "text_encoder_2":
            stored["shared.weight"] = stored["shared.weight"][:pieces][rows]
        (folder / part).mkdir(parents=True, exist_ok=True)
        save_file(stored, folder / part / "0.safetensors", {"quantization_level": "None"})
    write_tokenizers(folder)


def pack(file: Path, parts: Parts) -> None:
    """Writes all weights into one file, in half precision."""
    arrays = {
        f"{part}/{name}": array.astype(np.float16)
        for part, arrays in parts.items()
        for name, array in arrays.items()
    }
    save_file(arrays, file)


def unpacked(file: Path = WEIGHTS) -> Parts:
    """Returns the weights of a file from pack()."""
    parts: Parts = {}
    for name, array in load_file(file).items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = array
    return parts


def unpack(folder: Path, file: Path = WEIGHTS) -> None:
    """Writes the checkpoint of a file from pack()."""
    write_checkpoint(folder, unpacked(file))


def load(folder: Path, dimensions: Dimensions = USUAL, lora: Path | None = None) -> Any:
    """Returns mflux's Flux1 with the weights of a folder. prepare_mlx() comes first."""
    import mlx.core as mx
    from mflux.models.common.config import ModelConfig
    from mflux.models.flux.variants.txt2img.flux import Flux1

    from models.painter.narrowing import narrow

    model = Flux1(
        model_path=str(folder),
        model_config=ModelConfig(**CONFIG),
        lora_paths=[str(lora)] if lora else None,
        bake_lora=False,
    )
    narrow(model, dimensions)
    mx.eval(model.parameters())
    return model


def _add_transformer(linear: Any, parts: Parts, dimensions: Dimensions) -> None:
    width, text = dimensions.width, dimensions.text_width
    hidden = dimensions.expansion * width
    linear("transformer", "x_embedder", TOKEN_VALUES, width)
    linear("transformer", "context_embedder", text, width)
    arrays = parts["transformer"]
    # The first channels hold the noisy picture from the input to the output.
    arrays["x_embedder.weight"][:TOKEN_VALUES] = np.eye(TOKEN_VALUES)
    for name in ("x_embedder", "context_embedder"):
        arrays[f"{name}.weight"][-1] = 0
        arrays[f"{name}.bias"][-1] = _STEADY
    spread = ((_STEADY**2 + width) / width) ** 0.5
    for embedder, inputs in (("timestep_embedder", _TIMESTEP_WIDTH), ("text_embedder", text)):
        linear("transformer", f"time_text_embed.{embedder}.linear_1", inputs, width)
        linear("transformer", f"time_text_embed.{embedder}.linear_2", width, width)
    for number in range(dimensions.layers):
        block = f"single_transformer_blocks.{number}"
        linear("transformer", f"{block}.norm.linear", width, 3 * width, gain=0.1)
        arrays[f"{block}.norm.linear.bias"][width : 2 * width] = spread - 1
        arrays[f"{block}.norm.linear.bias"][2 * width :] = 0.5  # the gate
        for name in ("to_q", "to_k", "to_v"):
            linear("transformer", f"{block}.attn.{name}", width, width)
        for name in ("norm_q", "norm_k"):
            arrays[f"{block}.attn.{name}.weight"] = np.ones(width // dimensions.heads, np.float32)
        linear("transformer", f"{block}.proj_mlp", width, hidden)
        linear("transformer", f"{block}.proj_out", width + hidden, width)
        for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
            arrays[f"{block}.{name}.weight"][:, -1] = 0
        arrays[f"{block}.proj_out.weight"][-1] = 0
    linear("transformer", "norm_out.linear", width, 2 * width, gain=0.1)
    arrays["norm_out.linear.bias"][:width] = spread - 1
    linear("transformer", "proj_out", width, TOKEN_VALUES, gain=0.1)
    arrays["proj_out.weight"][:, :TOKEN_VALUES] += np.eye(TOKEN_VALUES, dtype=np.float32)
    arrays["proj_out.weight"][:, -1] = 0


def _add_clip(linear: Any, draw: Any, parts: Parts, dimensions: Dimensions) -> None:
    width = dimensions.text_width
    tokens = len(clip_vocabulary()[0])
    clip = parts["text_encoder"] = {}

    def norm(name: str) -> None:
        clip[f"{name}.weight"] = np.ones(width, np.float32)
        clip[f"{name}.bias"] = np.zeros(width, np.float32)

    clip["text_model.embeddings.token_embedding.weight"] = draw(tokens, width, scale=0.5)
    clip["text_model.embeddings.position_embedding.weight"] = draw(CLIP_LENGTH, width, scale=0.2)
    for number in range(dimensions.clip_layers):
        layer = f"text_model.encoder.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear("text_encoder", f"{layer}.self_attn.{name}", width, width)
        linear("text_encoder", f"{layer}.mlp.fc1", width, 4 * width)
        linear("text_encoder", f"{layer}.mlp.fc2", 4 * width, width)
        norm(f"{layer}.layer_norm1")
        norm(f"{layer}.layer_norm2")
    norm("text_model.final_layer_norm")
