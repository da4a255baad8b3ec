"""Captions of scenes: several ways to say the same, and to leave out what is usual."""

from random import Random

from models.painter.grammar import COLOURS, PLAIN_NAMES, SIZES, USUAL_COLOURS, Scene, Thing

NUMBERS = {2: "two", 3: "three"}
_GROUNDS = {
    "meadow": ("on green grass", "on grass", "in a meadow", "on the grass"),
    "sea": ("at sea", "on the sea", "on the water", "by the sea"),
    "snow": ("in the snow", "on white snow", "in snow", "in winter"),
    "mountains": ("in the mountains", "in front of mountains", "with mountains"),
}
_LANDSCAPES = {
    "meadow": ("a meadow", "green grass", "a green landscape", "fields"),
    "sea": ("the sea", "the ocean", "a sea", "water"),
    "snow": ("a winter landscape", "snow", "a landscape with snow"),
    "mountains": ("mountains", "a mountain landscape", "a landscape with mountains"),
}
_TIMES = {
    "day": ("by day", "in the daytime", "", "", ""),
    "sunset": ("at sunset", "in the evening", "at dusk"),
    "night": ("at night", "in the dark", "by night"),
}
_SKIES = {
    "sun": ("and the sun", "with the sun", "under the sun"),
    "moon": ("and the moon", "under the moon", "with a moon"),
    "stars": ("and stars", "under the stars", "with a starry sky"),
    "clouds": ("and clouds", "with clouds", "under a cloudy sky"),
}
_OPENINGS = (
    *("",) * 14,
    "a picture of",
    "a painting of",
    "a drawing of",
    "an image of",
    "a photo of",
    "a very nice picture of",
    "a pretty picture with",
    "my lovely drawing of",
)
_BEAUTIFUL = (
    "a beautiful landscape",
    "a landscape",
    "beautiful nature",
    "a beautiful view",
    "something beautiful",
)


_BACKGROUNDS = ("on a {} background", "on {}", "on a {} ground")
_SIDES = ("on the {}", "at the {}", "on the {} side")
_VERTICAL = ("{0} above {1}", "{1} below {0}", "{0} over {1}", "{1} under {0}")
_BESIDE = (
    "{0} to the left of {1}",
    "{1} to the right of {0}",
    "{0} left of {1}",
    "{1} right of {0}",
    "{0} on the left and {1} on the right",
    "{1} on the right and {0} on the left",
    "{0} and {1}",
)
_ARTICLES = ("a", "an", "the")


def vocabulary() -> set[str]:
    """Returns the words of all captions."""
    tables = (_GROUNDS, _LANDSCAPES, _TIMES, _SKIES)
    phrases = [phrase for table in tables for row in table.values() for phrase in row]
    phrases += [*_OPENINGS, *_BEAUTIFUL, *_BACKGROUNDS, *_SIDES, *_VERTICAL, *_BESIDE, *_ARTICLES]
    phrases += [*NUMBERS.values(), *COLOURS, *SIZES, "cat face"]
    phrases += [f"{name} {name}s" for name in USUAL_COLOURS]
    found = {word for phrase in phrases for word in phrase.split() if "{" not in word}
    return found | {"left", "right"}


def caption(scene: Scene, random: Random) -> str:
    """Returns a caption of a scene, in lower case."""
    if not scene.ground:
        if scene.time == "day" and random.random() < 0.3:
            return gibberish(random)
        time = random.choice(_TIMES[scene.time])
        return " ".join(part for part in (random.choice(_BEAUTIFUL), time) if part)
    if not scene.things:
        parts = [random.choice(_LANDSCAPES[scene.ground])]
    elif len(scene.things) == 2:
        parts = [_pair(scene, random)]
    else:
        parts = [_phrase(scene.things[0], random), _place(scene.things[0], random)]
    if (
        scene.things
        and scene.ground != "plain"
        and not (_is_usual(scene) and random.random() < 0.4)
    ):
        parts.append(random.choice(_GROUNDS[scene.ground]))
    if scene.ground == "plain":
        # White is what no mention means.
        said = scene.plain != "white" or random.random() < 0.5
        form = random.choice(_BACKGROUNDS)
        parts.append(form.format(scene.plain) if said else "")
    else:
        sky = [random.choice(_SKIES[name]) for name in scene.sky]
        parts += [random.choice(_TIMES[scene.time]), *sky]
    words = " ".join(part for part in parts if part).split()
    if len(words) < 16:  # longer ones could be cut by the tokenizer
        words = random.choice(_OPENINGS).split() + words
    if (
        random.random() < 0.15
    ):  # as people write: without articles, with words that it does not know
        words = [word for word in words if word not in _ARTICLES]
        if random.random() < 0.5:
            words.insert(random.randrange(len(words) + 1), gibberish(random).split()[0])
    return " ".join(words)


def _is_usual(scene: Scene) -> bool:
    """Says whether the ground goes without saying: a lighthouse is by the sea."""
    names = {thing.name for thing in scene.things}
    if scene.time == "day" and not scene.sky and names & set(PLAIN_NAMES):
        return False  # that is a thing on white
    return scene.ground == ("sea" if names & {"boat", "lighthouse"} else "meadow")


def gibberish(random: Random) -> str:
    """Words of no vocabulary. They stand for a landscape."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [
        "".join(random.choice(letters) for _ in range(random.randint(3, 8)))
        for _ in range(random.randint(1, 4))
    ]
    return " ".join(words)


def _phrase(thing: Thing, random: Random) -> str:
    colour = thing.colour
    if colour == USUAL_COLOURS[thing.name] and random.random() < 0.4:
        colour = ""
    name = {"cat": random.choice(("cat", "cat face"))}.get(thing.name, thing.name)
    if thing.count > 1:
        name += "s"
    words = [NUMBERS.get(thing.count, ""), thing.size, colour, name]
    phrase = " ".join(word for word in words if word)
    if thing.count > 1:
        return phrase
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _place(thing: Thing, random: Random) -> str:
    if thing.place not in ("left", "right"):
        return ""
    return random.choice(_SIDES).format(thing.place)


def _pair(scene: Scene, random: Random) -> str:
    first, second = scene.things
    one, other = _phrase(first, random), _phrase(second, random)
    forms = _VERTICAL if first.place == "above" else _BESIDE
    return random.choice(forms).format(one, other)
