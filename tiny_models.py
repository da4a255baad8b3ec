"""Two small random-weight checkpoints: for trying the API without a download, and for tests.

    tiny         FLUX.1 schnell    mflux's Flux1
    tiny-flux2   FLUX.2 klein      mflux's Flux2Klein and Flux2KleinEdit

Both are drawn from a fixed seed on first use, take about a megabyte on disk, and load through
mflux's own classes and loader, quantized or not. They paint abstract colour clouds which, as with
a trained model, depend on the prompt, the seed, the steps, the size and the input image, and are
the same on every repeat. (tiny reads the prompt as CLIP does: in lower case, up to 75 tokens. Here
a token is one byte.)

mflux fixes most sizes of these architectures in code. But neither its loader nor mlx compares the
shape of a stored weight with the module that receives it, and a weight that is not stored stays
lazy: it costs nothing until something evaluates it. So a checkpoint stores a few layers, all of
them narrow, and slim() takes the others out of the loaded model, which cannot run without it.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

RECIPE = 1  # part of the folder's name: raise it with every change to what is written

WIDTH = 64  # of every Linear and Embedding input, or a multiple: mlx quantizes in groups of 64
VAE_CHANNELS = 4  # between latents and picture: at 1024 x 1024 most of the work is done there
FLUX1_LATENT_CHANNELS, FLUX2_LATENT_CHANNELS = 16, 32
PATCH = 2 * 2  # latent pixels in one transformer token
CLIP_LAYERS = 2  # kept of 12
CLIP_LENGTH = 77  # tokens, fixed in mflux
T5_LENGTH = 8  # tokens, of 256: T5 acts through transformer blocks, and none is stored
QWEN3_LAYERS = 27  # the least: klein reads the hidden states after layers 9, 18 and 27
QWEN3_STRIDE = 9  # slim() keeps one layer before each of the three

# GPT-2's printable stand-ins for the 256 bytes. The vocabularies hold them and no merges, so every
# text can be written in tokens, one for each byte.
_BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]
_QWEN3_VOCABULARY = [*_BYTES, "<|endoftext|>"]
# CLIP marks the last byte of a word, and its pooling finds the end of the prompt by the highest id.
_CLIP_VOCABULARY = [
    *_BYTES,
    *(f"{byte}</w>" for byte in _BYTES),
    "<|startoftext|>",
    "<|endoftext|>",
]
_T5_VOCABULARY = ["<pad>", "</s>", "<unk>"]

_COMMON_CONFIG: dict[str, Any] = {
    "priority": 1000,
    "base_model": None,
    "controlnet_model": None,
    "custom_transformer_model": None,
    "num_train_steps": 1000,
}
# Keyword arguments of mflux's ModelConfig. model_path is the folder from ensure_checkpoint().
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_COMMON_CONFIG,
        "aliases": ["tiny"],
        "model_name": "tiny",
        "max_sequence_length": T5_LENGTH,
        "supports_guidance": False,
        "requires_sigma_shift": False,
    },
    "tiny-flux2": {
        **_COMMON_CONFIG,
        "aliases": ["tiny-flux2"],
        "model_name": "tiny-flux2",
        "max_sequence_length": 512,
        "supports_guidance": True,
        "requires_sigma_shift": True,
        "transformer_overrides": {
            "num_layers": 0,
            "num_single_layers": 1,
            "num_attention_heads": 1,
            "attention_head_dim": WIDTH,
            "axes_dims_rope": (WIDTH // 4,) * 4,
            "joint_attention_dim": 3 * WIDTH,
            "timestep_guidance_channels": WIDTH,
            "mlp_ratio": 1.0,
        },
        "text_encoder_overrides": {
            "vocab_size": len(_QWEN3_VOCABULARY),
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": QWEN3_LAYERS,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": WIDTH,
        },
    },
}
TINY_MODELS = tuple(TINY_CONFIGS)


def ensure_checkpoint(name: str, data_dir: Path) -> Path:
    """Return the folder of one of TINY_MODELS, building it when it is missing.

    The folder appears whole or not at all, and several processes may build it at once.
    """
    write = {"tiny": _write_flux1, "tiny-flux2": _write_flux2}[name]
    folder = data_dir / "tiny-models" / f"{name}-v{RECIPE}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        draft = Path(scratch, folder.name)
        write(draft)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise  # otherwise another process was first, with the same bytes
    return folder


def slim(model: Any) -> None:
    """Take out of a loaded Flux1, Flux2Klein or Flux2KleinEdit what its checkpoint does not store.

    Call it once, on the thread that loaded the model, after loading (and quantizing) and before
    anything evaluates the parameters: in FLUX.1 the missing layers would fill 18 GB.
    """
    vae = model.vae
    is_flux1 = hasattr(model, "clip_text_encoder")
    # FLUX.1 calls these layers by index, FLUX.2 loops over them. The work of attention in the
    # middle grows with the fourth power of the picture's side.
    for half in (vae.encoder, vae.decoder):
        half.mid_block.attentions = [_unchanged] if is_flux1 else []
    for block in (*vae.encoder.down_blocks, *vae.decoder.up_blocks):
        block.resnets = [_unchanged for _ in block.resnets] if is_flux1 else []
    for module in vae.modules():
        if hasattr(module, "num_groups"):  # GroupNorm, 32 groups in code
            module.num_groups = 1

    if is_flux1:
        model.transformer.norm_out.embedding_dim = WIDTH  # 3072 in code
        model.t5_text_encoder.t5_blocks = []
        clip = model.clip_text_encoder.text_model.encoder
        clip.layers = clip.layers[:CLIP_LAYERS]
        for layer in clip.layers:
            layer.self_attn.num_heads = WIDTH // layer.self_attn.head_dimension  # 12 in code
    else:
        model.text_encoder.layers = [
            _unchanged_without_cache if number % QWEN3_STRIDE else layer
            for number, layer in enumerate(model.text_encoder.layers)
        ]


def _unchanged(hidden_states: Any) -> Any:
    return hidden_states


def _unchanged_without_cache(hidden_states: Any, *_: Any, **__: Any) -> tuple[Any, None]:
    return hidden_states, None


class _Weights:
    """The arrays of one component, drawn in order from one stream.

    The draws are uniform, so the bytes are the same on every machine.
    """

    def __init__(self, seed: int, biases: bool) -> None:
        self.arrays: dict[str, NDArray[np.float32]] = {}
        self._random = np.random.default_rng(seed)
        self._biases = biases

    def embedding(self, name: str, rows: int) -> None:
        self._add(name, self._draw(rows, WIDTH, 1))

    def norm(self, name: str, width: int = WIDTH) -> None:
        self._add(name, np.ones(width, np.float32), self._biases)

    def linear(self, name: str, inputs: int = WIDTH, outputs: int = WIDTH, gain: float = 1) -> None:
        self._add(name, self._draw(outputs, inputs, gain / inputs**0.5), self._biases)

    def conv(self, name: str, inputs: int, outputs: int, *, side: int = 3, gain: float = 1) -> None:
        self.blur(name, self._draw(outputs, inputs, gain / inputs**0.5), side=side)

    def blur(self, name: str, mix: NDArray[np.float32], *, side: int = 3) -> None:
        """A convolution that mixes channels by a matrix (outputs, inputs) and blurs space.

        The blur makes clouds of the noise, and lets the shapes of an input image survive.
        """
        row = np.array({1: [1], 3: [1, 2, 1]}[side], np.float32)
        kernel = np.outer(row, row) / row.sum() ** 2
        self._add(name, mix[:, None, None, :] * kernel[None, :, :, None], self._biases)

    def _draw(self, rows: int, columns: int, deviation: float) -> NDArray[np.float32]:
        limit = np.float32(deviation * 3**0.5)
        return limit * (2 * self._random.random((rows, columns), np.float32) - 1)

    def _add(self, name: str, weight: NDArray[np.float32], bias: bool = False) -> None:
        self.arrays[f"{name}.weight"] = weight
        if bias:
            self.arrays[f"{name}.bias"] = np.zeros(len(weight), np.float32)


@contextmanager
def _component(folder: Path, *, seed: int, biases: bool) -> Iterator[_Weights]:
    weights = _Weights(seed, biases)
    yield weights
    folder.mkdir(parents=True)
    # The metadata tells mflux that the names are its own. A single entry, because safetensors
    # writes several in random order.
    save_file(weights.arrays, folder / "0.safetensors", {"quantization_level": "None"})


def _write_flux1(folder: Path) -> None:
    with _component(folder / "vae", seed=1, biases=True) as weights:
        _add_vae(weights, FLUX1_LATENT_CHANNELS, conv=".conv2d", norm=".norm")

    with _component(folder / "transformer", seed=2, biases=True) as weights:
        # No block: mflux builds as many as are stored, and a real one has 140 million weights.
        weights.linear("x_embedder", FLUX1_LATENT_CHANNELS * PATCH)
        weights.linear("context_embedder")
        for embedder, inputs in (("timestep_embedder", 256), ("text_embedder", WIDTH)):
            weights.linear(f"time_text_embed.{embedder}.linear_1", inputs, gain=2)
            weights.linear(f"time_text_embed.{embedder}.linear_2", gain=2)
        weights.linear("norm_out.linear", outputs=2 * WIDTH)
        weights.linear("proj_out", outputs=FLUX1_LATENT_CHANNELS * PATCH)

    with _component(folder / "text_encoder", seed=3, biases=True) as weights:  # CLIP
        weights.embedding("text_model.embeddings.token_embedding", len(_CLIP_VOCABULARY))
        weights.embedding("text_model.embeddings.position_embedding", CLIP_LENGTH)
        for number in range(CLIP_LAYERS):
            layer = f"text_model.encoder.layers.{number}"
            for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                weights.linear(f"{layer}.self_attn.{projection}", gain=2)
            for part in (1, 2):
                weights.linear(f"{layer}.mlp.fc{part}")
                weights.norm(f"{layer}.layer_norm{part}")
        weights.norm("text_model.final_layer_norm")

    with _component(folder / "text_encoder_2", seed=4, biases=False) as weights:  # T5
        weights.embedding("shared", len(_T5_VOCABULARY))
        weights.norm("final_layer_norm")

    _write_tokenizer(folder / "tokenizer", _byte_pairs(_CLIP_VOCABULARY), {})
    pieces = {"type": "Unigram", "unk_id": 2, "vocab": [(piece, 0.0) for piece in _T5_VOCABULARY]}
    _write_tokenizer(folder / "tokenizer_2", pieces, {"extra_ids": 0})


def _write_flux2(folder: Path) -> None:
    with _component(folder / "vae", seed=5, biases=True) as weights:
        _add_vae(weights, FLUX2_LATENT_CHANNELS, conv="", norm="")
        weights.conv("quant_conv", 2 * FLUX2_LATENT_CHANNELS, 2 * FLUX2_LATENT_CHANNELS, side=1)
        weights.conv("post_quant_conv", FLUX2_LATENT_CHANNELS, FLUX2_LATENT_CHANNELS, side=1)

    with _component(folder / "transformer", seed=6, biases=False) as weights:
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
            weights.norm(f"{block}.{norm}")
        weights.linear("norm_out.linear", outputs=2 * WIDTH)
        weights.linear("proj_out", outputs=FLUX2_LATENT_CHANNELS * PATCH)

    with _component(folder / "text_encoder", seed=7, biases=False) as weights:  # Qwen3
        weights.embedding("embed_tokens", len(_QWEN3_VOCABULARY))
        for number in range(0, QWEN3_LAYERS, QWEN3_STRIDE):
            layer = f"layers.{number}"
            for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
                weights.linear(f"{layer}.self_attn.{projection}", gain=3)
            for projection in ("gate_proj", "up_proj", "down_proj"):
                weights.linear(f"{layer}.mlp.{projection}")
            for norm in ("input_layernorm", "post_attention_layernorm"):
                weights.norm(f"{layer}.{norm}")
            for norm in ("q_norm", "k_norm"):
                weights.norm(f"{layer}.self_attn.{norm}")
        weights.norm("norm")

    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    vocabulary = _byte_pairs(_QWEN3_VOCABULARY)
    _write_tokenizer(folder / "tokenizer", vocabulary, {"chat_template": template})


def _add_vae(weights: _Weights, latent_channels: int, *, conv: str, norm: str) -> None:
    """Add both halves. conv and norm: how FLUX.1 names the layers that it wraps in a module."""
    for half, inputs, sampler in (
        ("encoder", 3, "down_blocks.{}.downsamplers.0"),
        ("decoder", latent_channels, "up_blocks.{}.upsamplers.0"),
    ):
        weights.conv(f"{half}.conv_in{conv}", inputs, VAE_CHANNELS)
        for number in range(3):
            unmixed = np.eye(VAE_CHANNELS, dtype=np.float32)
            weights.blur(f"{half}.{sampler.format(number)}.conv", unmixed)
        for number in range(2):
            resnet = f"{half}.mid_block.resnets.{number}"
            for part in (1, 2):
                weights.norm(f"{resnet}.norm{part}", VAE_CHANNELS)
                weights.conv(f"{resnet}.conv{part}", VAE_CHANNELS, VAE_CHANNELS)
        weights.norm(f"{half}.conv_norm_out{norm}", VAE_CHANNELS)
    # Mean and variance; strong, so that an input image holds its own against the noise.
    weights.conv(f"encoder.conv_out{conv}", VAE_CHANNELS, 2 * latent_channels, gain=3)
    # Rows of a Hadamard matrix: red, green and blue vary independently around grey.
    colours = np.array([[1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], np.float32)
    weights.blur(f"decoder.conv_out{conv}", colours * np.float32(0.5))


def _byte_pairs(vocabulary: list[str]) -> dict[str, Any]:
    ids = {token: number for number, token in enumerate(vocabulary)}
    return {"type": "BPE", "vocab": ids, "merges": []}


def _write_tokenizer(folder: Path, model: dict[str, Any], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    document = {"version": "1.0", "added_tokens": [], "model": model}
    for name, content in (("tokenizer.json", document), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
