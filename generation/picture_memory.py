"""Memory that a picture takes beside the weights: arithmetic only, in bytes.

A picture is encoded, denoised and decoded one after the other, so it takes the most of the three:

    text encoding   TEXT_BYTES
    denoising       tokens x width x ACTIVATION_BYTES  (and attention scores without a GPU)
    decoding        pixels x decoder_bytes, of the picture or of one tile; and the finished picture

Sources, all of mflux 0.24's READMEs, measured on Apple Silicon (peak beside the weights):

- Qwen VAE (Anima, Krea 2, Qwen-Image): 8.7 GB at 1024 x 1024.
- FLUX.1's VAE decoded whole: 7.3 GB with 0.17 GB of weights. FLUX.1 and Boogu have it.
- Row strips of 128 rows (FLUX.2, FLUX 3, Z-Image, ERNIE, FIBO 2, Ideogram 4, Lens): 1.6 GB at 1024
  x 1024, 5.6 GB at 2048 x 2048, with 0.17 GB of weights. FIBO 2 took 13.8 GB before it had strips.
- FLUX.2's decoder on the whole picture: 10.3 GB at 1024 x 1024. MOSS has it.
- Ming: 9.8 GB at 512 x 512, 14.5 GB at 1024 x 1024.
- Denoising: Anima 1.1 GB for 4096 tokens of the picture and 512 of the text, width 2048; FLUX.2
  klein 9B, width 4096, 3.2 GB more at 2048 x 2048 than at 1024 x 1024.

No README says what the decoders of FIBO, Qwen-Image 2.1 and SeedVR2 take: these figures are
those of the Qwen VAE, times the ratio of the two that MLX counted when both decoded 128 x 128
pixels on a CPU.

Without a GPU, MLX's convolutions copy their input nine times, and its attention holds all scores:
see Cpu.

Previews take nothing that counts: 20 bytes for each of the 64 pixels of a latent.
"""

from typing import NamedTuple

from task import Stage

TEXT_BYTES = 0.2e9
"""Activations of a text encoder: 512 tokens, width 4096."""
TEXT_TOKENS = 512
ACTIVATION_BYTES = 90.0
"""Of a token, for each unit of the transformer's width."""
FINISHED_BYTES = 30.0
"""Of a pixel: the decoded picture in 32 bits, its sum and weights while tiles are put together,
8-bit copies."""
HEAD_WIDTH = 128
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


CPU = Cpu()


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


STRIPS = 1350.0
QWEN_VAE = 8300.0
FLUX1_VAE = 6800.0
UNKNOWN = Architecture(4096, QWEN_VAE)
"""Of families that a new release of mflux brings."""
ARCHITECTURES = {
    "anima": Architecture(2048, QWEN_VAE, tiles=True),
    "boogu": Architecture(3360, FLUX1_VAE, tiles=True),
    "ernie_image": Architecture(4096, STRIPS),
    "fibo": Architecture(3072, 7400.0, tiles=True),
    "fibo2": Architecture(3584, STRIPS),
    "flux": Architecture(3072, FLUX1_VAE, tiles=True),
    "flux2": Architecture(4096, STRIPS),
    "flux3": Architecture(3072, STRIPS),
    "ideogram4": Architecture(4608, STRIPS),
    "iris": Architecture(2560, 1000.0),
    "krea2": Architecture(6144, QWEN_VAE, tiles=True),
    "lens": Architecture(1536, STRIPS),
    "ming_image": Architecture(3840, 6000.0, tiles=True),
    "moss_image": Architecture(3072, 10000.0, tiles=True),
    "qwen": Architecture(3072, QWEN_VAE, tiles=True),
    "qwen21": Architecture(4096, 8600.0, tiles=True),
    "seedvr2": Architecture(2560, 16500.0, tiles=True, always_tiled=True),
    "z_image": Architecture(3840, STRIPS),
}
TINY = Architecture(64, 300.0, tiles=True)
"""Of the tiny models."""


class PictureMemory(NamedTuple):
    """Bytes that a picture takes beside the weights, by phase."""

    denoising: float
    """And encoding the text."""
    decoding: float


def architecture(stage: Stage) -> Architecture:
    model = stage.load_spec.model
    return TINY if model.tiny else ARCHITECTURES.get(model.family, UNKNOWN)


def can_tile(stage: Stage) -> bool:
    return architecture(stage).tiles


def picture_memory(stage: Stage, tile: int | None, *, gpu: bool) -> PictureMemory:
    """Returns what one picture of a stage takes.

    Args:
        tile: side of the decoder's tiles in pixels; None: it decodes the whole picture.
        gpu: whether MLX has a GPU.
    """
    figures = architecture(stage)
    width, height = size(stage)
    if figures.always_tiled:
        tile = tile or TILES[0]
    decoded = min(width, tile or width) * min(height, tile or height)
    decoding = decoded * figures.decoder_bytes
    tokens = _tokens(stage) + TEXT_TOKENS
    denoising = tokens * figures.width * ACTIVATION_BYTES
    if not gpu:
        heads = max(figures.width / HEAD_WIDTH, 1.0)
        strip = width * CPU.strip_bytes if figures.decoder_bytes == STRIPS else 0.0
        decoding = decoding * CPU.decoding + CPU.decoding_bytes + strip
        denoising = denoising * CPU.denoising + heads * tokens**2 * CPU.score_bytes
    finished = width * height * FINISHED_BYTES
    return PictureMemory(max(denoising, TEXT_BYTES), decoding + finished)


def size(stage: Stage) -> tuple[int, int]:
    """Width and height of what mflux draws for a stage, in pixels."""
    width, height = stage.params.final_size
    return width * stage.load_spec.pipeline.width_factor, height


def _tokens(stage: Stage) -> float:
    """Tokens of the picture and of those that it is made from, 16 x 16 pixels each."""
    width, height = size(stage)
    largest = stage.load_spec.model.reference_pixels
    references = sum(min(i.width * i.height, largest) for i in stage.params.images)
    return (width * height + references) / 256
