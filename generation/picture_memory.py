"""Memory that a picture takes beside the weights: arithmetic only, in bytes.

A picture is encoded, denoised and decoded one after the other, so it takes the most of the three:

    encoding        of the text: tokens x width x (TEXT_VALUES + kept layers), and the mask of its
                    attention; of pictures, one at a time: pixels x encoder_bytes
    denoising       tokens x width x ACTIVATION_BYTES
                    of Ideogram 4 also, for text and picture: tokens x features x FEATURE_BYTES
    decoding        pixels x decoder_bytes, of the picture or of one tile; and the finished picture

Without a GPU, attention scores are added to the first two.

Sources, all of mflux 0.24's READMEs, measured on Apple Silicon (peak beside the weights):

- Qwen VAE (Anima, Krea 2, Qwen-Image): 8.7 GB at 1024 x 1024.
- FLUX.1's VAE decoded whole: 7.3 GB with 0.17 GB of weights. FLUX.1 and Boogu have it.
- Row strips of 128 rows (FLUX.2, FLUX 3, Z-Image, ERNIE, FIBO 2, Ideogram 4, Lens): 1.6 GB at 1024
  x 1024, 5.6 GB at 2048 x 2048, with 0.17 GB of weights. FIBO 2 took 13.8 GB before it had strips.
- FLUX.2's decoder on the whole picture: 10.3 GB at 1024 x 1024. MOSS has it.
- Ming: 9.8 GB at 512 x 512, 14.5 GB at 1024 x 1024.
- Denoising: Anima 1.1 GB for 4096 tokens of the picture and 512 of the text, width 2048; FLUX.2
  klein 9B, width 4096, 3.2 GB more at 2048 x 2048 than at 1024 x 1024.
- FLUX.2's small decoder takes 1.2 GB for 1.6 GB, 4.3 GB for 5.6 GB.
- Ming with low_ram: 72 of 100 bytes of its weights are of the text encoder (2 bytes for each of the
  6.4 billion parameters of the others, of 46 GB without the unused vision model).

Text encoding: Anima's encoder (Qwen3-0.6B in 32 bits) with 100 to 4096 tokens on a CPU, in
benchmarks/results/real_size.md. Widths and kept layers of the others are those in mflux's source.

Ideogram 4 encodes a token for each one of the picture as well, and gives its transformers the
results of 13 layers in 32 bits: measured on a CPU with mflux's classes, of width 256 and 512, with
1224 to 4296 tokens.

No README says what the decoders of FIBO, Qwen-Image 2.1 and SeedVR2 take: these figures are
those of the Qwen VAE, times the ratio of the two that MLX counted when both decoded 128 x 128
pixels on a CPU.

Encoding a picture: the encoders of FLUX.1, FLUX.2, FIBO and Qwen-Image in 32 bits on a CPU, with
128 to 384 pixels a side (benchmarks/results/real_size.md). Where the decoder works in strips, the
encoder does not.

Without a GPU, MLX's convolutions copy their input nine times, and its attention holds all scores:
see Cpu.

Previews take nothing that counts: 20 bytes for each of the 64 pixels of a latent.
"""

from collections.abc import Callable
from math import sqrt
from typing import NamedTuple

from models.prompt_tokens import not_counted, tokens
from task import Stage

TEXT_TOKENS = 512
"""The least that a transformer gets: most families fill the prompt up to it."""
TEXT_VALUES = 49.0
"""Activations of a text encoder, of a token and for each unit of its width."""
MASK_BYTES = 8.0
"""Of a pair of tokens of the text."""
ACTIVATION_BYTES = 90.0
"""Of a token, for each unit of the transformer's width."""
FINISHED_BYTES = 30.0
"""Of a pixel: the decoded picture in 32 bits, its sum and weights while tiles are put together,
8-bit copies."""


class FeatureBytes(NamedTuple):
    """Of one of Architecture.features, for each token of the text and of the picture."""

    encoding: float = 12.0
    """While the results of the layers become one array."""
    denoising: float = 29.0
    """While both transformers bring them to their own width."""
    kept: float = 8.0
    """While they draw."""


FEATURE_BYTES = FeatureBytes()
HEAD_WIDTH = 128
SMALL_DECODER = 0.76
"""Memory of FLUX.2's small decoder / of its own one."""
RELEASED = 0.72
"""Share of a model's weights that mflux releases with low_ram when the text is encoded."""
ENCODER_SHARE, QWEN_ENCODER_SHARE = 0.45, 0.8
"""Memory of encoding a picture / of decoding it whole."""
TILES = (512, 256)
"""Sides of tiles in pixels, the first choice first. 512 is mflux's own."""


class Cpu(NamedTuple):
    """How much more a picture takes on a machine without a GPU, by measurements with MLX 0.32 on
    Linux."""

    decoding: float = 2.0
    decoding_bytes: float = 0.2e9
    """At any size."""
    strip_bytes: float = 128 * 9 * 256 * 4.0
    """Of a column: the copies of a strip of 128 rows, of 256 channels in 32 bits."""
    denoising: float = 1.5
    score_bytes: float = 2.0
    """Of a pair of tokens, for each head."""
    text_score_bytes: float = 3.0
    """Of a pair of tokens of the text, for each head: in 32 bits, of which MLX holds a part at a
    time."""


CPU = Cpu()


class TextEncoder(NamedTuple):
    """Figures of a text encoder."""

    width: int
    heads: int
    kept_layers: int = 0
    """Layers whose results are kept until the last one."""
    value_bytes: int = 2
    most_tokens: int | None = None
    """Fewer than with the family's own encoder; None: as many."""


class Architecture(NamedTuple):
    """Figures of a family."""

    width: int
    """Of the transformer."""
    decoder_bytes: float
    """Of a pixel while it is decoded."""
    tiles: bool = False
    """Whether mflux's TilingConfig makes its decoder work in tiles."""
    always_tiled: bool = False
    """Whether mflux does that by itself."""
    text: TextEncoder | None = None
    """None: it encodes no text."""
    joint: bool = True
    """Whether tokens of the text go through the transformer with those of the picture."""
    features: int = 0
    """Numbers of a token that the text encoder returns, where it computes one for each token of the
    picture, too; 0: it computes those of the text."""

    @property
    def encoder_bytes(self) -> float:
        """Of a pixel while it is encoded."""
        whole = FLUX1_VAE if self.decoder_bytes == STRIPS else self.decoder_bytes
        return whole * (QWEN_ENCODER_SHARE if whole == QWEN_VAE else ENCODER_SHARE)


STRIPS = 1350.0
QWEN_VAE = 8300.0
FLUX1_VAE = 6800.0
QWEN3_4B = TextEncoder(2560, 32, 36)
AS_DRAWN = frozenset({"flux", "qwen", "fibo"})
"""Families that scale reference images to the size of the picture."""
ENLARGED = frozenset({"qwen21", "fibo2"})
"""Families that scale also small ones to Model.reference_pixels."""
ENCODED_WHOLE = frozenset({"qwen21"})
"""Families that do not encode reference images in tiles."""
ENCODED_IN_TILES = frozenset({"ernie_image", "seedvr2"})
"""Families that encode pictures in tiles of 512 by themselves."""
UNKNOWN = Architecture(4096, QWEN_VAE, text=TextEncoder(4096, 32, 36))
"""Of families that a new release of mflux brings."""
ARCHITECTURES = {
    "anima": Architecture(
        2048, QWEN_VAE, True, text=TextEncoder(1024, 16, value_bytes=4), joint=False
    ),
    "boogu": Architecture(3360, FLUX1_VAE, True, text=TextEncoder(4096, 32)),
    "ernie_image": Architecture(4096, STRIPS, text=TextEncoder(3072, 32)),
    "fibo": Architecture(3072, 7400.0, True, text=TextEncoder(2048, 16, 36)),
    "fibo2": Architecture(3584, STRIPS, text=TextEncoder(2560, 32, 35)),
    "flux": Architecture(3072, FLUX1_VAE, True, text=TextEncoder(4096, 64)),
    "flux2": Architecture(4096, STRIPS, text=TextEncoder(4096, 32, 36)),
    "flux3": Architecture(3072, STRIPS, text=TextEncoder(2560, 32, 32)),
    "ideogram4": Architecture(4608, STRIPS, text=TextEncoder(4096, 32, 13), features=13 * 4096),
    "iris": Architecture(2560, 1000.0, text=QWEN3_4B),
    "krea2": Architecture(6144, QWEN_VAE, True, text=QWEN3_4B),
    "lens": Architecture(1536, STRIPS, text=TextEncoder(2880, 64, 4)),
    "ming_image": Architecture(3840, 6000.0, True, text=TextEncoder(2048, 16, 4)),
    "moss_image": Architecture(3072, 10000.0, True, text=TextEncoder(4096, 16)),
    "qwen": Architecture(3072, QWEN_VAE, True, text=TextEncoder(3584, 28)),
    "qwen21": Architecture(4096, 8600.0, True, text=TextEncoder(4096, 32)),
    "seedvr2": Architecture(2560, 16500.0, True, always_tiled=True),
    "z_image": Architecture(3840, STRIPS, text=QWEN3_4B),
}
TINY = Architecture(64, 300.0, True, text=TextEncoder(64, 1, value_bytes=4))
"""Of the tiny models."""
SMALL_TEXT_ENCODERS = {
    "flux2": TextEncoder(1024, 16, 28, most_tokens=256),
    "qwen21": TextEncoder(2048, 8, 24),
}
"""Of the option small_text_encoder, by family."""


class PictureMemory(NamedTuple):
    """Bytes that a picture takes beside the weights, by phase."""

    encoding: float
    """Of the text, and of the pictures that it is made from."""
    denoising: float
    decoding: float


def architecture(stage: Stage) -> Architecture:
    spec = stage.load_spec
    figures = TINY if spec.model.tiny else ARCHITECTURES.get(spec.model.family, UNKNOWN)
    if spec.options.small_text_encoder:
        small = SMALL_TEXT_ENCODERS.get(spec.model.family, figures.text)
        figures = figures._replace(text=small)
    return figures


def can_tile(stage: Stage) -> bool:
    """Whether mflux can decode it in tiles, or encode what it is made from in tiles."""
    return architecture(stage).tiles or _encoded_pixels(stage, 1) < _encoded_pixels(stage, None)


def largest_side(stage: Stage) -> float:
    """Of the picture, and of those that it is made from, in pixels."""
    return max(*size(stage), sqrt(_encoded_pixels(stage, None)))


def picture_memory(
    stage: Stage, tile: int | None, *, gpu: bool, text_tokens: int | None = None
) -> PictureMemory:
    """Returns what one picture of a stage takes.

    Args:
        tile: side of the decoder's tiles in pixels; None: it decodes the whole picture.
        gpu: whether MLX has a GPU.
        text_tokens: as tokens_of_text() counts them; None: by the number of characters.
    """
    figures = architecture(stage)
    if text_tokens is None:
        text_tokens = tokens_of_text(stage)
    encoded = text_tokens + _tokens(stage) if figures.features else text_tokens
    features = encoded * figures.features
    text = _encoding(figures.text, encoded, gpu) if figures.text else 0.0
    denoising = _denoising(figures, _tokens(stage), text_tokens, gpu)
    return PictureMemory(
        max(text, features * FEATURE_BYTES.encoding, encoding_of_pictures(stage, tile, gpu)),
        max(denoising + features * FEATURE_BYTES.kept, features * FEATURE_BYTES.denoising),
        _decoding(figures, stage, tile, gpu),
    )


def tokens_of_text(stage: Stage, count: Callable[[str], int | None] = not_counted) -> int:
    """Tokens of the longest text that a stage encodes.

    Args:
        count: as that of tokens().
    """
    params, model = stage.params, stage.load_spec.model
    encoder = architecture(stage).text
    if encoder is None:
        return 0
    texts = {params.prompt, *params.prompts, params.negative_prompt or ""}
    pictures = bool(params.images)
    most = max(tokens(text, model, count, pictures=pictures) for text in texts)
    return min(most, encoder.most_tokens or most)


def _encoding(encoder: TextEncoder, text_tokens: float, gpu: bool) -> float:
    values = text_tokens * encoder.width * (TEXT_VALUES + encoder.kept_layers)
    scores = 0.0 if gpu else encoder.heads * CPU.text_score_bytes
    return values * encoder.value_bytes + text_tokens**2 * (MASK_BYTES + scores)


def _denoising(figures: Architecture, picture: float, text_tokens: int, gpu: bool) -> float:
    together = picture + (max(text_tokens, TEXT_TOKENS) if figures.joint else TEXT_TOKENS)
    values = together * figures.width * ACTIVATION_BYTES
    if gpu:
        return values
    heads = max(figures.width / HEAD_WIDTH, 1.0)
    pairs = together * max(together, text_tokens)
    return values * CPU.denoising + heads * pairs * CPU.score_bytes


def encoding_of_pictures(stage: Stage, tile: int | None, gpu: bool) -> float:
    """What encoding the largest of the pictures takes that a picture is made from."""
    figures = architecture(stage)
    if stage.load_spec.model.family in ENCODED_IN_TILES:
        tile = tile or TILES[0]
    encoding = _encoded_pixels(stage, tile) * figures.encoder_bytes
    return encoding if gpu or not encoding else encoding * CPU.decoding + CPU.decoding_bytes


def _encoded_pixels(stage: Stage, tile: int | None) -> float:
    """Pixels of the largest picture that is encoded at a time."""
    params = stage.params
    width, height = size(stage)
    references = _reference_pixels(stage)
    whole = [width * height] if params.mask or params.control_image else []
    in_tiles = [width * height] if params.init_image else []
    (whole if stage.load_spec.model.family in ENCODED_WHOLE else in_tiles).extend(references)
    largest = max(in_tiles, default=0)
    return max([*whole, min(largest, tile**2) if tile else largest])


def _decoding(figures: Architecture, stage: Stage, tile: int | None, gpu: bool) -> float:
    width, height = size(stage)
    if figures.always_tiled:
        tile = tile or TILES[0]
    if not figures.tiles:
        tile = None
    decoded = min(width, tile or width) * min(height, tile or height)
    share = SMALL_DECODER if stage.load_spec.options.small_decoder else 1.0
    decoding = decoded * figures.decoder_bytes * share
    if not gpu:
        strip = width * CPU.strip_bytes * share if figures.decoder_bytes == STRIPS else 0.0
        decoding = decoding * CPU.decoding + CPU.decoding_bytes + strip
    return decoding + width * height * FINISHED_BYTES


def size(stage: Stage) -> tuple[int, int]:
    """Width and height of what mflux draws for a stage, in pixels."""
    width, height = stage.params.final_size
    return width * stage.load_spec.pipeline.width_factor, height


def _tokens(stage: Stage) -> float:
    """Tokens of the picture and of those that it is made from, 16 x 16 pixels each."""
    width, height = size(stage)
    return (width * height + sum(_reference_pixels(stage))) / 256


def _reference_pixels(stage: Stage) -> list[int]:
    """Pixels to which mflux scales each reference image."""
    model, images = stage.load_spec.model, stage.params.images
    if model.family in AS_DRAWN:
        width, height = size(stage)
        return [width * height] * len(images)
    if model.family in ENLARGED:
        return [model.reference_pixels] * len(images)
    return [min(image.width * image.height, model.reference_pixels) for image in images]
