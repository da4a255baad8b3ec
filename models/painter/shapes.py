"""Draws single things with Pillow, shaded a little. Coordinates and sizes are in pixels."""

import math
from collections.abc import Callable

from PIL import ImageDraw

Colour = tuple[int, int, int]
Draw = ImageDraw.ImageDraw
Shape = Callable[[Draw, float, float, float, Colour], None]
"""Draws a thing: its centre, its height, its colour."""


_ROCK: Colour = (112, 104, 100)
_IRON: Colour = (60, 60, 70)
DETAILS = (_ROCK, _IRON)
"""Colours of parts of things that are like none of the grammar's, and must not be taken for one."""


def mixed(one: Colour, other: Colour, share: float) -> Colour:
    """Returns a colour between two; `share` is that of the other."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def darker(colour: Colour, share: float = 0.25) -> Colour:
    return mixed(colour, (10, 10, 30), share)


def lighter(colour: Colour, share: float = 0.3) -> Colour:
    return mixed(colour, (255, 255, 255), share)


def disc(draw: Draw, x: float, y: float, radius: float, colour: Colour) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def box(  # noqa: PLR0917
    draw: Draw, left: float, top: float, right: float, bottom: float, colour: Colour
) -> None:
    draw.rectangle((left, top, right, bottom), fill=colour)


def _ball(draw: Draw, x: float, y: float, size: float, colour: Colour) -> None:
    radius = size / 2
    disc(draw, x, y, radius, darker(colour, 0.16))
    disc(draw, x - radius * 0.06, y - radius * 0.06, radius * 0.92, colour)
    disc(draw, x - radius * 0.32, y - radius * 0.36, radius * 0.24, lighter(colour, 0.45))


def _star(draw: Draw, x: float, y: float, size: float, colour: Colour) -> None:
    def points(radius: float) -> list[tuple[float, float]]:
        corners = []
        for corner in range(10):
            angle = math.pi * (corner / 5 - 0.5)
            reach = radius if corner % 2 == 0 else radius * 0.45
            corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        return corners

    draw.polygon(points(size * 0.55), fill=darker(colour, 0.16))
    draw.polygon(points(size * 0.49), fill=colour)


def _square(draw: Draw, x: float, y: float, size: float, colour: Colour) -> None:
    half = size * 0.46
    box(draw, x - half, y - half, x + half, y + half, darker(colour, 0.16))
    inner = half * 0.9
    box(draw, x - inner, y - inner, x + inner, y + inner, colour)


def _house(draw: Draw, x: float, y: float, size: float, colour: Colour) -> None:
    half, top, bottom = size * 0.45, y - size * 0.1, y + size * 0.5
    box(draw, x - half, top, x + half, bottom, colour)
    box(draw, x + half * 0.55, top, x + half, bottom, darker(colour, 0.12))
    roof = [(x - half * 1.2, top), (x, y - size * 0.5), (x + half * 1.2, top)]
    draw.polygon(roof, fill=(150, 70, 56))
    box(draw, x - size * 0.1, y + size * 0.18, x + size * 0.08, bottom, (92, 58, 40))
    for left in (x - size * 0.34, x + size * 0.18):
        box(draw, left, y + size * 0.05, left + size * 0.15, y + size * 0.2, (250, 226, 140))


def _lighthouse(draw: Draw, x: float, y: float, size: float, colour: Colour) -> None:
    top, bottom = y - size * 0.3, y + size * 0.5

    def half_width(height: float) -> float:
        return size * (0.11 + 0.07 * (height - top) / (bottom - top))

    rock = (x - size * 0.34, bottom - size * 0.08, x + size * 0.34, bottom + size * 0.1)
    draw.ellipse(rock, fill=_ROCK)
    for stripe in range(5):
        a = top + (bottom - top) * stripe / 5
        b = top + (bottom - top) * (stripe + 1) / 5
        fill = colour if stripe % 2 == 0 else (244, 244, 240)
        if colour[0] > 235 and colour[2] > 235 and stripe % 2:
            fill = (200, 204, 214)
        wide, wider = half_width(a), half_width(b)
        draw.polygon([(x - wide, a), (x + wide, a), (x + wider, b), (x - wider, b)], fill=fill)
    box(draw, x - size * 0.14, top - size * 0.03, x + size * 0.14, top, _IRON)
    box(
        draw,
        x - size * 0.08,
        top - size * 0.13,
        x + size * 0.08,
        top - size * 0.03,
        (255, 236, 130),
    )
    roof = [
        (x - size * 0.12, top - size * 0.13),
        (x, y - size * 0.5),
        (x + size * 0.12, top - size * 0.13),
    ]
    draw.polygon(roof, fill=darker(colour))


def _tree(draw: Draw, x: float, y: float, size: float, colour: Colour) -> None:
    bottom = y + size * 0.5
    box(draw, x - size * 0.06, y, x + size * 0.06, bottom, (104, 70, 44))
    for dx, dy, radius in ((-0.2, 0.02, 0.2), (0.2, 0.02, 0.2), (0, -0.22, 0.28)):
        disc(draw, x + dx * size, y + dy * size, radius * size, darker(colour, 0.12))
    for dx, dy, radius in ((-0.2, 0, 0.16), (0.16, 0, 0.16), (-0.04, -0.24, 0.22)):
        disc(draw, x + dx * size, y + dy * size, radius * size, colour)


def _boat(draw: Draw, x: float, y: float, size: float, colour: Colour) -> None:
    top, bottom = y + size * 0.24, y + size * 0.5
    half = size * 0.5
    hull = [(x - half, top), (x + half, top), (x + half * 0.66, bottom), (x - half * 0.66, bottom)]
    draw.polygon(hull, fill=colour)
    stripe = [
        (x - half, top),
        (x + half, top),
        (x + half * 0.93, top + size * 0.05),
        (x - half * 0.93, top + size * 0.05),
    ]
    draw.polygon(stripe, fill=darker(colour))
    box(draw, x - size * 0.02, y - size * 0.5, x + size * 0.02, top, _IRON)
    sail = (248, 246, 238)
    draw.polygon(
        [
            (x + size * 0.05, y - size * 0.46),
            (x + size * 0.05, top - size * 0.05),
            (x + size * 0.42, top - size * 0.05),
        ],
        fill=sail,
    )
    draw.polygon(
        [
            (x - size * 0.05, y - size * 0.34),
            (x - size * 0.05, top - size * 0.05),
            (x - size * 0.34, top - size * 0.05),
        ],
        fill=darker(sail, 0.1),
    )


def _cat(draw: Draw, x: float, y: float, size: float, colour: Colour) -> None:
    dark = darker(colour, 0.2)
    for side in (-1, 1):
        ear = [
            (x + side * size * 0.46, y - size * 0.5),
            (x + side * size * 0.08, y - size * 0.3),
            (x + side * size * 0.44, y - size * 0.02),
        ]
        draw.polygon(ear, fill=dark)
    head = (x - size * 0.48, y - size * 0.36, x + size * 0.48, y + size * 0.48)
    draw.ellipse(head, fill=colour)
    is_dark = sum(colour) < 260
    line = (230, 230, 230) if is_dark else (40, 34, 34)
    for side in (-1, 1):
        disc(draw, x + side * size * 0.2, y - size * 0.03, size * 0.09, (250, 250, 235))
        disc(draw, x + side * size * 0.2, y - size * 0.02, size * 0.055, (30, 60, 40))
        for slope in (-0.04, 0.05):
            start = (x + side * size * 0.14, y + size * 0.2)
            end = (x + side * size * 0.42, y + size * (0.2 + slope))
            draw.line((*start, *end), fill=line, width=max(1, round(size * 0.018)))
    nose = [
        (x - size * 0.06, y + size * 0.12),
        (x + size * 0.06, y + size * 0.12),
        (x, y + size * 0.2),
    ]
    draw.polygon(nose, fill=(226, 110, 120))


def _flower(draw: Draw, x: float, y: float, size: float, colour: Colour) -> None:
    head = y - size * 0.2
    box(draw, x - size * 0.025, head, x + size * 0.025, y + size * 0.5, (50, 130, 58))
    for side in (-1, 1):
        left = x + side * size * 0.13
        leaf = (left - size * 0.12, y + size * 0.24, left + size * 0.12, y + size * 0.34)
        draw.ellipse(leaf, fill=(60, 146, 66))
    for petal in range(6):
        angle = petal * math.pi / 3 + 0.5
        fill = colour if petal % 2 else darker(colour, 0.08)
        disc(
            draw,
            x + size * 0.17 * math.cos(angle),
            head + size * 0.17 * math.sin(angle),
            size * 0.13,
            fill,
        )
    middle = (250, 204, 60) if colour[2] > 100 or colour[1] < 100 else (150, 84, 40)
    disc(draw, x, head, size * 0.11, middle)


SHAPES: dict[str, Shape] = {
    "house": _house,
    "lighthouse": _lighthouse,
    "tree": _tree,
    "boat": _boat,
    "ball": _ball,
    "star": _star,
    "square": _square,
    "cat": _cat,
    "flower": _flower,
}
STANDING = {"house", "tree", "cat", "flower", "ball", "square"}
"""Things that throw a shadow on the ground."""
