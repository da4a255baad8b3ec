"""The built-in model: whether its pictures show what captions name, and how long they take.

    python benchmarks/built_in_model.py [--checkpoint FOLDER]

How to read it: captions are drawn at random from the grammar of the training, with a seed that the
training does not use. `colour`: a region of the named colour is in the right place. `found`: as
many regions as are named are in the right places and have the outline of the thing
(models/painter/evaluation.py says how). `sides`: of two things beside each other, the right one is
on the left. The same measure finds 100 % in the pictures that the training draws, and next to
nothing in noise. Seconds are CPU seconds of the second picture of a size. Goals: colour 90 %, found
and sides 80 %; 256 x 256 in 0.3 s, 1024 x 1024 in 3 s, a load in 0.5 s.

`kept`: correlation of the brightness of a picture with that of the input image that it was made
from, in 16 x 16 parts, with the prompt of the input image.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, Results, temporary_folder
from PIL import Image, ImageDraw

from models.mlx_setup import prepare_mlx
from models.painter.batches import STEPS
from models.painter.checkpoint import load, unpack
from models.painter.evaluation import evaluate, named_scenes
from models.painter.layout import MIDDLE
from models.painter.rendering import render

SEED = 987_654
SIZES = ((256, 256, 200), (512, 512, 60), (448, 256, 60), (1024, 1024, 20))
"""Width, height, captions."""
PROMPT = "a red ball on green grass"
STRENGTHS = (0.3, 0.6, 0.9)
IMAGE = ROOT / "docs" / "images" / "built-in.png"
SHEET = (
    "a red ball on green grass",
    "a lighthouse at sunset",
    "A beautiful landscape",
    "a blue star to the left of a yellow square",
    "three pink flowers in the snow",
    "a white house in the mountains at night",
    "an orange cat on a black background",
    "two red boats on the sea with clouds",
)

Draw = Callable[..., Image.Image]


def main(results: Results, checkpoint: Path | None) -> None:
    prepare_mlx()
    with temporary_folder() as folder:
        if checkpoint is None:
            checkpoint = folder / "model"
            unpack(checkpoint)
        load(checkpoint)  # imports mflux
        started = time.process_time()
        model = load(checkpoint)
        loading_s = time.process_time() - started

        def draw(prompt: str, seed: int, width: int, height: int, **more: Any) -> Image.Image:
            model.prompt_cache.clear()
            made = model.generate_image(
                seed=seed,
                prompt=prompt,
                num_inference_steps=STEPS,
                width=width,
                height=height,
                **more,
            )
            picture: Image.Image = made.image
            return picture

        measure_captions(results, draw, 10 if results.quick else 1)
        measure_input_images(results, draw, folder, 4 if results.quick else 40)
        if not results.quick:
            make_image(draw)
    results.note(f"Loading takes {loading_s:.2f} CPU seconds.")
    results.save()


def measure_captions(results: Results, draw: Draw, fewer: int) -> None:
    rows = []
    for width, height, count in SIZES:
        scenes = named_scenes(count // fewer, SEED)

        def of_size(prompt: str, seed: int, size: tuple[int, int] = (width, height)) -> Image.Image:
            return draw(prompt, seed, *size)

        scores = evaluate(of_size, scenes)
        seconds = min(timed(of_size) for _ in range(3))
        shares = [f"{value:.0%}" for value in (scores.colour, scores.found, scores.side)]
        rows.append((f"{width} x {height}", len(scenes), scores.things, *shares, seconds))
    results.table(
        "Captions", ("size", "captions", "things", "colour", "found", "sides", "CPU s"), rows
    )


def timed(draw: Callable[[str, int], Image.Image]) -> float:
    started = time.process_time()
    draw(PROMPT, 1)
    return time.process_time() - started


def measure_input_images(results: Results, draw: Draw, folder: Path, count: int) -> None:
    rows = []
    for strength in STRENGTHS:
        kept = []
        for number, (scene, text) in enumerate(named_scenes(count, SEED + 1)):
            source = render(scene, 256, 256, MIDDLE)
            source.save(folder / "source.png")
            more = {"image_path": folder / "source.png", "image_strength": strength}
            picture = draw(text, number, 256, 256, **more)
            kept.append(np.corrcoef(brightness(source), brightness(picture))[0, 1])
        rows.append((strength, len(kept), float(np.median(kept))))
    results.table("Input images", ("image_strength", "pictures", "kept (median)"), rows)


def make_image(draw: Draw) -> None:
    """Writes pictures of the model, each below its prompt, to the documentation."""
    side, line, columns = 256, 26, 4
    rows = -(-len(SHEET) // columns)
    canvas = Image.new("RGB", (side * columns, (side + line) * rows), "white")
    letters = ImageDraw.Draw(canvas)
    for number, prompt in enumerate(SHEET):
        x, y = number % columns * side, number // columns * (side + line)
        canvas.paste(draw(prompt, number + 1, side, side), (x, y + line))
        letters.text((x + 6, y + 7), prompt, fill="black")
    canvas.save(IMAGE, optimize=True)


def brightness(picture: Image.Image) -> Any:
    small = picture.convert("L").resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small, np.float64).ravel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--checkpoint", type=Path)
    known, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    main(Results(__file__, __doc__), known.checkpoint)
