"""Trains the built-in model by flow matching, with mflux's own modules.

    python -m models.painter.training FOLDER --steps 60000

mlx computes on one core of a CPU. With several, each process computes a part of the batch:

    mlx.launch -n 2 -- python -m models.painter.training FOLDER --steps 60000

On Linux a third of the time is saved by OPENBLAS_CORETYPE=SKYLAKEX, on CPUs with AVX-512, and by
MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000, which keep freed memory.

FOLDER is outside of the repository. It holds the latest state (the same command goes on from it),
the log, `model`, a checkpoint of the averaged weights, and these as one file.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from models.mlx_setup import prepare_mlx
from models.painter.batches import (
    ALL_SIZES_FROM,
    LARGE,
    MIDDLE,
    SMALL,
    Batch,
    Bucket,
    bucket_at,
    make_batch,
)
from models.painter.checkpoint import Parts, initial_weights, load, pack, unpacked, write_checkpoint
from models.painter.dimensions import Dimensions
from models.painter.grammar import random_scene
from models.painter.layout import COUNT, Layout
from models.painter.patches import Patches, fit
from models.painter.reading import LESSONS, teach
from models.painter.rendering import render
from models.painter.vocabulary import T5_LENGTH

FOLDERS = {
    "transformer": "transformer",
    "clip_text_encoder": "text_encoder",
    "t5_text_encoder": "text_encoder_2",
}
_EMA = 0.999
_STEADY_RATE = 0.7  # share of the training; then the learning rates fall


@dataclass(frozen=True)
class Plan:
    steps: int
    rate: float = 2e-3  # of AdamW
    matrix_rate: float = 0.015  # of Muon
    warm_up: int = 300  # steps
    lessons: int = LESSONS  # of the text encoders, before the first step
    seed: int = 1
    size: Bucket | None = None  # of all pictures, in place of the curriculum
    start: Path | None = None  # a file of weights that are trained further, with all sizes


def rate_at(plan: Plan, step: int) -> float:
    """Returns the share of the learning rates: linear warm-up, steady, then a line to 1/50."""
    over = (step / plan.steps - _STEADY_RATE) / (1 - _STEADY_RATE)
    return min((step + 1) / plan.warm_up, 1.0, max(0.02, 1 - 0.98 * over))


def fit_patches(counts: tuple[int, int, int] = (300, 250, 60)) -> Patches:
    """Fits the patch transform on pictures of 128, 256 and 512 pixels; always the same."""
    batches = []
    for bucket, count in zip((SMALL[0], MIDDLE[0], LARGE[0]), counts, strict=True):
        pictures = []
        values = np.random.default_rng(0).uniform(-1, 1, (count, COUNT)).tolist()
        for number in range(count):
            scene, layout = random_scene(Random(number)), Layout(tuple(values[number]))
            picture = render(scene, bucket.width, bucket.height, layout)
            pictures.append(np.asarray(picture, np.float32) / 127.5 - 1)
        batches.append(np.stack(pictures))
    return fit(batches)


class Trainer:
    """The model, its optimizer and the averages of its weights."""

    def __init__(self, folder: Path, plan: Plan, dimensions: Dimensions, patches: Patches) -> None:
        import mlx.core as mx
        from mlx import optimizers

        self._mx, self._plan, self._folder = mx, plan, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.patches = patches
        group = mx.distributed.init()
        self.rank = group.rank()
        self._processes = group.size()
        if plan.start:
            weights = unpacked(plan.start)
        else:
            weights = initial_weights(dimensions, self.patches, plan.seed)
        self._vae = weights["vae"]
        start = folder / f"start-{self.rank}"
        write_checkpoint(start, weights)
        flux = load(start, dimensions)
        self._tokenizers = flux.tokenizers
        self.model = trained_parts(flux)
        matrices = optimizers.Muon(plan.matrix_rate, weight_decay=0)
        others = optimizers.AdamW(plan.rate, betas=[0.9, 0.98], weight_decay=0.01)
        self._rates = (plan.matrix_rate, plan.rate)
        self._optimizer = optimizers.MultiOptimizer([matrices, others], [_is_matrix])
        self._compiled: dict[Bucket, Callable[..., Any]] = {}
        self.step = 0
        is_new = not (folder / "state.safetensors").exists()
        if is_new and not plan.start:
            teach(self.model, self._tokenizers, dimensions.text_width, plan.lessons, plan.seed)
        # Pictures would teach the text encoders little, and training them takes a third of a step.
        self.model.t5_text_encoder.freeze()
        self.model.clip_text_encoder.freeze()
        self._optimizer.init(self.model.trainable_parameters())
        self._averages = self._weights()
        if not is_new:
            self._restore()

    def train_step(self) -> tuple[float, Bucket]:
        """Returns the loss and the size of the pictures."""
        mx, plan = self._mx, self._plan
        random = Random(plan.seed * 7919 + self.step)
        progress = max(self.step / plan.steps, ALL_SIZES_FROM if plan.start else 0.0)
        bucket = plan.size or bucket_at(progress, random)
        # Each process draws pictures of its own.
        number = self.step * self._processes + self.rank
        batch = make_batch(self.patches, self._tokenizers, bucket, number, plan.seed)
        for optimizer, rate in zip(self._optimizer.optimizers, self._rates, strict=True):
            optimizer.learning_rate = rate * rate_at(plan, self.step)
        loss = self._run(batch)
        decay = min(_EMA, (1 + self.step) / (10 + self.step))
        for name, value in self._weights().items():
            self._averages[name] = decay * self._averages[name] + (1 - decay) * value
        mx.eval(self.model.parameters(), self._optimizer.state, self._averages)
        self.step += 1
        return float(loss.item()), batch.bucket

    def save(self) -> None:
        """Writes the state; a crash leaves the former one. One of the processes writes."""
        if self.rank > 0:
            return
        from mlx.utils import tree_flatten

        parameters = tree_flatten(self.model.parameters())
        state = {f"model.{name}": value for name, value in parameters}
        state |= {f"average.{name}": value for name, value in self._averages.items()}
        for name, value in tree_flatten(self._optimizer.state):
            state[f"optimizer.{name}"] = value
        draft = self._folder / "draft.safetensors"
        self._mx.save_safetensors(str(draft), state, {"step": str(self.step)})
        draft.rename(self._folder / "state.safetensors")

    def export(self) -> Path:
        """Writes the averaged weights as a checkpoint and returns its folder."""
        from mlx.utils import tree_flatten

        if self.rank > 0:
            return self._folder / "model"
        parts: Parts = {"vae": self._vae, **{folder: {} for folder in FOLDERS.values()}}
        for name, value in (dict(tree_flatten(self.model.parameters())) | self._averages).items():
            attribute, _, rest = name.partition(".")
            parts[FOLDERS[attribute]][rest] = np.array(value, np.float32)
        write_checkpoint(self._folder / "model", parts)
        pack(self._folder / "weights.safetensors", parts)
        return self._folder / "model"

    def _weights(self) -> dict[str, Any]:
        from mlx.utils import tree_flatten

        return dict(tree_flatten(self.model.trainable_parameters()))

    def _restore(self) -> None:
        from mlx.utils import tree_unflatten

        path = str(self._folder / "state.safetensors")
        loaded: Any = self._mx.load(path, return_metadata=True)
        state, notes = loaded

        def under(prefix: str) -> dict[str, Any]:
            return {
                name.removeprefix(prefix): value
                for name, value in state.items()
                if name.startswith(prefix)
            }

        self.model.update(tree_unflatten(list(under("model.").items())))
        self._averages = under("average.")
        self._optimizer.state = tree_unflatten(list(under("optimizer.").items()))
        self.step = int(notes["step"])

    def _run(self, batch: Batch) -> Any:
        mx, bucket = self._mx, batch.bucket
        from models.painter.batched import rotary_table

        if bucket not in self._compiled:
            table = rotary_table(self.model.transformer, bucket.height, bucket.width, T5_LENGTH)
            state = [self.model.state, self._optimizer.state]
            self._compiled[bucket] = partial(
                mx.compile(self._update, inputs=state, outputs=state), rotary=table
            )
        return self._compiled[bucket](*map(mx.array, batch.arrays))

    def _update(self, *arrays: Any, rotary: Any) -> Any:
        from mlx import nn, optimizers

        loss, gradients = nn.value_and_grad(self.model, partial(loss_of, self.model))(
            *arrays, rotary
        )
        gradients = nn.average_gradients(gradients)
        gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
        self._optimizer.update(self.model, gradients)
        return loss


def trained_parts(flux: Any) -> Any:
    """Returns a module of what is trained of a loaded model: all but the VAE."""
    from mlx import nn

    parts = nn.Module()
    for attribute in FOLDERS:
        setattr(parts, attribute, getattr(flux, attribute))
    return parts


def _is_matrix(name: str, array: Any) -> bool:
    """Says whether Muon trains it: the matrices of the blocks."""
    return ".single_transformer_blocks." in f".{name}" and array.ndim == 2 and ".norm." not in name


def loss_of(  # noqa: PLR0917
    model: Any,
    latents: Any,
    noise: Any,
    sigmas: Any,
    weights: Any,
    t5: Any,
    clip: Any,
    rotary: Any,
) -> Any:
    """Returns the mean squared error of the predicted noise minus picture."""
    import mlx.core as mx

    from models.painter.batched import encode_clip, encode_t5, predict

    level = sigmas[:, None, None]
    noisy = (1 - level) * latents + level * noise
    each = len(latents) // len(t5)
    texts = mx.repeat(encode_t5(model.t5_text_encoder, t5), each, axis=0)
    pooled = mx.repeat(encode_clip(model.clip_text_encoder, clip), each, axis=0)
    predicted = predict(model.transformer, noisy, sigmas, texts, pooled, rotary)
    errors = (predicted - (noise - latents)).square().mean(-1)
    # The first steps of a picture decide what it shows: they count more.
    return (errors * weights * sigmas[:, None]).mean() / sigmas.mean()


def train(folder: Path, plan: Plan, dimensions: Dimensions, *, seconds: float) -> None:
    """Trains until the plan's steps are done, or for some seconds. Saves every 150 seconds.

    Raises:
        FloatingPointError: the loss is no number; the saved state is from before.
    """
    trainer = Trainer(folder, plan, dimensions, fit_patches())
    started = saved = time.monotonic()
    losses: dict[int, list[float]] = {}
    pictures, spent = 0, time.process_time()
    while trainer.step < plan.steps and time.monotonic() - started < seconds:
        loss, bucket = trainer.train_step()
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss at step {trainer.step} is {loss}")
        losses.setdefault(bucket.tokens, []).append(loss)
        pictures += bucket.batch
        if trainer.rank == 0 and (trainer.step % 50 == 0 or trainer.step == plan.steps):
            entry = {
                "step": trainer.step,
                "pictures": pictures,
                "cpu_s": round(time.process_time() - spent, 1),
                "wall_s": round(time.monotonic() - started, 1),
                "losses": {tokens: round(float(np.mean(v)), 4) for tokens, v in losses.items()},
            }
            with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
            losses = {}
        if time.monotonic() - saved > 150:
            trainer.save()
            trainer.export()
            saved = time.monotonic()
    trainer.save()
    trainer.export()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--rate", type=float, default=Plan.rate, help="of AdamW")
    parser.add_argument("--matrix-rate", type=float, default=Plan.matrix_rate, help="of Muon")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="pictures of 128 x 128 only")
    parser.add_argument(
        "--start", type=Path, help="a file of weights that are trained further, with all sizes"
    )
    options = parser.parse_args()
    prepare_mlx()
    plan = Plan(
        options.steps,
        options.rate,
        options.matrix_rate,
        seed=options.seed,
        size=SMALL[0] if options.small else None,
        start=options.start,
    )
    train(options.folder, plan, Dimensions(), seconds=options.seconds)


if __name__ == "__main__":
    main()
