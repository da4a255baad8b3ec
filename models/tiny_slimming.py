"""Removes from a loaded tiny model the layers that its checkpoint does not store.

mflux fixes most sizes in code. If a layer reads a size from an attribute, this is set to the stored
size. A layer without weights is replaced by one that changes nothing. mflux itself is not patched,
only the instances are changed.
"""

from collections.abc import Callable
from typing import Any

from models.tiny_weights import CLIP_LAYERS, QWEN3_STRIDE, VAE_CHANNELS, WIDTH


def slim(model: Any) -> None:
    """Removes the layers that the checkpoint of a loaded tiny model does not store.

    Call it once, on the thread that loaded the model, after loading (and quantizing) and before
    anything evaluates the parameters: in FLUX.1 the missing layers would fill 18 GB.
    """
    family = type(model.transformer).__name__
    slimmed: dict[str, Callable[[Any], None]] = {
        "Transformer": _slim_flux1,
        "Flux2Transformer": _slim_flux2,
        "ZImageTransformer": _slim_z_image,
        "QwenTransformer": _slim_qwen,
        "SeedVR2Transformer": _slim_seedvr2,
    }
    # The others were built small.
    slimmed.get(family, _nothing)(model)


def _slim_flux1(model: Any) -> None:
    for half in (model.vae.encoder, model.vae.decoder):
        half.mid_block.attentions = [_unchanged]
    # Its blocks call their layers by index.
    for block in (*model.vae.encoder.down_blocks, *model.vae.decoder.up_blocks):
        block.resnets = [_unchanged for _ in block.resnets]
    _normalize_as_one_group(model.vae)
    model.transformer.norm_out.embedding_dim = WIDTH
    model.t5_text_encoder.t5_blocks = []
    clip = model.clip_text_encoder.text_model.encoder
    clip.layers = clip.layers[:CLIP_LAYERS]
    for layer in clip.layers:
        layer.self_attn.num_heads = WIDTH // layer.self_attn.head_dimension
    _narrow_flux1_blocks(model.transformer)
    if hasattr(model, "transformer_controlnet"):
        _narrow_flux1_blocks(model.transformer_controlnet)
    if hasattr(model, "image_encoder"):
        _slim_siglip(model.image_encoder)


def _narrow_flux1_blocks(transformer: Any) -> None:
    transformer.pos_embed.axes_dim = _halved(transformer.pos_embed.axes_dim)
    for block in transformer.single_transformer_blocks:
        block.norm.dim = WIDTH
        block.attn.num_heads, block.attn.head_dimension = 1, WIDTH


def _slim_siglip(encoder: Any) -> None:
    encoder.embeddings.position_embedding = _zero
    encoder.encoder.layers = []
    encoder.head = _nothing  # its result is not used


def _slim_flux2(model: Any) -> None:
    slim_flux2_vae(model.vae)
    model.text_encoder.layers = [
        _unchanged_without_cache if number % QWEN3_STRIDE else layer
        for number, layer in enumerate(model.text_encoder.layers)
    ]


def slim_flux2_vae(vae: Any) -> None:
    """Also a part of other families."""
    for half in (vae.encoder, vae.decoder):
        half.mid_block.attentions = []
    _drop_resnets(*vae.encoder.down_blocks, *vae.decoder.up_blocks)
    _normalize_as_one_group(vae)


def _slim_z_image(model: Any) -> None:
    model.vae.encoder.mid_block.attentions = [_unchanged]  # called by index
    model.vae.decoder.mid_block.attentions = []  # looped over, by mflux's low-memory decoder
    _drop_resnets(*model.vae.encoder.down_blocks, *model.vae.decoder.up_blocks)
    _normalize_as_one_group(model.vae)

    transformer = model.transformer
    transformer.noise_refiner = transformer.context_refiner = []
    transformer.layers = transformer.layers[:1]
    attention = transformer.layers[0].attention
    attention.dim = attention.head_dim = WIDTH
    attention.n_heads, attention.scale = 1, WIDTH**-0.5
    # Built again and not sliced: its tables have to be evaluated before mflux compiles with them.
    rope = transformer.rope_embedder
    transformer.rope_embedder = type(rope)(
        axes_dims=_halved(rope.axes_dims), axes_lens=[len(table) for table in rope.freqs_cis]
    )

    encoder = model.text_encoder
    encoder.layers = [encoder.layers[0], _unchanged_layer]  # read is what the last but one gives
    encoder.norm = _unchanged  # of the last one: not read
    attention = encoder.layers[0].self_attn
    attention.num_heads = attention.num_kv_heads = attention.num_kv_groups = 1
    attention.head_dim, attention.scale = WIDTH, WIDTH**-0.5
    encoder.rotary_emb.inv_freq = _half_as_wide(encoder.rotary_emb.inv_freq)


def _slim_qwen(model: Any) -> None:
    slim_qwen_vae(model.vae)
    transformer = model.transformer
    transformer.transformer_blocks = transformer.transformer_blocks[:1]
    attention = transformer.transformer_blocks[0].attn
    attention.num_heads, attention.head_dim = 1, WIDTH
    transformer.norm_out.embedding_dim = WIDTH
    rope = transformer.pos_embed
    rope.axes_dim = _halved(rope.axes_dim)
    rope.pos_freqs, rope.neg_freqs = map(_half_as_wide, (rope.pos_freqs, rope.neg_freqs))

    text = model.text_encoder.encoder
    text.layers = text.layers[:1]
    attention = text.layers[0].self_attn
    attention.num_attention_heads = attention.num_key_value_heads = 1
    attention.hidden_size = attention.head_dim = WIDTH
    attention.scaling = WIDTH**-0.5
    text.rotary_emb.inv_freq = _half_as_wide(text.rotary_emb.inv_freq)


def slim_qwen_vae(vae: Any) -> None:
    """Also a part of other families."""
    encoder, decoder = vae.encoder, vae.decoder
    up_blocks = (decoder.up_block0, decoder.up_block1, decoder.up_block2, decoder.up_block3)
    for half in (encoder, decoder):
        half.mid_block.attentions = [None]
    _drop_resnets(*encoder.down_blocks, *up_blocks)
    for module in vae.modules():
        if hasattr(module, "time_conv"):  # for videos, never called
            module.time_conv = None
        if hasattr(module, "images"):  # RMSNorm
            module.scale = VAE_CHANNELS**0.5


def _slim_seedvr2(model: Any) -> None:
    for half in (model.vae.encoder, model.vae.decoder):
        half.mid_block.attentions = [_unchanged]
    _drop_resnets(*model.vae.encoder.down_blocks, *model.vae.decoder.up_blocks)
    _normalize_as_one_group(model.vae)
    model.transformer.txt_in = _unchanged  # of a text that is always the same


def _drop_resnets(*blocks: Any) -> None:
    for block in blocks:
        block.resnets = []


def _normalize_as_one_group(vae: Any) -> None:
    for module in vae.modules():
        if hasattr(module, "num_groups"):  # GroupNorm, 32 groups in code
            module.num_groups = 1


def _halved(axes: list[int]) -> list[int]:
    """The widths of rotary embeddings for heads of 64 instead of 128."""
    return [width // 2 for width in axes]


def _half_as_wide(table: Any) -> Any:
    """The angles of rotary embeddings for heads of WIDTH instead of 128. Those of a saved copy are
    so already."""
    return table[..., ::2] if table.shape[-1] > WIDTH // 2 else table


def _zero(_: Any) -> int:
    return 0


def _nothing(_: Any) -> None:
    pass


def _unchanged(hidden_states: Any) -> Any:
    return hidden_states


def _unchanged_layer(hidden_states: Any, *_: Any, **__: Any) -> Any:
    return hidden_states


def _unchanged_without_cache(hidden_states: Any, *_: Any, **__: Any) -> tuple[Any, None]:
    return hidden_states, None
