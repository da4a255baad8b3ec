"""Trains a LoRA that draws in the style of a woodcut, for tests and as an example.

    python -m models.painter.style woodcut.safetensors --steps 300

The pictures are those of the training, printed with four inks. The built-in model does not change.
"""

import argparse
import time
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from safetensors.numpy import save_file

from models.mlx_setup import prepare_mlx
from models.painter.batches import SMALL, Bucket, make_batch
from models.painter.checkpoint import load, unpack
from models.painter.training import fit_patches, loss_of, trained_parts
from models.painter.vocabulary import T5_LENGTH

RANK = 8
LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
INKS = np.array([(38, 30, 28), (126, 92, 62), (214, 184, 138), (248, 240, 220)], np.uint8)
"""From dark to light."""
LIMITS = (70, 130, 190)
"""Brightness between the inks."""


def woodcut(picture: Image.Image) -> Image.Image:
    """Prints a picture with four inks and dark outlines."""
    grey = np.asarray(picture.convert("L"))
    printed = Image.fromarray(INKS[np.digitize(grey, LIMITS)])
    edges = np.asarray(picture.filter(ImageFilter.FIND_EDGES), np.int32).max(-1) > 60
    lines = Image.fromarray((edges * 255).astype(np.uint8))
    lines = lines.filter(ImageFilter.MaxFilter(3 if min(picture.size) < 400 else 5))
    printed.paste(Image.new("RGB", picture.size, tuple(INKS[0].tolist())), mask=lines)
    return printed


class StyleTrainer:
    """The built-in model and a LoRA of its blocks."""

    def __init__(self, folder: Path, rate: float = 3e-3, seed: int = 1) -> None:
        """Args:
        folder: of the checkpoint.
        """
        import mlx.core as mx
        from mlx import optimizers

        self._mx, self._seed = mx, seed
        self._patches = fit_patches()
        flux = load(folder)
        self._tokenizers = flux.tokenizers
        self._model = trained_parts(flux)
        random = np.random.default_rng(seed)
        self._fixed: dict[str, Any] = {}
        self.lora: dict[str, dict[str, Any]] = {}
        for number, block in enumerate(flux.transformer.single_transformer_blocks):
            for layer in LAYERS:
                name = f"single_transformer_blocks.{number}.{layer}"
                weight = self._fixed[name] = _at(block, layer).weight
                outputs, inputs = weight.shape
                down = random.standard_normal((RANK, inputs)) * inputs**-0.5
                self.lora[name] = {
                    "down": mx.array(down.astype(np.float32)),
                    "up": mx.zeros((outputs, RANK)),
                }
        self._optimizer = optimizers.Adam(rate, betas=[0.9, 0.98])
        self._step = 0

    def train_step(self, bucket: Bucket) -> float:
        from models.painter.batched import rotary_table

        mx = self._mx
        batch = make_batch(self._patches, self._tokenizers, bucket, self._step, self._seed, woodcut)
        table = rotary_table(self._model.transformer, bucket.height, bucket.width, T5_LENGTH)
        given = [*map(mx.array, batch.arrays), table]
        loss, gradients = mx.value_and_grad(self._loss)(self.lora, *given)
        self.lora = self._optimizer.apply_gradients(gradients, self.lora)
        mx.eval(self.lora, self._optimizer.state)
        self._step += 1
        return float(loss.item())

    def save(self, path: Path) -> None:
        """Writes the LoRA with the names that mflux reads, in half precision."""
        arrays = {}
        for name, pair in self.lora.items():
            for part, key in (("down", "lora_A"), ("up", "lora_B")):
                array: NDArray[Any] = np.array(pair[part], np.float16)
                arrays[f"transformer.{name}.{key}.weight"] = array
        save_file(arrays, path)

    def _loss(self, lora: dict[str, dict[str, Any]], *arrays: Any) -> Any:
        transformer = self._model.transformer
        for name, pair in lora.items():
            weight = self._fixed[name] + pair["up"] @ pair["down"]
            _at(transformer, name).weight = weight
        return loss_of(self._model, *arrays)


def _at(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("lora", type=Path, help="the file to write")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    prepare_mlx()
    with TemporaryDirectory() as folder:
        unpack(Path(folder))
        trainer = StyleTrainer(Path(folder))
        random, started, losses = Random(0), time.monotonic(), []
        for step in range(1, options.steps + 1):
            losses.append(trainer.train_step(random.choice(SMALL)))
            if step % 50 == 0:
                mean = float(np.mean(losses[-50:]))
                print(f"{step} steps, {time.monotonic() - started:.0f} s, loss {mean:.3f}")
                trainer.save(options.lora)
        trainer.save(options.lora)


if __name__ == "__main__":
    main()
