"""A picture that tests send, and where the server keeps it."""

from pathlib import Path

from PIL import Image, ImageDraw

from images import to_png


def drawing(width: int = 64, height: int = 64) -> Image.Image:
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).polygon((4, height - 4, width // 2, 4, width - 9, height - 9), "teal")
    return picture


PNG = to_png(drawing())


def inputs_in(data_dir: Path) -> set[str]:
    return {folder.name for folder in (data_dir / "inputs").iterdir()}
