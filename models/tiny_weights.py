"""Parts of the tiny checkpoints: random weights from fixed seeds, tokenizers of single bytes."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

WIDTH = 64  # of every Linear and Embedding input, or a multiple: mlx quantizes in groups of 64
VAE_CHANNELS = 4  # between latents and picture: at 1024 x 1024 most of the work is done there
LATENT_CHANNELS, FLUX2_LATENT_CHANNELS = 16, 32
PATCH = 2 * 2  # latent pixels in one transformer token
TIMESTEP_WIDTH = 256  # sines and cosines, fixed in mflux
CLIP_LAYERS = 2  # kept of 12
CLIP_LENGTH = 77  # tokens, fixed in mflux
QWEN3_LAYERS = 27  # the least: klein reads the hidden states after layers 9, 18 and 27
QWEN3_STRIDE = 9  # slim() keeps one layer before each of the three
LORA_RANK = 4
SIGLIP_WIDTH = 1152  # fixed in mflux
SIGLIP_SIDE = 7  # pixels of a patch that are looked at; the least that gives mflux its 27 x 27

# GPT-2's printable stand-ins for the 256 bytes. The vocabularies hold them and no merges, so every
# text can be written in tokens, one for each byte.
BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]
QWEN_VOCABULARY = [*BYTES, "<|endoftext|>"]
# CLIP marks the last byte of a word, and its pooling finds the end of the prompt by the highest id.
CLIP_VOCABULARY = [
    *BYTES,
    *(f"{byte}</w>" for byte in BYTES),
    "<|startoftext|>",
    "<|endoftext|>",
]
T5_VOCABULARY = ["<pad>", "</s>", "<unk>"]
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


class Weights:
    """The arrays of one component, drawn in order from one stream.

    The draws are uniform, so the bytes are the same on every machine.
    """

    def __init__(self, seed: int, biases: bool) -> None:
        self.arrays: dict[str, NDArray[np.float32]] = {}
        self._random = np.random.default_rng(seed)
        self._biases = biases

    def embedding(self, name: str, rows: int, width: int = WIDTH) -> None:
        self._add(name, self._draw(rows, width))

    def norm(
        self, name: str, width: int = WIDTH, *, scale: float = 1, bias: bool | None = None
    ) -> None:
        weight = np.full(width, scale, np.float32)
        self._add(name, weight, self._biases if bias is None else bias)

    def linear(
        self,
        name: str,
        inputs: int = WIDTH,
        outputs: int = WIDTH,
        *,
        gain: float = 1,
        bias: bool | None = None,
    ) -> None:
        bias = self._biases if bias is None else bias
        self._add(name, self._draw(outputs, inputs, deviation=gain / inputs**0.5), bias)

    def conv(
        self,
        name: str,
        inputs: int,
        outputs: int,
        *,
        side: int = 3,
        frames: int = 0,
        gain: float = 1,
    ) -> None:
        self.blur(
            name,
            self._draw(outputs, inputs, deviation=gain / inputs**0.5),
            side=side,
            frames=frames,
        )

    def blur(self, name: str, mix: NDArray[np.float32], *, side: int = 3, frames: int = 0) -> None:
        """A convolution that mixes channels by a matrix (outputs, inputs) and blurs space.

        The blur makes clouds of the noise, and lets the shapes of an input image survive. Of
        several frames, for the video VAEs, it looks at the last: the others are padding.
        """
        row = np.array({1: [1], 3: [1, 2, 1]}[side], np.float32)
        kernel = np.outer(row, row) / row.sum() ** 2
        weight = mix[:, None, None, :] * kernel[None, :, :, None]
        if frames:
            weight = np.stack([*[np.zeros_like(weight)] * (frames - 1), weight], axis=1)
        self._add(name, weight, self._biases)

    def patches(self, name: str, outputs: int, side: int) -> None:
        """A convolution that sees squares of a picture."""
        inputs = side * side * 3
        weight = self._draw(outputs, side, side, 3, deviation=inputs**-0.5)
        self._add(name, weight, self._biases)

    def parameter(self, name: str, value: NDArray[np.float32], gain: float) -> None:
        """A parameter as mflux builds it. Its shape says what it is: matrices and kernels get new
        values; factors of a norm stay as they are, and biases become 0."""
        if value.ndim > 1:
            deviation = gain / math.prod(value.shape[1:]) ** 0.5
            self.arrays[name] = self._draw(*value.shape, deviation=deviation)
        else:
            self.arrays[name] = np.zeros_like(value) if name.endswith("bias") else value

    def raw(self, name: str, *shape: int) -> None:
        """An array that is no layer's weight."""
        self.arrays[name] = self._draw(*shape)

    def _draw(self, *shape: int, deviation: float = 1) -> NDArray[np.float32]:
        limit = np.float32(deviation * 3**0.5)
        return limit * (2 * self._random.random(shape, np.float32) - 1)

    def _add(self, name: str, weight: NDArray[np.float32], bias: bool = False) -> None:
        self.arrays[f"{name}.weight"] = weight
        if bias:
            self.arrays[f"{name}.bias"] = np.zeros(len(weight), np.float32)


@contextmanager
def component(folder: Path, *, seed: int, biases: bool) -> Iterator[Weights]:
    weights = Weights(seed, biases)
    yield weights
    folder.mkdir(parents=True, exist_ok=True)
    # The metadata says that the names are mflux's own. A single entry, because safetensors
    # writes several in random order.
    save_file(weights.arrays, folder / "0.safetensors", {"quantization_level": "None"})


def save_lora(path: Path, weights: Weights) -> None:
    arrays = {name: array * np.float32(0.2) for name, array in weights.arrays.items()}
    save_file(arrays, path)


def model_config(name: str, **particulars: Any) -> dict[str, Any]:
    """Returns keyword arguments of mflux's ModelConfig for a model that is built here."""
    return {
        "priority": 1000,
        "base_model": None,
        "controlnet_model": None,
        "custom_transformer_model": None,
        "num_train_steps": 1000,
        "aliases": [name],
        "model_name": name,
        **particulars,
    }


def byte_pairs(vocabulary: list[str]) -> dict[str, Any]:
    ids = {token: number for number, token in enumerate(vocabulary)}
    return {"type": "BPE", "vocab": ids, "merges": []}


def unigrams(vocabulary: list[str]) -> dict[str, Any]:
    """A model of whole pieces; the third stands for those that are unknown."""
    return {"type": "Unigram", "unk_id": 2, "vocab": [(piece, 0.0) for piece in vocabulary]}


def write_tokenizer(
    folder: Path,
    model: dict[str, Any],
    config: dict[str, Any],
    special: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Args:
    special: tokens that are not made of bytes, with their numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": n, "content": text, "special": True, **flags} for text, n in special.items()]
    if special:
        model = {**model, "vocab": {**model["vocab"], **special}}
    document = {"version": "1.0", "added_tokens": added, "model": model}
    for name, content in (("tokenizer.json", document), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
