"""mflux's modules for batches of captions and noise levels, for training.

mflux calls them with one prompt and one noise level at a time, and some of them only work so. These
functions compute the same with the same layers; a test compares them.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from models.painter.functions import fast_gelu, fast_softmax


def encode_t5(encoder: Any, tokens: mx.array) -> mx.array:
    """Returns (batch, length, width)."""
    batch, length = tokens.shape
    hidden = encoder.shared(tokens)
    for block in encoder.t5_blocks:
        attention = block.attention.SelfAttention
        normed = block.attention.layer_norm(hidden)
        query, key, value = (
            layer(normed).reshape(batch, length, 64, 64).transpose(0, 2, 1, 3)
            for layer in (attention.q, attention.k, attention.v)
        )
        scores = query @ key.swapaxes(-1, -2) + attention._compute_bias(length)
        mixed = fast_softmax(scores) @ value
        hidden = hidden + attention.o(mixed.transpose(0, 2, 1, 3).reshape(batch, length, 4096))
        hidden = block.ff(hidden)
    texts: mx.array = encoder.final_layer_norm(hidden)
    return texts


def encode_clip(encoder: Any, tokens: mx.array) -> mx.array:
    """Returns (batch, width), what the last token has read."""
    model = encoder.text_model
    for layer in model.encoder.layers:
        layer.self_attn.batch_size = len(tokens)
    hidden = model.embeddings(tokens)
    mask = model.create_causal_attention_mask(hidden.shape)
    hidden = model.final_layer_norm(model.encoder(hidden, mask))
    end = mx.argmax(tokens, axis=-1)
    return mx.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]


def predict(  # noqa: PLR0917
    transformer: Any,
    tokens: mx.array,
    sigmas: mx.array,
    texts: mx.array,
    pooled: mx.array,
    rotary: mx.array,
) -> mx.array:
    """Returns noise minus picture (batch, tokens, 64)."""
    hidden = mx.concatenate(
        [transformer.context_embedder(texts), transformer.x_embedder(tokens)], axis=1
    )
    cos, sin = (mx.repeat(rotary[0, 0, :, :, part, 0], 2, axis=-1) for part in (0, 1))
    conditioning = transformer.time_text_embed(sigmas * 1000, pooled, sigmas)
    for block in transformer.single_transformer_blocks:
        hidden = _single_block(block, hidden, conditioning, (cos, sin))
    hidden = transformer.norm_out(hidden[:, texts.shape[1] :], conditioning)
    predicted: mx.array = transformer.proj_out(hidden)
    return predicted


def _single_block(
    block: Any, hidden: mx.array, conditioning: mx.array, rotary: tuple[mx.array, mx.array]
) -> mx.array:
    """mflux's SingleTransformerBlock for CPUs. GELU and softmax of mlx, and copying the parts of
    one product for all heads, take longer there than all matrices."""
    batch, length, width = hidden.shape
    normed, gate = block.norm(hidden_states=hidden, text_embeddings=conditioning)
    normed = normed.reshape(-1, width)
    attn, out = block.attn, block.proj_out
    inner = fast_gelu(_linear(block.proj_mlp, normed))
    mixed = mx.addmm(out.bias, inner, out.weight[:, width:].T)
    for start in range(0, width, attn.head_dimension):
        rows = slice(start, start + attn.head_dimension)
        query, key, value = (
            _linear(layer, normed, rows).reshape(batch, length, -1)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = _turned(attn.norm_q(query), *rotary), _turned(attn.norm_k(key), *rotary)
        seen = attn.mixed(query[:, None], key[:, None], value[:, None])
        mixed = mx.addmm(mixed, seen.reshape(batch * length, -1), out.weight[:, rows].T)
    result: mx.array = hidden + gate[:, None] * mixed.reshape(batch, length, width)
    return result


def _linear(layer: Any, values: mx.array, rows: slice = slice(None)) -> mx.array:
    return mx.addmm(layer.bias[rows], values, layer.weight[rows].T)


def _turned(values: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotary embedding of (batch, length, width). A product that swaps the values of each pair is
    quicker than taking them apart."""
    width = values.shape[-1]
    swap = np.zeros((width, width), np.float32)
    even = np.arange(0, width, 2)
    swap[even + 1, even], swap[even, even + 1] = -1, 1
    return values * cos + (values @ mx.array(swap)) * sin


def rotary_table(transformer: Any, height: int, width: int, text_length: int) -> mx.array:
    """Returns the rotary embeddings for a size in pixels; the attention notes this size."""
    ids = mx.concatenate(
        [
            transformer._prepare_text_ids(text_length),
            transformer._prepare_latent_image_ids(height, width),
        ],
        axis=1,
    )
    table: mx.array = transformer.pos_embed(ids)
    return table
