"""Writes the tiny checkpoints: one recipe for each checkpoint folder.

Names and layouts are mflux's own, as `mflux-save` writes them. tiny_models.py and
tiny_slimming.py explain why most layers can be left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.painter.dimensions import USUAL
from models.tiny_weights import (
    CHAT_TEMPLATE,
    CLIP_LAYERS,
    CLIP_LENGTH,
    CLIP_VOCABULARY,
    FLUX2_LATENT_CHANNELS,
    LATENT_CHANNELS,
    LORA_RANK,
    PATCH,
    QWEN3_LAYERS,
    QWEN3_STRIDE,
    QWEN_VOCABULARY,
    SIGLIP_SIDE,
    SIGLIP_WIDTH,
    T5_VOCABULARY,
    TIMESTEP_WIDTH,
    VAE_CHANNELS,
    WIDTH,
    Weights,
    byte_pairs,
    component,
    save_lora,
    unigrams,
    write_tokenizer,
)


def _write_flux1(folder: Path) -> None:
    _write_flux1_encoders(folder)
    with component(folder / "transformer", seed=2, biases=True) as weights:
        # No block: mflux builds as many as are stored.
        _add_flux1_transformer(weights, LATENT_CHANNELS * PATCH)


def _write_flux1_fill(folder: Path) -> None:
    _write_flux1_encoders(folder)
    with component(folder / "transformer", seed=16, biases=True) as weights:
        # Beside the latents: those of the masked image, and the mask, 8 x 8 for each of them.
        inputs = (2 * LATENT_CHANNELS + 8 * 8) * PATCH
        _add_flux1_transformer(weights, inputs, is_guided=True)


def _write_flux1_dev(folder: Path) -> None:
    """Has a block, so that reference images influence the result."""
    _write_flux1_encoders(folder)
    with component(folder / "transformer", seed=17, biases=True) as weights:
        _add_flux1_transformer(weights, LATENT_CHANNELS * PATCH, is_guided=True)
        _add_flux1_block(weights)
        # Without it, the norm that follows would undo the strength of a picture to vary (Redux).
        weights.raw("context_embedder.bias", WIDTH)

    with component(folder / "transformer_controlnet", seed=18, biases=True) as weights:
        _add_flux1_embedders(weights, LATENT_CHANNELS * PATCH, is_guided=True)
        _add_flux1_block(weights)
        weights.linear("controlnet_x_embedder", LATENT_CHANNELS * PATCH, gain=12)
        weights.linear("controlnet_single_blocks.0")

    with component(folder / "image_encoder", seed=19, biases=True) as weights:  # SigLIP
        weights.patches("embeddings.patch_embedding", SIGLIP_WIDTH, SIGLIP_SIDE)
        weights.norm("post_layernorm", SIGLIP_WIDTH)

    with component(folder / "image_embedder", seed=20, biases=True) as weights:  # Redux
        weights.linear("redux_up", SIGLIP_WIDTH, gain=3)
        weights.linear("redux_down", gain=3)


def _write_flux1_encoders(folder: Path) -> None:
    with component(folder / "vae", seed=1, biases=True) as weights:
        _add_vae(weights, _FLUX1_VAE, LATENT_CHANNELS)

    with component(folder / "text_encoder", seed=3, biases=True) as weights:  # CLIP
        weights.embedding("text_model.embeddings.token_embedding", len(CLIP_VOCABULARY))
        weights.embedding("text_model.embeddings.position_embedding", CLIP_LENGTH)
        for number in range(CLIP_LAYERS):
            layer = f"text_model.encoder.layers.{number}"
            for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                weights.linear(f"{layer}.self_attn.{projection}", gain=2)
            for part in (1, 2):
                weights.linear(f"{layer}.mlp.fc{part}")
                weights.norm(f"{layer}.layer_norm{part}")
        weights.norm("text_model.final_layer_norm")

    with component(folder / "text_encoder_2", seed=4, biases=False) as weights:  # T5
        weights.embedding("shared", len(T5_VOCABULARY))
        weights.norm("final_layer_norm")

    write_tokenizer(folder / "tokenizer", byte_pairs(CLIP_VOCABULARY), {})
    write_tokenizer(folder / "tokenizer_2", unigrams(T5_VOCABULARY), {"extra_ids": 0})


def _add_flux1_transformer(weights: Weights, inputs: int, *, is_guided: bool = False) -> None:
    _add_flux1_embedders(weights, inputs, is_guided=is_guided)
    weights.linear("norm_out.linear", outputs=2 * WIDTH)
    weights.linear("proj_out", outputs=LATENT_CHANNELS * PATCH)


def _add_flux1_embedders(weights: Weights, inputs: int, *, is_guided: bool) -> None:
    weights.linear("x_embedder", inputs)
    weights.linear("context_embedder")
    embedders = [("timestep_embedder", TIMESTEP_WIDTH), ("text_embedder", WIDTH)]
    if is_guided:
        embedders.append(("guidance_embedder", TIMESTEP_WIDTH))
    for embedder, embedder_inputs in embedders:
        weights.linear(f"time_text_embed.{embedder}.linear_1", embedder_inputs, gain=2)
        weights.linear(f"time_text_embed.{embedder}.linear_2", gain=2)


def _add_flux1_block(weights: Weights) -> None:
    # A single-stream one: the widths of the others are written into mflux's code.
    block = "single_transformer_blocks.0"
    weights.linear(f"{block}.norm.linear", outputs=3 * WIDTH, gain=2)
    for projection in ("to_q", "to_k", "to_v"):
        weights.linear(f"{block}.attn.{projection}", gain=2)
    for norm in ("norm_q", "norm_k"):
        weights.norm(f"{block}.attn.{norm}", bias=False)
    weights.linear(f"{block}.proj_mlp")
    weights.linear(f"{block}.proj_out", (1 + 1) * WIDTH, gain=2)


def _write_flux2(folder: Path) -> None:
    with component(folder / "vae", seed=5, biases=True) as weights:
        add_flux2_vae(weights)

    with component(folder / "transformer", seed=6, biases=False) as weights:
        weights.linear("x_embedder", FLUX2_LATENT_CHANNELS * PATCH)
        weights.linear("context_embedder", 3 * WIDTH)
        for part in (1, 2):
            weights.linear(f"time_guidance_embed.linear_{part}", gain=2)
        for stream in ("img", "txt"):
            weights.linear(f"double_stream_modulation_{stream}.linear", outputs=6 * WIDTH, gain=2)
        weights.linear("single_stream_modulation.linear", outputs=3 * WIDTH, gain=2)
        block = "single_transformer_blocks.0.attn"
        weights.linear(f"{block}.to_qkv_mlp_proj", outputs=(3 + 2) * WIDTH)
        weights.linear(f"{block}.to_out", (1 + 1) * WIDTH)
        for norm in ("norm_q", "norm_k"):
            # Sharp attention, so that few image tokens have an effect beside 512 text tokens.
            weights.norm(f"{block}.{norm}", scale=3)
        weights.linear("norm_out.linear", outputs=2 * WIDTH)
        weights.linear("proj_out", outputs=FLUX2_LATENT_CHANNELS * PATCH)

    with component(folder / "text_encoder", seed=7, biases=False) as weights:  # Qwen3
        weights.embedding("embed_tokens", len(QWEN_VOCABULARY))
        for number in range(0, QWEN3_LAYERS, QWEN3_STRIDE):
            _add_qwen_layer(weights, f"layers.{number}")
            for norm in ("q_norm", "k_norm"):
                weights.norm(f"layers.{number}.self_attn.{norm}")
        weights.norm("norm")

    write_tokenizer(
        folder / "tokenizer", byte_pairs(QWEN_VOCABULARY), {"chat_template": CHAT_TEMPLATE}
    )


def _write_z_image(folder: Path) -> None:
    with component(folder / "vae", seed=8, biases=True) as weights:
        _add_vae(weights, _Z_IMAGE_VAE, LATENT_CHANNELS)

    with component(folder / "transformer", seed=9, biases=True) as weights:
        weights.linear("all_x_embedder.2-1", LATENT_CHANNELS * PATCH)
        weights.linear("t_embedder.linear1", TIMESTEP_WIDTH, gain=2)
        weights.linear("t_embedder.linear2", gain=2)
        weights.norm("cap_embedder.0", bias=False)
        weights.linear("cap_embedder.1")
        for token in ("x_pad_token", "cap_pad_token"):
            weights.raw(token, 1, WIDTH)
        block = "layers.0"
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            weights.linear(f"{block}.attention.{projection}", bias=False)
        for norm in ("norm_q", "norm_k"):
            weights.norm(f"{block}.attention.{norm}", bias=False)
        for part in (1, 2, 3):
            weights.linear(f"{block}.feed_forward.w{part}", bias=False)
        for part in (1, 2):
            weights.norm(f"{block}.attention_norm{part}", bias=False)
            weights.norm(f"{block}.ffn_norm{part}", bias=False)
        weights.linear(f"{block}.adaLN_modulation.0", outputs=4 * WIDTH, gain=2)
        weights.linear("all_final_layer.2-1.adaLN_modulation.0")
        weights.linear("all_final_layer.2-1.linear", outputs=LATENT_CHANNELS * PATCH)

    with component(folder / "text_encoder", seed=10, biases=False) as weights:  # Qwen3
        weights.embedding("embed_tokens", len(QWEN_VOCABULARY))
        _add_qwen_layer(weights, "layers.0")
        for norm in ("q_norm", "k_norm"):
            weights.norm(f"layers.0.self_attn.{norm}")

    config = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": CHAT_TEMPLATE}
    write_tokenizer(folder / "tokenizer", byte_pairs(QWEN_VOCABULARY), config)


def _write_qwen(folder: Path) -> None:
    with component(folder / "vae", seed=11, biases=True) as weights:
        add_qwen_vae(weights)

    with component(folder / "transformer", seed=12, biases=True) as weights:
        weights.linear("img_in", LATENT_CHANNELS * PATCH)
        weights.norm("txt_norm", bias=False)
        weights.linear("txt_in")
        weights.linear("time_text_embed.timestep_embedder.linear_1", TIMESTEP_WIDTH, gain=2)
        weights.linear("time_text_embed.timestep_embedder.linear_2", gain=2)
        block = "transformer_blocks.0"
        for stream in ("img", "txt"):
            weights.linear(f"{block}.{stream}_mod_linear", outputs=6 * WIDTH, gain=2)
            for part in ("mlp_in", "mlp_out"):
                weights.linear(f"{block}.{stream}_ff.{part}")
        for projection in ("to_q", "to_k", "to_v", "attn_to_out.0"):
            weights.linear(f"{block}.attn.{projection}", gain=2)
        for projection in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            weights.linear(f"{block}.attn.{projection}", gain=2)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            weights.norm(f"{block}.attn.{norm}", bias=False)
        weights.linear("norm_out.linear", outputs=2 * WIDTH)
        weights.linear("proj_out", outputs=LATENT_CHANNELS * PATCH)

    with component(folder / "text_encoder", seed=13, biases=False) as weights:  # Qwen2.5-VL
        weights.embedding("encoder.embed_tokens", len(QWEN_VOCABULARY))
        _add_qwen_layer(weights, "encoder.layers.0", biases=("q_proj", "k_proj", "v_proj"))
        weights.norm("encoder.norm")

    write_tokenizer(folder / "tokenizer", byte_pairs(QWEN_VOCABULARY), {})


def _write_seedvr2(folder: Path) -> None:
    with component(folder / "vae", seed=14, biases=True) as weights:
        _add_vae(weights, _SEEDVR2_VAE, LATENT_CHANNELS)
        for number, frames in enumerate((2, 2, 1)):
            # Each pixel becomes 2 x 2, and each frame as many: copies, which the blur smooths.
            copies = np.tile(np.eye(VAE_CHANNELS, dtype=np.float32), (2 * 2 * frames, 1))
            name = f"decoder.up_blocks.{number}.upsamplers.0.upscale_conv"
            weights.blur(name, copies, side=1, frames=1)

    with component(folder / "transformer", seed=15, biases=True) as weights:
        # No block: on a CPU, mlx 0.32 crashes when mflux splits the picture into windows.
        # The last norm and its modulation are small and not random in mflux: not stored either.
        weights.linear("vid_in.proj", (2 * LATENT_CHANNELS + 1) * PATCH)
        weights.linear("emb_in.proj_in", TIMESTEP_WIDTH)
        weights.linear("emb_in.proj_hid")
        weights.linear("emb_in.proj_out", outputs=6 * WIDTH)
        weights.linear("vid_out.proj", outputs=LATENT_CHANNELS * PATCH)


def _add_qwen_layer(weights: Weights, layer: str, *, biases: tuple[str, ...] = ()) -> None:
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weights.linear(f"{layer}.self_attn.{projection}", gain=3, bias=projection in biases)
    for projection in ("gate_proj", "up_proj", "down_proj"):
        weights.linear(f"{layer}.mlp.{projection}")
    for norm in ("input_layernorm", "post_attention_layernorm"):
        weights.norm(f"{layer}.{norm}")


@dataclass(frozen=True)
class _VaeNames:
    """Names of the layers of a family's VAE where they differ, and which layers have frames."""

    encoder_ends: str = ""  # the wrapper of the first and the last convolution
    decoder_ends: str = ""
    norm_out: str = "conv_norm_out"
    has_norm_bias: bool = True
    resnet_conv: str = ""
    down: str = "down_blocks.{}.downsamplers.0.conv"
    up: str = "up_blocks.{}.upsamplers.0.conv"
    frames: int = 0
    sampler_frames: tuple[tuple[int, ...], tuple[int, ...]] = ((0, 0, 0), (0, 0, 0))


_FLUX1_VAE = _VaeNames(".conv2d", ".conv2d", "conv_norm_out.norm")
_FLUX2_VAE = _VaeNames()
_Z_IMAGE_VAE = _VaeNames(".conv2d", ".conv", "conv_norm_out.norm")
_QWEN_VAE = _VaeNames(
    ".conv3d",
    ".conv3d",
    "norm_out",
    has_norm_bias=False,
    resnet_conv=".conv3d",
    down="down_blocks.{}.downsamplers.0.resample_conv",
    up="up_block{}.upsamplers.0.resample_conv",
    frames=3,
)
_SEEDVR2_VAE = _VaeNames(frames=3, sampler_frames=((1, 3, 3), (3, 3, 3)))


def _add_vae(weights: Weights, names: _VaeNames, latent_channels: int) -> None:
    frames = names.frames
    unmixed = np.eye(VAE_CHANNELS, dtype=np.float32)
    for half, inputs, ends, sampler, sampler_frames in (
        ("encoder", 3, names.encoder_ends, names.down, names.sampler_frames[0]),
        ("decoder", latent_channels, names.decoder_ends, names.up, names.sampler_frames[1]),
    ):
        weights.conv(f"{half}.conv_in{ends}", inputs, VAE_CHANNELS, frames=frames)
        for number in range(3):
            name = f"{half}.{sampler.format(number)}"
            weights.blur(name, unmixed, frames=sampler_frames[number])
        for number in range(2):
            resnet = f"{half}.mid_block.resnets.{number}"
            for part in (1, 2):
                weights.norm(f"{resnet}.norm{part}", VAE_CHANNELS, bias=names.has_norm_bias)
                conv = f"{resnet}.conv{part}{names.resnet_conv}"
                weights.conv(conv, VAE_CHANNELS, VAE_CHANNELS, frames=frames)
        weights.norm(f"{half}.{names.norm_out}", VAE_CHANNELS, bias=names.has_norm_bias)
    # Mean and variance; strong, so that an input image is visible beside the noise.
    conv_out = f"encoder.conv_out{names.encoder_ends}"
    weights.conv(conv_out, VAE_CHANNELS, 2 * latent_channels, gain=3, frames=frames)
    # Rows of a Hadamard matrix: red, green and blue vary independently around grey.
    colours = np.array([[1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], np.float32)
    conv_out = f"decoder.conv_out{names.decoder_ends}"
    weights.blur(conv_out, colours * np.float32(0.5), frames=frames)


def add_flux2_vae(weights: Weights) -> None:
    _add_vae(weights, _FLUX2_VAE, FLUX2_LATENT_CHANNELS)
    weights.conv("quant_conv", 2 * FLUX2_LATENT_CHANNELS, 2 * FLUX2_LATENT_CHANNELS, side=1)
    weights.conv("post_quant_conv", FLUX2_LATENT_CHANNELS, FLUX2_LATENT_CHANNELS, side=1)


def add_qwen_vae(weights: Weights) -> None:
    _add_vae(weights, _QWEN_VAE, LATENT_CHANNELS)
    for conv, channels in (
        ("quant_conv", 2 * LATENT_CHANNELS),
        ("post_quant_conv", LATENT_CHANNELS),
    ):
        weights.conv(f"{conv}.conv3d", channels, channels, side=1, frames=1)


def write_flux1_lora(path: Path) -> None:
    """A LoKr, the only kind that mflux applies outside of FLUX.1's blocks."""
    weights = Weights(seed=21, biases=False)
    for factor in (1, 2):
        weights.raw(f"lycoris__proj_out.lokr_w{factor}", 8, 8)
    save_lora(path, weights)


def write_built_in_lora(path: Path) -> None:
    layer = "transformer.single_transformer_blocks.0.proj_out"
    weights = Weights(seed=23, biases=False)
    weights.raw(f"{layer}.lora_A.weight", LORA_RANK, USUAL.width * (1 + USUAL.expansion))
    weights.raw(f"{layer}.lora_B.weight", USUAL.width, LORA_RANK)
    save_lora(path, weights)


def write_flux2_lora(path: Path) -> None:
    weights = Weights(seed=22, biases=False)
    weights.raw("x_embedder.lora_A.weight", LORA_RANK, FLUX2_LATENT_CHANNELS * PATCH)
    weights.raw("x_embedder.lora_B.weight", WIDTH, LORA_RANK)
    save_lora(path, weights)


RECIPES: dict[str, Callable[[Path], None]] = {
    "noise-flux1": _write_flux1,
    "noise-dev": _write_flux1_dev,
    "noise-fill": _write_flux1_fill,
    "noise-flux2": _write_flux2,
    "noise-z-image": _write_z_image,
    "noise-qwen": _write_qwen,
    "noise-seedvr2": _write_seedvr2,
}
"""The function that writes each checkpoint into a new folder."""
