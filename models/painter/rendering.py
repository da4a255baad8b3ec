"""Renders scenes at any size. The same arguments give the same pixels."""

import math

import numpy as np
from PIL import Image, ImageDraw

from models.painter import layout as layouts
from models.painter.grammar import COLOURS, HORIZON, Placed, Scene, completed, placed_things
from models.painter.layout import Layout
from models.painter.shapes import SHAPES, STANDING, Colour, Draw, disc, lighter, mixed

_SKIES: dict[str, tuple[Colour, Colour]] = {
    "day": ((84, 158, 232), (204, 232, 250)),
    "sunset": ((92, 66, 134), (252, 166, 92)),
    "night": ((10, 16, 48), (44, 58, 110)),
}
_GROUNDS: dict[str, tuple[Colour, Colour]] = {
    "meadow": ((122, 190, 84), (64, 142, 56)),
    "sea": ((72, 150, 200), (22, 84, 150)),
    "snow": ((232, 240, 250), (250, 252, 255)),
    "mountains": ((134, 176, 98), (84, 140, 70)),
}
_DIMMED = {"day": 0.0, "sunset": 0.26, "night": 0.55}
_DUSK: dict[str, Colour] = {"day": (0, 0, 0), "sunset": (120, 50, 70), "night": (12, 18, 56)}
_ROCK: Colour = (122, 132, 160)
_ROCK_SHADE: tuple[Colour, float] = ((30, 34, 66), 0.25)
_DIMMED_THINGS = {"day": 0.0, "sunset": 0.08, "night": 0.16}


def render(scene: Scene, width: int, height: int, layout: Layout) -> Image.Image:
    """Returns an RGB picture, with the same layout at all sizes of 16 or more pixels."""
    scene = completed(scene, layout)
    # Larger pictures have finer pixels already.
    factor = 4 if max(width, height) <= 192 else 3 if max(width, height) <= 400 else 2
    size = (width * factor, height * factor)
    things = placed_things(scene, layout)
    if scene.ground == "plain":
        canvas = Image.new("RGB", size, COLOURS[scene.plain])
    else:
        canvas = _background(scene, size, layout)
    draw = ImageDraw.Draw(canvas)
    for thing in things:
        _draw_thing(draw, scene, thing, size)
    return canvas.reduce(factor)


def seen_colour(scene: Scene, name: str) -> Colour:
    """Returns the colour of a thing in the light of a scene."""
    return mixed(COLOURS[name], _DUSK[scene.time], _DIMMED_THINGS[scene.time])


def background_colours(scene: Scene) -> list[Colour]:
    """Returns colours between which those of the background are."""
    if scene.ground == "plain":
        return [COLOURS[scene.plain]]
    colours = []
    for one, other in (_SKIES[scene.time], _ground_colours(scene)):
        colours += [mixed(one, other, step / 4) for step in range(5)]
    if scene.ground == "mountains":
        rock = mixed(_ROCK, _DUSK[scene.time], _DIMMED[scene.time])
        colours += [rock, mixed(rock, *_ROCK_SHADE)]
    return colours


def _draw_thing(draw: Draw, scene: Scene, thing: Placed, size: tuple[int, int]) -> None:
    width, height = size
    pixels = thing.size * min(width, height)
    x, y = thing.x * width, thing.y * height
    colour = seen_colour(scene, thing.colour)
    if scene.ground not in ("plain", "sea") and thing.name in STANDING:
        ground = mixed(_GROUNDS[scene.ground][1], _DUSK[scene.time], _DIMMED[scene.time])
        foot = y + pixels * 0.5
        shadow = (x - pixels * 0.5, foot - pixels * 0.07, x + pixels * 0.56, foot + pixels * 0.08)
        draw.ellipse(shadow, fill=mixed(ground, (10, 20, 40), 0.3))
    SHAPES[thing.name](draw, x, y, pixels, colour)


def _background(scene: Scene, size: tuple[int, int], layout: Layout) -> Image.Image:
    width, height = size
    horizon = round(height * HORIZON)
    canvas = Image.new("RGB", size)
    canvas.paste(_vertical_gradient(width, horizon, *_SKIES[scene.time]))
    draw = ImageDraw.Draw(canvas)
    _draw_sky(draw, scene, size, layout)
    ground = _vertical_gradient(width, height - horizon, *_ground_colours(scene))
    canvas.paste(ground, (0, horizon))  # hides the lower half of the setting sun
    if scene.ground == "mountains":
        _draw_mountains(draw, scene, size, layout)
    elif scene.ground == "sea":
        _draw_waves(draw, scene, size)
    else:
        _draw_hills(draw, scene, size, layout)
    return canvas


def _ground_colours(scene: Scene) -> tuple[Colour, Colour]:
    far, near = _GROUNDS[scene.ground]
    dusk, share = _DUSK[scene.time], _DIMMED[scene.time]
    if scene.ground == "snow":
        share *= 0.7  # it is bright at night too
    return mixed(far, dusk, share), mixed(near, dusk, share)


def _vertical_gradient(width: int, height: int, top: Colour, bottom: Colour) -> Image.Image:
    share = np.linspace(0, 1, height)[:, None]
    column = np.array(top) * (1 - share) + np.array(bottom) * share
    pixels = np.round(column).astype(np.uint8)[:, None, :]
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def _draw_sky(draw: Draw, scene: Scene, size: tuple[int, int], layout: Layout) -> None:
    width, height = size
    unit = min(width, height)
    x = width * (0.78 + layout.at(layouts.SUN, 0.06))
    y = height * (0.18 + layout.at(layouts.SUN + 1, 0.02))
    if "stars" in scene.sky:
        for star in range(24):
            across = star * 0.618 % 1 * width  # golden ratios spread them evenly
            up = (star * 0.755 + 0.3) % 1 * height * HORIZON * 0.9
            disc(draw, across, up, unit * (0.007 + 0.003 * (star % 3)), (250, 244, 214))
    if "sun" in scene.sky and scene.time == "sunset":
        y = height * (HORIZON - 0.05)
        for radius, share in ((0.2, 0.72), (0.16, 0.45)):
            disc(draw, x, y, unit * radius, mixed((255, 222, 120), (252, 166, 92), share))
        disc(draw, x, y, unit * 0.12, (255, 226, 130))
    elif "sun" in scene.sky:
        disc(draw, x, y, unit * 0.13, (196, 224, 226))
        disc(draw, x, y, unit * 0.09, (255, 232, 104))
    if "moon" in scene.sky:
        disc(draw, x, y, unit * 0.09, (244, 240, 214))
        disc(draw, x - unit * 0.045, y - unit * 0.02, unit * 0.08, (20, 28, 66))
    if "clouds" in scene.sky:
        white = mixed((252, 252, 255), _DUSK[scene.time], _DIMMED[scene.time])
        for number, (across, up) in enumerate(((0.2, 0.14), (0.52, 0.24))):
            x = width * (across + layout.at(layouts.CLOUDS + 2 * number, 0.04))
            y = height * (up + layout.at(layouts.CLOUDS + 2 * number + 1, 0.02))
            for dx, dy, radius in ((-0.1, 0.01, 0.05), (0, -0.02, 0.075), (0.1, 0.01, 0.055)):
                disc(draw, x + dx * unit, y + dy * unit, radius * unit, white)
            draw.rounded_rectangle(
                (x - 0.15 * unit, y, x + 0.155 * unit, y + 0.06 * unit), 0.03 * unit, fill=white
            )


def _draw_mountains(draw: Draw, scene: Scene, size: tuple[int, int], layout: Layout) -> None:
    width, height = size
    foot = height * HORIZON
    dusk, share = _DUSK[scene.time], _DIMMED[scene.time]
    ranges = ((0.2, 0.3, 0.3), (0.85, 0.26, 0.32), (0.52, 0.38, 0.36))
    for number, (across, peak, half) in enumerate(ranges):
        x = width * (across + layout.at(layouts.MOUNTAINS + 2 * number, 0.03))
        rise = height * (peak + layout.at(layouts.MOUNTAINS + 2 * number + 1, 0.02))
        reach = width * half
        rock = mixed(_ROCK, dusk, share)
        draw.polygon([(x - reach, foot), (x, foot - rise), (x + reach, foot)], fill=rock)
        shade = [(x, foot - rise), (x + reach, foot), (x + reach * 0.2, foot)]
        draw.polygon(shade, fill=mixed(rock, *_ROCK_SHADE))
        cap = mixed((248, 250, 255), dusk, share * 0.6)
        edge = rise * 0.7
        slope = reach * 0.3
        draw.polygon(
            [
                (x, foot - rise),
                (x + slope, foot - edge),
                (x + slope * 0.4, foot - edge * 1.06),
                (x, foot - edge * 0.92),
                (x - slope * 0.4, foot - edge * 1.06),
                (x - slope, foot - edge),
            ],
            fill=cap,
        )


def _draw_waves(draw: Draw, scene: Scene, size: tuple[int, int]) -> None:
    width, height = size
    far, near = _ground_colours(scene)
    for row in range(7):
        depth = (row + 0.6) / 7
        y = height * (HORIZON + (1 - HORIZON) * depth)
        colour = lighter(mixed(far, near, depth), 0.16)
        length = width * (0.1 + 0.08 * depth)
        thickness = max(2, round(min(size) * (0.006 + 0.01 * depth)))
        shift = row * 0.618 % 1
        for part in range(3):
            x = width * ((part + shift) / 3)
            draw.rounded_rectangle((x, y, x + length, y + thickness), thickness / 2, fill=colour)


def _draw_hills(draw: Draw, scene: Scene, size: tuple[int, int], layout: Layout) -> None:
    width, height = size
    far, near = _ground_colours(scene)
    if scene.ground == "snow":
        near = mixed(far, (120, 150, 210), 0.14)
    shift = layout.at(layouts.HILLS, 0.8)
    hill = [(0.0, float(height))]
    for step in range(33):
        wave = math.sin(step / 32 * 4.4 + shift)
        hill.append((width * step / 32, height * (HORIZON - 0.01 + 0.035 * wave)))
    hill.append((float(width), float(height * (HORIZON + 0.08))))
    hill[0] = (0.0, height * (HORIZON + 0.08))
    draw.polygon(hill, fill=mixed(far, near, 0.35))
