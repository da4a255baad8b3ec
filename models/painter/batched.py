"""mflux's modules for batches of captions and noise levels, for training.

mflux calls them with one prompt and one noise level at a time, and some of them only work so. These
functions compute the same with the same layers; a test compares them.
"""

from typing import Any

import mlx.core as mx
from mlx import nn


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
        mixed = nn.softmax(scores, axis=-1) @ value
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
    conditioning = transformer.time_text_embed(sigmas * 1000, pooled, sigmas)
    for block in transformer.single_transformer_blocks:
        hidden = block(hidden_states=hidden, text_embeddings=conditioning, rotary_embeddings=rotary)
    hidden = transformer.norm_out(hidden[:, texts.shape[1] :], conditioning)
    predicted: mx.array = transformer.proj_out(hidden)
    return predicted


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
