"""What a caption leaves open is decided by the noise that a picture is drawn from.

Flow matching may pair pictures and noise as it likes, as long as the noise stays normal. With
independent pairs one noise leads to many pictures, and a few steps draw their mean. Here the first
token of the noise says where things stand, so a few steps are enough, and a training is short.
(Data-dependent couplings: Albergo et al. 2023, https://arxiv.org/abs/2310.03725.)
"""

import math
from dataclasses import dataclass

import numpy as np

from models.painter.patches import Array

COUNT = 32  # values of the first token that are read

# Which value decides what: the first of a group.
THINGS = 0  # across, down and size of at most three
SUN = 9  # across and down, also of the moon
CLOUDS = 11  # across and down of two
MOUNTAINS = 15  # across and height of three
HILLS = 21
GROUND = 24
HAS_SUN = 25  # also the moon
HAS_CLOUDS = 26  # also stars
HAS_THING = 27
WHICH_THING = 28


@dataclass(frozen=True)
class Layout:
    """`values` are COUNT numbers from -1 to 1, all equally likely."""

    values: tuple[float, ...] = (0.0,) * COUNT

    def at(self, number: int, reach: float = 1.0) -> float:
        """Returns a value times its reach."""
        return self.values[number] * reach

    def share(self, number: int) -> float:
        """Returns a value as a number from 0 to 1."""
        return (self.values[number] + 1) / 2


MIDDLE = Layout()
"""Everything is where it is on average."""


def layout_of(noise: Array) -> Layout:
    """Reads the noise (tokens, 64) of a picture. The values are those of a normal distribution
    (standard deviation 1), made uniform by its distribution function."""
    first = np.asarray(noise[0, :COUNT], np.float64)
    return Layout(tuple(math.erf(value / math.sqrt(2)) for value in first))
