"""Attention whose cost grows with the pixels of a picture and not with their square.

Up to 16 x 16 tokens (256 x 256 pixels) it is FLUX.1's. In larger pictures, blocks take turns: one
sees the whole picture as at most 12 x 12 means of keys and values, the next one sees its own window
of at most 16 x 16 tokens. All see the text, and the text sees every token. Both have no weights of
their own.
"""

import math
from typing import Any

import mlx.core as mx
import numpy as np
from mflux.models.flux.model.flux_transformer.common.attention_utils import AttentionUtils
from mlx import nn
from mlx.core.fast import scaled_dot_product_attention
from numpy.typing import NDArray

from models.painter.functions import fast_softmax

SPAN = 16  # tokens in a row or column that a query sees at once
CELLS = 12  # means in a row or column of a large picture

Indices = NDArray[np.int64]


class RelativePositions(nn.Module):  # type: ignore[misc]
    """Rotary embedding of rows and columns; it has no weights.

    Half of the angles depend on the place in the picture from edge to edge, so that a layout is the
    same at all sizes; the other half on the distance in tokens, for details. Texts are where the
    first token is, as in FLUX.1.
    """

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self._pairs = head_width // 8  # of two values, for each axis and kind of angle
        self.text_length = self.rows = self.columns = 0  # of the latest call

    def __call__(self, ids: mx.array) -> mx.array:
        places = np.array(ids)[0, :, 1:]
        # The first token of the picture is at 0, 0, as those of the text are.
        self.text_length = int((places == 0).all(axis=1).sum()) - 1
        self.rows, self.columns = (int(count) + 1 for count in places.max(axis=0))
        steps = np.arange(self._pairs) / max(self._pairs - 1, 1)
        turns, per_token = 0.25 * 40.0**steps, 1.5 * 0.08**steps
        angles = []
        for axis, count in enumerate((self.rows, self.columns)):
            fromcentre = places[:, axis] - (count - 1) / 2
            angles.append(fromcentre[:, None] / count * turns * (2 * math.pi))
            angles.append(fromcentre[:, None] * per_token)
        angle = np.concatenate(angles, axis=1)
        cos, sin = np.cos(angle), np.sin(angle)
        table = np.stack([cos, -sin, sin, cos], axis=-1).astype(np.float32)
        return mx.array(table.reshape(1, 1, len(places), -1, 2, 2))


class SpanAttention(nn.Module):  # type: ignore[misc]
    """Takes the layers of mflux's SingleBlockAttention, under their names."""

    def __init__(self, attention: Any, positions: RelativePositions, *, windows: bool) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.norm_q, self.norm_k = attention.norm_q, attention.norm_k
        self.num_heads, self.head_dimension = attention.num_heads, attention.head_dimension
        self._shape_of = [positions]  # in a list: it is not a part of this module
        self._windows = windows

    def __call__(self, hidden_states: mx.array, image_rotary_emb: mx.array) -> mx.array:
        query, key, value = AttentionUtils.process_qkv(
            hidden_states=hidden_states,
            to_q=self.to_q,
            to_k=self.to_k,
            to_v=self.to_v,
            norm_q=self.norm_q,
            norm_k=self.norm_k,
            num_heads=self.num_heads,
            head_dim=self.head_dimension,
        )
        query, key = AttentionUtils.apply_rope(xq=query, xk=key, freqs_cis=image_rotary_emb)
        mixed = self.mixed(query, key, value)
        batch, _, length, _ = mixed.shape
        return mixed.transpose(0, 2, 1, 3).reshape(batch, length, -1)

    def mixed(self, query: mx.array, key: mx.array, value: mx.array) -> mx.array:
        """Takes and returns (batch, heads, length, width)."""
        shape = self._shape_of[0]
        if max(shape.rows, shape.columns) <= SPAN:
            return _attend(query, key, value)
        length = shape.text_length
        text = _attend(query[:, :, :length], key, value)
        if self._windows:
            picture = _attend_in_windows(query, key, value, shape)
        else:
            means = (_pooled(array, shape) for array in (key, value))
            picture = _attend(query[:, :, length:], *means)
        return mx.concatenate([text, picture], axis=2)


def _attend(query: mx.array, key: mx.array, value: mx.array) -> mx.array:
    scale = query.shape[-1] ** -0.5
    if mx.default_device().type == mx.DeviceType.cpu:
        return fast_softmax((query * scale) @ key.swapaxes(-1, -2)) @ value
    return scaled_dot_product_attention(query, key, value, scale=scale)


def _pooled(array: mx.array, shape: RelativePositions) -> mx.array:
    text, picture = _split(array, shape)
    for axis, count in ((2, shape.rows), (3, shape.columns)):
        cells = math.ceil(count / math.ceil(count / CELLS))
        pieces = _pieces(count, cells)
        picture = _taken(picture, pieces, axis).mean(axis + 1)
    batch, heads, rows, columns, width = picture.shape
    return mx.concatenate([text, picture.reshape(batch, heads, rows * columns, width)], axis=2)


def _attend_in_windows(
    query: mx.array, key: mx.array, value: mx.array, shape: RelativePositions
) -> mx.array:
    row_pieces = _pieces(shape.rows, math.ceil(shape.rows / SPAN))
    column_pieces = _pieces(shape.columns, math.ceil(shape.columns / SPAN))
    windows = len(row_pieces) * len(column_pieces)
    parts = []
    for array in (query, key, value):
        text, picture = _split(array, shape)
        picture = _taken(_taken(picture, column_pieces, 3), row_pieces, 2)
        batch, heads, *_, width = picture.shape
        # batch, heads, windows down, rows, windows across, columns, width
        picture = picture.transpose(0, 2, 4, 1, 3, 5, 6).reshape(batch * windows, heads, -1, width)
        if array is not query:
            picture = mx.concatenate([mx.repeat(text, windows, axis=0), picture], axis=2)
        parts.append(picture)
    picture = _attend(*parts).reshape(
        batch, len(row_pieces), len(column_pieces), heads, row_pieces.shape[1], -1, width
    )
    picture = picture.transpose(0, 3, 1, 4, 2, 5, 6)
    batch, heads, _, _, across, columns, width = picture.shape
    picture = picture.reshape(batch, heads, -1, across * columns, width)
    picture = mx.take(picture, mx.array(_places(row_pieces)), axis=2)
    picture = mx.take(picture, mx.array(_places(column_pieces)), axis=3)
    return picture.reshape(batch, heads, -1, width)


def _split(array: mx.array, shape: RelativePositions) -> tuple[mx.array, mx.array]:
    batch, heads, _, width = array.shape
    text, picture = array[:, :, : shape.text_length], array[:, :, shape.text_length :]
    return text, picture.reshape(batch, heads, shape.rows, shape.columns, width)


def _pieces(count: int, parts: int) -> Indices:
    """Returns parts of equal length (parts, length) that cover 0 to count - 1. They overlap where
    `count` is no multiple of `parts`."""
    length = math.ceil(count / parts)
    starts = np.round(np.linspace(0, count - length, parts)).astype(np.int64)
    return starts[:, None] + np.arange(length)


def _places(pieces: Indices) -> Indices:
    """Returns where each index stands in the pieces, read in order."""
    flat = pieces.reshape(-1)
    places = np.zeros(flat.max() + 1, np.int64)
    places[flat] = np.arange(len(flat))
    return places


def _taken(array: mx.array, pieces: Indices, axis: int) -> mx.array:
    """Returns the array with two axes, (parts, length), in place of one."""
    taken = mx.take(array, mx.array(pieces.reshape(-1)), axis=axis)
    return taken.reshape(*array.shape[:axis], *pieces.shape, *array.shape[axis + 1 :])
