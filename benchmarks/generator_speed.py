"""The overhead of the server: a batch of 50 pictures through queue, worker and store, next to
a bare loop of mflux's generate_image that encodes each picture itself.

How to read it: both draw the same pictures with the same tiny model in this process, each on a
thread of its own, in alternating rounds; `ratio` is the median of server / bare loop over the
rounds, the batch as a whole, from the first claim to the last image on disk. `one task` asks for
all pictures of a prompt at once (count), the others with a task for each. `alternating` has two
models and memory for one: the bare loop gets the best order (two loads), the server finds it.
Goal: at most 1.01, below 1.0 where encoding (PNG) overlaps with drawing.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import ParamSpec

from common import Results, median, temporary_folder

from allowed import Allowed
from generation.pipelines import arguments, build
from generator import MfluxGenerator
from models.mflux_registry import find_model
from models.model_catalog import LoadSpec
from queue_manager import QueueManager
from scheduler.events import EventKind
from scheduler.limits import QueueLimits
from scheduler.scheduler import Scheduler
from scheduler.worker_api import WorkerApi
from storage.task_store import TaskStore
from task import GenerationParams, Stage
from timing_model import TimingModel
from workers.worker import Worker

GOAL = 1.01
P = ParamSpec("P")


@dataclass(frozen=True)
class Batch:
    name: str
    image_format: str
    models: tuple[str, ...] = ("noise-flux1",)
    prompts: int = 1
    """Number of different prompts."""
    count: int = 1
    """Images of each task."""
    side: int = 512


BATCHES = (
    Batch("one task, JPEG", "JPEG", count=50),
    Batch("one task, PNG", "PNG", count=50),
    Batch("repeated prompt, JPEG", "JPEG"),
    Batch("repeated prompt, PNG", "PNG"),
    Batch("new prompts, JPEG", "JPEG", prompts=50),
    Batch("FLUX.2, repeated prompt, JPEG", "JPEG", models=("noise-flux2",)),
    Batch("FLUX.2, new prompts, JPEG", "JPEG", models=("noise-flux2",), prompts=50),
    Batch("alternating models, JPEG", "JPEG", models=("noise-flux1", "noise-flux2")),
)


def main() -> None:
    results = Results(__file__, __doc__)
    rounds, pictures = (1, 4) if results.quick else (2, 50)
    rows = []
    with temporary_folder() as checkpoints:
        for batch in BATCHES:
            asked = requests_of(batch, pictures)
            bare: list[float] = []
            ours: list[float] = []
            for _ in range(rounds):
                bare.append(on_a_thread(bare_loop, asked, checkpoints))
                ours.append(server(asked, checkpoints))
            ratios = [a / b for a, b in zip(ours, bare, strict=True)]
            rows.append((batch.name, pictures, median(bare), median(ours), median(ratios)))
    results.table(
        "Seconds of a batch",
        ("batch", "pictures", "bare loop", "server", "ratio"),
        [(*row[:4], f"{row[4]:.3f}") for row in rows],
    )
    results.note(f"Goal: at most {GOAL}.")
    results.save()


def requests_of(batch: Batch, pictures: int) -> list[GenerationParams]:
    """The tasks of a batch; pictures / count of them."""
    count = min(batch.count, pictures)
    return [
        GenerationParams(
            prompt=f"a lighthouse, number {number % batch.prompts}",
            seed=number * count,
            width=batch.side,
            height=batch.side,
            steps=4,
            guidance=None,
            format="PNG" if batch.image_format == "PNG" else "JPEG",
            quality=85,
            model=batch.models[number % len(batch.models)],
            count=count,
        )
        for number in range(pictures // count)
    ]


def weights_of(name: str) -> LoadSpec:
    model = find_model(name)
    assert model
    return LoadSpec(model, model.pipelines[0], None)


def bare_loop(asked: Sequence[GenerationParams], checkpoints: Path) -> float:
    """Calls mflux directly, in the order that loads each model once."""
    import mlx.core as mx

    started_at = 0.0
    for name in dict.fromkeys(params.model for params in asked):
        weights = weights_of(name)
        pipeline = build(weights, checkpoints)[0]
        mx.eval(pipeline.parameters())
        started_at = started_at or perf_counter()  # loading the first model counts on neither side
        for params in asked:
            if params.model != name:
                continue
            for index in range(params.count):
                stage = Stage(weights, params).image(index)
                generated = pipeline.generate_image(**arguments(stage, checkpoints))
                buffer = BytesIO()
                options = {} if params.format == "PNG" else {"quality": params.quality}
                generated.image.save(buffer, format=params.format, **options)
    return perf_counter() - started_at


def server(asked: Sequence[GenerationParams], checkpoints: Path) -> float:
    """The same through the server's queue, worker and store."""
    first = dict.fromkeys(params.model for params in asked)
    models = tuple(weights_of(name).model for name in first)
    allowed = Allowed(models[0], models)
    with temporary_folder() as folder:
        store = TaskStore(folder)
        limits = QueueLimits(max_queue=1000, max_delay_s=3600.0)
        scheduler = Scheduler(allowed, TimingModel(), store, limits)
        queue = QueueManager(scheduler)
        worker = Worker(WorkerApi(scheduler), MfluxGenerator(checkpoints), lambda error: None)
        for params in asked:
            queue.submit(params)
        heard = queue.events.last_id
        worker.start()
        started_at, done = 0.0, 0
        while done < len(asked):
            events = queue.events.wait(heard, 600)
            assert events, "the worker is stuck"
            for event in events:
                heard = event.id
                if event.kind is EventKind.RUNNING:
                    started_at = started_at or perf_counter()
                assert event.kind is not EventKind.FAILED
                done += event.kind is EventKind.DONE
        seconds = perf_counter() - started_at
        worker.stop(10)
        store.close()
    return seconds


def on_a_thread(work: Callable[P, float], *args: P.args, **kwargs: P.kwargs) -> float:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work, *args, **kwargs).result()


if __name__ == "__main__":
    main()
