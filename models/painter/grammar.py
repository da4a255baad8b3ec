"""Scenes that the built-in model learns to draw: what is in a picture, and where.

A scene says what the caption names. The layout adds what it leaves open.
"""

from dataclasses import dataclass, replace
from random import Random

from models.painter import layout as layouts
from models.painter.layout import Layout

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 44, 44),
    "orange": (240, 134, 34),
    "yellow": (246, 208, 48),
    "green": (44, 150, 66),
    "blue": (40, 92, 214),
    "purple": (132, 60, 176),
    "pink": (244, 138, 182),
    "white": (246, 246, 242),
    "black": (36, 36, 42),
    "brown": (130, 84, 48),
}
TIMES = ("day", "sunset", "night")
GROUNDS = ("meadow", "sea", "snow", "mountains", "plain")
SKIES_OF = {"day": ("sun", "clouds"), "sunset": ("sun", "clouds"), "night": ("moon", "stars")}
PLACES = ("centre", "left", "right", "above", "below")

USUAL_COLOURS = {
    "house": "white",
    "lighthouse": "red",
    "tree": "green",
    "boat": "brown",
    "ball": "red",
    "star": "yellow",
    "square": "blue",
    "cat": "orange",
    "flower": "pink",
}
"""Names of things, each with the colour that it has if its caption names none."""
NAMES = tuple(USUAL_COLOURS)
PLAIN_NAMES = ("ball", "star", "square", "cat", "flower")
SEA_NAMES = ("boat", "lighthouse", "ball", "star")
LAND_NAMES = tuple(name for name in NAMES if name != "boat")
HORIZON = 0.6  # share of the height that is sky

# Colours that are hard to see on a ground.
_HIDDEN = {
    "meadow": ("green",),
    "mountains": ("green",),
    "snow": ("white",),
    "sea": ("blue",),
}
_PLACES = {
    "centre": (0.5, 0.5),
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "above": (0.5, 0.27),
    "below": (0.5, 0.75),
}
_ROWS = {1: (0.5,), 2: (0.3, 0.7), 3: (0.18, 0.5, 0.82)}
SIZES = {"small": 0.24, "": 0.36, "big": 0.5}


@dataclass(frozen=True)
class Thing:
    """Things of one kind: `count` is 1 to 3, and several stand in a row in the centre."""

    name: str
    colour: str
    count: int = 1
    size: str = ""  # "small", "" or "big"
    place: str = "centre"


@dataclass(frozen=True)
class Scene:
    """`plain` is the colour of a plain ground; `sky` holds at most two. With no `ground`
    it is any landscape; with no `sky`, whatever the sky of its time may hold."""

    ground: str
    time: str = "day"
    sky: tuple[str, ...] = ()
    things: tuple[Thing, ...] = ()
    plain: str = ""


@dataclass(frozen=True)
class Placed:
    """One thing in a picture. `x` and `y` are the shares of width and height where its centre is,
    `size` its height as a share of the shorter side."""

    name: str
    colour: str
    x: float
    y: float
    size: float


def random_scene(random: Random) -> Scene:
    kind = random.random()
    if kind < 0.2:
        return _landscape(random)
    if kind < 0.45:
        return _plain(random)
    ground = random.choice(GROUNDS[:-1])
    time = random.choice(TIMES)
    things = _things(random, SEA_NAMES if ground == "sea" else LAND_NAMES)
    if any(_is_hidden(thing, ground, time) for thing in things):
        return random_scene(random)
    return Scene(ground, time, _sky(random, time, probability=0.3), things)


def completed(scene: Scene, layout: Layout) -> Scene:
    """Returns the scene with what its caption does not name."""
    if scene.ground == "plain":
        return scene
    if not scene.ground:
        ground = GROUNDS[min(int(layout.share(layouts.GROUND) * 4), 3)]
        scene = replace(scene, ground=ground)
        if ground != "sea" and layout.at(layouts.HAS_THING) > 0:
            name = "tree" if layout.at(layouts.WHICH_THING) > 0 else "house"
            scene = replace(scene, things=(Thing(name, USUAL_COLOURS[name]),))
    if not scene.sky:
        light, rest = SKIES_OF[scene.time]
        often = {"day": (0.3, 0.3), "sunset": (-0.5, 0.5), "night": (-0.2, -0.2)}[scene.time]
        sky = []
        if layout.at(layouts.HAS_SUN) > often[0]:
            sky.append(light)
        if layout.at(layouts.HAS_CLOUDS) > often[1]:
            sky.append(rest)
        scene = replace(scene, sky=tuple(sky))
    return scene


def placed_things(scene: Scene, layout: Layout) -> list[Placed]:
    """Returns the things of a scene from back to front."""
    placed: list[Placed] = []
    for thing in scene.things:
        size = SIZES[thing.size] * {1: 1.0, 2: 0.85, 3: 0.66}[thing.count]
        if len(scene.things) > 1:
            size *= 0.85
        x, y = _PLACES[thing.place]
        if scene.ground != "plain" and thing.place in ("centre", "left", "right"):
            y = HORIZON + 0.12 - size * 0.2
        row = _ROWS[thing.count] if thing.count > 1 else (x,)
        sideways = {1: 0.04, 2: 0.02, 3: 0.01}[thing.count]
        if scene.things == (thing,) and thing.count == 1 and thing.place == "centre":
            sideways = 0.08
        for across in row:
            number = layouts.THINGS + 3 * len(placed)
            placed.append(
                Placed(
                    thing.name,
                    thing.colour,
                    x=across + layout.at(number, sideways),
                    y=y + layout.at(number + 1, 0.015),
                    size=size * (1 + layout.at(number + 2, 0.05)),
                )
            )
    return placed


def _is_hidden(thing: Thing, ground: str, time: str) -> bool:
    if thing.name == "tree" and thing.colour == "green":
        return False  # stands out against the sky
    return thing.colour in _HIDDEN[ground] or (time == "night" and thing.colour == "black")


def _landscape(random: Random) -> Scene:
    time = random.choice(TIMES)
    if random.random() < 0.35:
        return Scene("", time if random.random() < 0.5 else "day")
    return Scene(random.choice(GROUNDS[:-1]), time, _sky(random, time, probability=0.5))


def _plain(random: Random) -> Scene:
    things = _things(random, PLAIN_NAMES, above=0.35)
    taken = {thing.colour for thing in things}
    # A thing must stand out: yellow on white, say, is hard to see.
    grounds = {"white", "black", "blue", "green", "yellow"} - taken
    if taken & {"yellow", "pink", "orange"}:
        grounds -= {"yellow"}
    if taken & {"brown", "purple", "blue"}:
        grounds -= {"black", "blue"}
    return Scene("plain", things=things, plain=random.choice(sorted(grounds)))


def _things(random: Random, names: tuple[str, ...], *, above: float = 0.0) -> tuple[Thing, ...]:
    first = _thing(random, names)
    kind = random.random()
    if kind < 0.4:
        size = random.choice(("", "", "", "small", "big"))
        return (replace(first, size=size),)
    if kind < 0.55:
        return (replace(first, place=random.choice(("left", "right"))),)
    if kind < 0.7:
        return (replace(first, count=random.choice((2, 3))),)
    second = _thing(random, tuple(name for name in names if name != first.name))
    while second.colour == first.colour:
        second = _thing(random, (second.name,), usual=0)
    vertical = random.random() < above
    places = ("above", "below") if vertical else ("left", "right")
    return (replace(first, place=places[0]), replace(second, place=places[1]))


def _thing(random: Random, names: tuple[str, ...], *, usual: float = 0.3) -> Thing:
    name = random.choice(names)
    is_usual = random.random() < usual
    return Thing(name, USUAL_COLOURS[name] if is_usual else random.choice(tuple(COLOURS)))


def _sky(random: Random, time: str, *, probability: float) -> tuple[str, ...]:
    return tuple(name for name in SKIES_OF[time] if random.random() < probability)
