"""Measures whether pictures show what their captions name: by pixels, not by another model.

A pixel belongs to the nearest of the colours of things and backgrounds. A thing is a connected
region of its colour. Its shape is compared with that of a picture of the thing alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from random import Random

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from models.painter.captions import caption
from models.painter.grammar import (
    COLOURS,
    SKIES_OF,
    Placed,
    Scene,
    Thing,
    placed_things,
    random_scene,
)
from models.painter.layout import MIDDLE
from models.painter.rendering import background_colours, seen_colour
from models.painter.shapes import DETAILS, SHAPES

SIDE = 128  # pixels of the shorter side of the pictures that are compared
_NEAR = 85.0  # how far from its colour a pixel may be, in RGB
_PLACE = 0.17  # how far from its place a thing may be, as a share of the picture
_LEAST_AREA, _MOST_AREA = 0.35, 2.6  # of the area that a thing has on average
_LEAST_OVERLAP = 0.55  # of two shapes in the same box: intersection over union
_MOST_STRETCHED = 1.8  # the proportions of a shape, compared with the right ones
_GREY = (128, 128, 128)  # of no thing
_SHAPE = 48  # pixels: the box in which shapes are compared
# Colours in a background that look like those of things.
_CONFUSED: dict[str, tuple[str, ...]] = {
    "day": ("blue", "white"),
    "sunset": ("yellow", "orange", "purple", "pink", "brown"),
    "night": ("blue", "black", "white", "purple"),
    "meadow": ("green",),
    "mountains": ("green", "white", "purple", "blue"),
    "sea": ("blue",),
    "snow": ("white",),
    "sun": ("yellow", "orange"),
    "moon": ("yellow", "white"),
    "stars": ("yellow", "white"),
    "clouds": ("white",),
}

Draw = Callable[[str, int], Image.Image]
"""Draws a prompt with a seed."""
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """Shares of right answers, 0 to 1. `side` counts scenes with two things side by side only."""

    colour: float
    found: float
    side: float
    things: int
    pairs: int


@dataclass(frozen=True)
class _Region:
    x: float  # of its centre, as a share of the width
    y: float
    area: int
    shape: Mask  # (_SHAPE, _SHAPE)
    proportion: float  # width / height


def named_scenes(count: int, seed: int) -> list[tuple[Scene, str]]:
    """Returns scenes of things whose colours are not those of their background, and captions."""
    random = Random(seed)
    chosen: list[tuple[Scene, str]] = []
    while len(chosen) < count:
        scene = random_scene(random)
        if scene.things and not any(_is_confused(thing, scene) for thing in scene.things):
            chosen.append((scene, caption(scene, random)))
    return chosen


def evaluate(draw: Draw, scenes: list[tuple[Scene, str]]) -> Scores:
    colours, found, sides = [], [], []
    for number, (scene, text) in enumerate(scenes):
        picture = draw(text, number)
        seen = [_regions(picture, scene, thing) for thing in scene.things]
        for thing, regions in zip(scene.things, seen, strict=True):
            colours.append(_has_colour(scene, thing, regions))
            found.append(_is_found(scene, thing, regions))
        if len(scene.things) == 2 and scene.things[0].place == "left":
            sides.append(_is_left(scene, seen))
    return Scores(_share(colours), _share(found), _share(sides), len(colours), len(sides))


def _share(answers: list[bool]) -> float:
    return sum(answers) / max(1, len(answers))


def _is_confused(thing: Thing, scene: Scene) -> bool:
    if scene.ground == "plain":
        return thing.name == "flower" and thing.colour == "green"  # as its stem
    if (thing.name, thing.colour) == ("boat", "white"):
        return True  # as its sails
    parts = (scene.time, scene.ground, *(scene.sky or SKIES_OF[scene.time]))
    return any(thing.colour in _CONFUSED[part] for part in parts)


def _has_colour(scene: Scene, thing: Thing, regions: list[_Region]) -> bool:
    return any(
        _is_large(scene, thing, region) and _is_placed(region, place)
        for region in regions
        for place in _places(scene, thing)
    )


def _is_found(scene: Scene, thing: Thing, regions: list[_Region]) -> bool:
    alike = [region for region in regions if _is_alike(scene, thing, region)]
    if len(alike) != thing.count:
        return False
    return all(
        any(_is_placed(region, place) for region in alike) for place in _places(scene, thing)
    )


def _is_left(scene: Scene, seen: list[list[_Region]]) -> bool:
    centres = []
    for thing, regions in zip(scene.things, seen, strict=True):
        large = [region for region in regions if _is_large(scene, thing, region)]
        if not large:
            return False
        centres.append(max(large, key=lambda region: region.area).x)
    return bool(centres[0] < centres[1])


def _is_large(scene: Scene, thing: Thing, region: _Region) -> bool:
    share = region.area / _template(scene, thing).area
    return _LEAST_AREA <= share <= _MOST_AREA


def _is_placed(region: _Region, place: Placed) -> bool:
    return abs(region.x - place.x) <= _PLACE and abs(region.y - place.y) <= _PLACE


def _is_alike(scene: Scene, thing: Thing, region: _Region) -> bool:
    template = _template(scene, thing)
    ratio = region.proportion / template.proportion
    if not _is_large(scene, thing, region) or not 1 / _MOST_STRETCHED <= ratio <= _MOST_STRETCHED:
        return False
    both = (region.shape & template.shape).sum()
    return bool(both >= _LEAST_OVERLAP * (region.shape | template.shape).sum())


@cache
def _places(scene: Scene, thing: Thing) -> tuple[Placed, ...]:
    placed = placed_things(scene, MIDDLE)
    wanted = [place for place in placed if (place.name, place.colour) == (thing.name, thing.colour)]
    # The region of a boat, say, is its hull and not its sails.
    offset = _template(scene, thing).y - 0.5
    return tuple(replace(place, y=place.y + offset) for place in wanted)


@cache
def _template(scene: Scene, thing: Thing) -> _Region:
    """Returns the thing's region in a picture without anything else, at its average size."""
    placed = placed_things(scene, MIDDLE)
    place = next(p for p in placed if (p.name, p.colour) == (thing.name, thing.colour))
    colour = seen_colour(scene, thing.colour)
    canvas = Image.new("RGB", (SIDE * 4, SIDE * 4), _GREY)
    middle = SIDE * 2
    SHAPES[thing.name](ImageDraw.Draw(canvas), middle, middle, place.size * SIDE * 4, colour)
    regions = _regions_of(canvas.reduce(4), [_GREY], scene, thing)
    return max(regions, key=lambda region: region.area)


def _regions(picture: Image.Image, scene: Scene, thing: Thing) -> list[_Region]:
    return _regions_of(picture, background_colours(scene), scene, thing)


def _regions_of(
    picture: Image.Image, background: list[tuple[int, int, int]], scene: Scene, thing: Thing
) -> list[_Region]:
    factor = SIDE / min(picture.size)
    size = (round(picture.width * factor), round(picture.height * factor))
    small = picture.convert("RGB").resize(size, Image.Resampling.BOX)
    pixels = np.asarray(small, np.float32)
    names = [thing.colour, *(name for name in COLOURS if name != thing.colour)]
    known = [*(seen_colour(scene, name) for name in names), *background, *DETAILS]
    palette = np.array(known, np.float32)
    distances = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    mask = (distances.argmin(-1) == 0) & (distances[:, :, 0] < _NEAR)
    # The stripes of a lighthouse are one thing; so are a tree and a house with their details.
    side = 13 if thing.name == "lighthouse" else 3
    kernel = np.ones((side, 3), np.uint8)
    padded = np.pad(mask.astype(np.uint8), side)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, kernel)[side:-side, side:-side]
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(closed, connectivity=8)
    regions = []
    for number in range(1, count):
        left, top, width, height, area = boxes[number]
        if area < 12:
            continue
        cut = (labels == number)[top : top + height, left : left + width].astype(np.uint8)
        shape = cv2.resize(cut, (_SHAPE, _SHAPE), interpolation=cv2.INTER_NEAREST) > 0
        x, y = (left + width / 2) / size[0], (top + height / 2) / size[1]
        regions.append(_Region(x, y, int(area), shape, width / height))
    return regions
