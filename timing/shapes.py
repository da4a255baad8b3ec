"""What the seconds of a step, or of decoding, grow with: arithmetic only.

The pixels, as a rule. But a machine or an algorithm may work in tiles, columns, rows or other
stairs, or may take no less for a small picture. And some pictures may take longer by a factor:
those above a size, because memory is swapped or another algorithm is used; those whose sides are
no multiples of what the algorithm is made for; those that are not square.
"""

from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from timing.corrections import Bools, Floats

TILES = tuple(side / 1024 for side in (128, 192, 256, 320, 384, 448, 512, 640, 768, 1024))
STAIRS = (0.125, 0.2, 0.25, 0.375, 0.5, 0.75, 1.0)
MULTIPLES = tuple(side / 1024 for side in (32, 64, 128, 256))
ASPECTS = (0.15, 0.3, 0.5, 0.75)
FLOORS_TRIED, JUMPS_TRIED = 6, 100
LEAST_EACH = 2
"""Pictures with and without a factor."""
ALMOST = 1e-6


class Kind(StrEnum):
    PIXELS = "pixels"
    TILES = "tiles"
    COLUMNS = "columns"
    ROWS = "rows"
    STAIRS = "stairs"
    FLOOR = "floor"
    JUMP = "jump"
    ODD = "odd"
    ASPECT = "aspect"


class Shape(NamedTuple):
    kind: Kind = Kind.PIXELS
    by: float = 0.0
    """Side of a tile; x of a stair; least x; of a jump, x above which everything takes longer by
    `factor`; of odd sides, the number of which they are no multiples; of the aspect, the power of
    longer side / shorter side. Sides are in 1024 pixels, x = width * height."""
    factor: float = 1.0

    def sizes(self, sides: Floats) -> Floats:
        """Of pictures with these sides (n, 2): x, rounded up as the shape says."""
        wide, high = sides[:, 0], sides[:, 1]
        if self.kind is Kind.TILES:
            wide, high = _up(wide, self.by), _up(high, self.by)
        if self.kind is Kind.COLUMNS:
            wide = _up(wide, self.by)
        if self.kind is Kind.ROWS:
            high = _up(high, self.by)
        size: Floats = wide * high
        if self.kind is Kind.STAIRS:
            return _up(size, self.by)
        return np.maximum(size, self.by) if self.kind is Kind.FLOOR else size

    @property
    def is_factor(self) -> bool:
        """Whether the seconds of some pictures are multiplied, whatever x is."""
        return self.kind in (Kind.JUMP, Kind.ODD, Kind.ASPECT)

    @property
    def is_step(self) -> bool:
        """Whether this factor is the same for all pictures to which it applies."""
        return self.kind in (Kind.JUMP, Kind.ODD)

    def applies(self, sides: Floats) -> Bools:
        """To which pictures the factor of a step applies."""
        if self.kind is Kind.ODD:
            odd: Bools = np.abs(_up(sides, self.by) - sides) > ALMOST
            return odd[:, 0] | odd[:, 1]
        large: Bools = sides[:, 0] * sides[:, 1] > self.by
        return large

    def factors(self, sides: Floats) -> Floats:
        if self.kind is Kind.ASPECT:
            longer: Floats = np.exp(self.by * np.abs(np.log(sides[:, 0] / sides[:, 1])))
            return longer
        if self.is_factor:
            return np.where(self.applies(sides), self.factor, 1.0)
        return np.ones(len(sides))


SMOOTH = Shape()


def candidates(sides: Floats) -> list[Shape]:
    """Shapes other than jumps that differ between these pictures."""
    x = np.unique(sides[:, 0] * sides[:, 1])
    floors = x[1:-1][:: len(x) // FLOORS_TRIED + 1]
    odd = [Shape(Kind.ODD, by) for by in MULTIPLES]
    least, most = LEAST_EACH, len(sides) - LEAST_EACH
    return [
        *(Shape(kind, by) for kind in (Kind.TILES, Kind.COLUMNS, Kind.ROWS) for by in TILES),
        *(Shape(Kind.STAIRS, by) for by in STAIRS),
        *(Shape(Kind.FLOOR, float(by)) for by in floors),
        *(Shape(Kind.ASPECT, by) for by in ASPECTS),
        *(shape for shape in odd if least <= shape.applies(sides).sum() <= most),
    ]


def jumps(sides: Floats, least: int) -> list[Shape]:
    """Jumps between neighbouring sizes, with at least so many pictures on each side."""
    ordered = np.sort(sides[:, 0] * sides[:, 1])[least - 1 : len(sides) - least + 1]
    places = [float(a * b) ** 0.5 for a, b in pairwise(ordered) if b > 1.02 * a]
    return [Shape(Kind.JUMP, by) for by in places[:: len(places) // JUMPS_TRIED + 1]]


def _up(values: Floats, by: float) -> Floats:
    rounded: Floats = np.ceil(values / by - ALMOST) * by
    return rounded
