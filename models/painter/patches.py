"""The fixed linear transform between pictures and latents: 8 x 8 pixels to 16 channels and back.

It is fitted, not trained: the encoder takes principal components, the decoder is the least squares
estimate of 8 x 8 pixels from 3 x 3 latent pixels. As weights of mflux's VAE:

    encoder  three convolutions of stride 2 that move pixels to channels; the last one projects
    decoder  one convolution of 3 x 3 latent pixels, then channels are moved to pixels

mflux applies SiLU before the last layer. silu(x) - silu(-x) = x, so each value is given twice, with
both signs, and the layer takes their difference.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE, CHANNELS = 8, 16
VALUES = SIDE * SIDE * 3
# Latents with the variances of the principal components would drown details in noise; with equal
# variances, details would cost as much of the model as the scene.
_WHITENING = 0.5
_SCALING, _SHIFT = 0.3611, 0.1159  # of mflux's VAE class

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Patches:
    """`projection` (16, 192) after subtracting `mean` (192); `estimate` (16 * 9 + 1, 192)."""

    mean: Array
    projection: Array
    estimate: Array

    def encode(self, pixels: Array) -> Array:
        """Returns latents (batch, rows, columns, 16).

        Args:
            pixels: (batch, height, width, 3), from -1 to 1.
        """
        return np.asarray((_cells(pixels) - self.mean) @ self.projection.T, np.float32)

    def decode(self, latents: Array) -> Array:
        """Returns pixels of latents."""
        cells = _neighbours(latents) @ self.estimate
        batch, rows, columns, _ = cells.shape
        squares = cells.reshape(batch, rows, columns, SIDE, SIDE, 3).transpose(0, 1, 3, 2, 4, 5)
        return squares.reshape(batch, rows * SIDE, columns * SIDE, 3)


def fit(batches: list[Array]) -> Patches:
    """Returns the transform for pictures like these: batches of one size each, values -1 to 1."""
    cells = np.concatenate([_cells(batch).reshape(-1, VALUES) for batch in batches])
    mean = cells.mean(0)
    variances, vectors = np.linalg.eigh(np.cov((cells - mean).T.astype(np.float64)))
    variances, vectors = variances[::-1][:CHANNELS], vectors[:, ::-1][:, :CHANNELS]
    vectors = vectors * np.sign(vectors.sum(0) + 1e-9)  # eigenvectors have no sign of their own
    scales = variances ** (-_WHITENING / 2)
    scales /= np.sqrt(np.mean(variances * scales**2))  # 1 is the mean variance of the latents
    projection = (vectors * scales).T.astype(np.float32)
    draft = Patches(mean.astype(np.float32), projection, np.zeros((1, 1), np.float32))

    size = CHANNELS * 9 + 1
    squares, products = np.zeros((size, size)), np.zeros((size, VALUES))
    for batch in batches:
        inputs = _neighbours(draft.encode(batch)).reshape(-1, size).astype(np.float64)
        squares += inputs.T @ inputs
        products += inputs.T @ _cells(batch).reshape(-1, VALUES)
    ridge = np.trace(squares) / size * 1e-6 * np.eye(size)
    estimate = np.linalg.solve(squares + ridge, products).astype(np.float32)
    return Patches(draft.mean, projection, estimate)


def vae_weights(patches: Patches) -> dict[str, Array]:
    """Returns the weights of mflux's VAE class, after narrowing."""
    weights: dict[str, Array] = {}
    encoder, decoder = "encoder", "decoder"
    weights[f"{encoder}.conv_in.conv2d.weight"] = _centre(np.eye(3, dtype=np.float32))
    weights[f"{encoder}.conv_in.conv2d.bias"] = np.zeros(3, np.float32)
    for number, channels in ((0, 3), (1, 12)):
        name = f"{encoder}.down_blocks.{number}.downsamplers.0.conv"
        weights[f"{name}.weight"] = _taps(np.eye(4 * channels, dtype=np.float32))
        weights[f"{name}.bias"] = np.zeros(4 * channels, np.float32)
    ordered = patches.projection.reshape(CHANNELS, 2, 2, 2, 2, 2, 2, 3)  # y: 4, 2, 1; x: 4, 2, 1
    ordered = ordered.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(CHANNELS, VALUES)
    offset = -patches.projection @ patches.mean
    name = f"{encoder}.down_blocks.2.downsamplers.0.conv"
    weights[f"{name}.weight"] = _taps(np.concatenate([ordered, -ordered]))
    weights[f"{name}.bias"] = np.concatenate([offset, -offset])
    both = np.concatenate([np.eye(CHANNELS), -np.eye(CHANNELS)], axis=1) / _SCALING
    means = np.concatenate([both, np.zeros_like(both)])  # no variances
    weights[f"{encoder}.conv_out.conv2d.weight"] = _centre(means.astype(np.float32))
    shift = np.concatenate([np.full(CHANNELS, _SHIFT), np.zeros(CHANNELS)])
    weights[f"{encoder}.conv_out.conv2d.bias"] = shift.astype(np.float32)

    kernel = patches.estimate[:-1].reshape(3, 3, CHANNELS, VALUES).transpose(3, 0, 1, 2) * _SCALING
    # mflux adds its shift to the latents; the padding of the convolution stays 0.
    bias = patches.estimate[-1] - kernel.sum((1, 2, 3)) * _SHIFT
    numbers = np.arange(VALUES).reshape(SIDE * SIDE, 3)
    order = np.concatenate([numbers, numbers + VALUES], axis=1).reshape(-1)
    weights[f"{decoder}.conv_in.conv2d.weight"] = np.concatenate([kernel, -kernel])[order]
    weights[f"{decoder}.conv_in.conv2d.bias"] = np.concatenate([bias, -bias])[order]
    difference = np.concatenate([np.eye(3), -np.eye(3)], axis=1).astype(np.float32)
    weights[f"{decoder}.conv_out.conv2d.weight"] = _centre(difference)
    weights[f"{decoder}.conv_out.conv2d.bias"] = np.zeros(3, np.float32)
    return {name: np.ascontiguousarray(array, np.float32) for name, array in weights.items()}


def _cells(pixels: Array) -> Array:
    batch, height, width, _ = pixels.shape
    rows, columns = height // SIDE, width // SIDE
    squares = pixels.reshape(batch, rows, SIDE, columns, SIDE, 3).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(batch, rows, columns, VALUES)


def _neighbours(latents: Array) -> Array:
    """Returns each latent pixel with those around it, and a 1 for the constant."""
    _, rows, columns, _ = latents.shape
    padded = np.pad(latents, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, y : y + rows, x : x + columns] for y in range(3) for x in range(3)]
    ones = np.ones((*latents.shape[:3], 1), np.float32)
    return np.concatenate([*shifted, ones], axis=-1)


def _centre(matrix: Array) -> Array:
    """Returns a convolution of 3 x 3 that looks at one pixel."""
    kernel = np.zeros((len(matrix), 3, 3, matrix.shape[1]), np.float32)
    kernel[:, 1, 1] = matrix
    return kernel


def _taps(matrix: Array) -> Array:
    """Returns a convolution of stride 2 whose inputs are the four pixels of a square: rows of
    `matrix` are outputs, columns are (y, x, channel)."""
    outputs, inputs = matrix.shape
    kernel = np.zeros((outputs, 3, 3, inputs // 4), np.float32)
    kernel[:, :2, :2] = matrix.reshape(outputs, 2, 2, inputs // 4)
    return kernel
