"""Makes mflux's Flux1 as narrow as the built-in model's checkpoint. Only the instance is changed.

Blocks that the checkpoint does not store are removed. Layers that read a width from an attribute
get the stored one. Operations without weights are replaced where the model needs another form of
them: positions, attention in large pictures, and pixels made of channels.
"""

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map

from models.painter.attention import RelativePositions, SpanAttention
from models.painter.dimensions import USUAL, Dimensions


class PixelShuffle(nn.Module):  # type: ignore[misc]
    """Moves channels (y, x, channel) of each pixel to 8 x 8 pixels; it has no weights."""

    def __call__(self, pixels: mx.array) -> mx.array:
        batch, channels, rows, columns = pixels.shape
        squares = pixels.reshape(batch, 8, 8, channels // 64, rows, columns)
        return squares.transpose(0, 3, 4, 1, 5, 2).reshape(
            batch, channels // 64, rows * 8, columns * 8
        )


def narrow(model: Any, dimensions: Dimensions = USUAL) -> None:
    """Makes a loaded model as narrow as its weights. Call it once, before anything evaluates the
    parameters."""
    _narrow_vae(model.vae)
    _narrow_transformer(model.transformer, dimensions)
    model.t5_text_encoder.t5_blocks = model.t5_text_encoder.t5_blocks[: dimensions.t5_layers]
    clip = model.clip_text_encoder.text_model.encoder
    clip.layers = clip.layers[: dimensions.clip_layers]
    for layer in clip.layers:
        layer.self_attn.num_heads = dimensions.text_width // layer.self_attn.head_dimension
    for part in (model.vae, model.transformer, model.t5_text_encoder, model.clip_text_encoder):
        # Half precision is for the file only: on CPUs it is many times slower.
        part.update(tree_map(_widened, part.parameters()))


def _narrow_vae(vae: Any) -> None:
    for half in (vae.encoder, vae.decoder):
        half.mid_block = nn.Identity()
        half.conv_norm_out = nn.Identity()
    for block in vae.encoder.down_blocks:
        block.resnets = [nn.Identity() for _ in block.resnets]
    vae.decoder.up_blocks = [PixelShuffle()]


def _narrow_transformer(transformer: Any, dimensions: Dimensions) -> None:
    head_width = dimensions.width // dimensions.heads
    positions = transformer.pos_embed = RelativePositions(head_width)
    transformer.norm_out.embedding_dim = dimensions.width
    for number, block in enumerate(transformer.single_transformer_blocks):
        block.norm.dim = dimensions.width
        block.attn.num_heads, block.attn.head_dimension = dimensions.heads, head_width
        block.attn = SpanAttention(block.attn, positions, windows=number % 2 == 1)


def _widened(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
