"""What a worker depends on: a source of tasks, and something that draws."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from PIL.Image import Image

from errors import ServerError
from models.model_catalog import LoadSpec, LoraFit
from task import Drawn, Encoded, Memory, Progress, Report, Stage, Task, Verdict


class Generator(Protocol):
    def load(self, spec: LoadSpec, report: Callable[[float], None]) -> int | None:
        """Load weights, making room first; returns the bits they are quantized to, or None.

        Args:
            report: called between two parts with the share that is loaded, 0 to 1. What it raises
                ends the load.

        Raises:
            ModelLoadError: with what the operator can do.
            UnusableAdapter: one of the adapters is broken, or does not fit the model.
        """

    def save_copies(self, may_continue: Callable[[], bool]) -> bool:
        """Save copies of quantized weights, so that they are loaded faster the next time. Returns
        whether there is a new one.

        Args:
            may_continue: asked now and then; False: the copy that is being saved is given up.
        """

    def apply_adapters(self, spec: LoadSpec) -> None:
        """Apply the adapters of a load spec whose weights are in memory, in place of others.

        Raises:
            UnusableAdapter: one of them is broken, or does not fit the model.
        """

    def unload(self) -> None:
        """Free all weights."""

    def generate(self, stage: Stage, inputs: Path, report: Report) -> Drawn:
        """Generates one picture. The weights must be loaded, with the stage's adapters.

        Args:
            inputs: folder of the pictures that the stage's params name.
        """

    def prepare(self, stage: Stage, inputs: Path, report: Report) -> str | Image:
        """Run a helper model that is loaded; returns a prompt or a control image."""

    @property
    def resident(self) -> tuple[str, ...]:
        """Keys of the weights in memory, the latest used first; any thread may ask."""

    @property
    def memory(self) -> Memory:
        """After the latest step; any thread may ask."""

    def refusal(self, stage: Stage, *, memory: bool = True) -> ServerError | None:
        """Why this picture cannot be made, with the field at fault, or None; any thread may ask.

        Args:
            memory: whether it must fit into this machine's memory.
        """

    def fit_of_adapter(self, path: Path, weights: LoadSpec) -> LoraFit:
        """How the adapter in a file fits the model of a load spec; any thread may ask."""

    def check_adapters(self, weights: LoadSpec) -> tuple[str, ...]:
        """Answer a warning for each adapter that fits the model in part; any thread may ask.

        Raises:
            UnusableAdapter, NotSupported: an adapter is broken, missing, or of another model.
        """


class TaskSource(Protocol):
    """scheduler/worker_api.py says what each does."""

    @property
    def stopping(self) -> bool: ...
    @property
    def first_spec(self) -> LoadSpec: ...
    @property
    def has_work(self) -> bool: ...
    def copies_saved(self) -> None: ...
    def load_started(self, spec: LoadSpec) -> None: ...
    def load_finished(
        self,
        spec: LoadSpec,
        bits: int | None,
        resident: Sequence[str],
        *,
        learn: bool = True,
        memory: Memory | None = None,
    ) -> None: ...
    def load_reported(self, share: float) -> bool: ...
    def load_failed(self, message: str, resident: Sequence[str], *, fatal: bool) -> None: ...
    def now_resident(self, resident: Sequence[str]) -> None: ...
    def next_load_order(self) -> LoadSpec | None: ...
    def claim(self, timeout_s: float | None = None) -> Task | None: ...
    def claim_preempting(self, task_id: str, attempt: int) -> Task | None: ...
    def inputs_of(self, task_id: str) -> Path: ...
    def report(self, task_id: str, attempt: int, progress: Progress) -> Verdict: ...
    def store_image(self, task_id: str, attempt: int, encoded: Encoded) -> bool: ...
    def finish(self, task_id: str, attempt: int, encoded: Encoded) -> bool: ...
    def fail(self, task_id: str, attempt: int, code: str, message: str) -> bool: ...
    def release(self, task_id: str, attempt: int, *, interrupted: bool = False) -> bool: ...
    def left(self, task_id: str) -> None: ...
    def prune(self) -> None: ...
    def stop(self, drain_s: float = 0.0) -> None: ...
