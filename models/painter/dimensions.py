"""How wide and deep the built-in model is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dimensions:
    """Widths are in channels, and a head of the transformer has width / heads."""

    width: int = 128
    heads: int = 2
    layers: int = 6
    expansion: int = 2  # of the feed-forward layers
    text_width: int = 64
    clip_layers: int = 2
    t5_layers: int = 1


USUAL = Dimensions()
