"""What the operator has set, and what the queue tells of itself."""

from dataclasses import dataclass
from enum import StrEnum

from models.model_catalog import Weights
from queueing.held_tasks import Download
from timing_model import Forecast


class ServerState(StrEnum):
    LOADING = "loading"  # the worker loads the model; tasks are accepted and wait
    READY = "ready"  # nothing runs
    BUSY = "busy"  # a task runs
    DRAINING = "draining"  # the server is stopping; no new tasks
    FAILED = "failed"  # the model could not be loaded, or the disk refuses


@dataclass(frozen=True)
class Rules:
    """What the operator has set."""

    max_queue: int = 1000
    """Tasks that may wait."""
    max_wait_s: float = 0.0
    """Longest forecast wait with which a task is accepted; 0: no limit."""
    keep_s: float = 24 * 3600.0
    keep_bytes: int = 5_000_000_000
    input_bytes: int = 2_000_000_000
    """Of the input pictures of all tasks that wait or run."""
    refetch_s: float = 300.0
    affinity_s: float = 0.0
    """Seconds by which a task may be delayed in favour of others whose model is loaded."""
    models_in_memory: int = 1


@dataclass(frozen=True)
class QueueHealth:
    state: ServerState
    waiting: int
    running: int
    loaded: tuple[Weights, ...]
    """In memory, the latest used first."""
    loading: Weights | None
    download: Download | None
    """What comes from Hugging Face, for tasks that wait for it."""
    quantize: int | None
    """Bits that the latest of them are quantized to."""
    last_error: str | None


@dataclass(frozen=True)
class Stats:
    """What was learned, and how good the forecasts are."""

    timing_key: str
    """The server's own model and its quantization."""
    samples: int
    """Images learned from."""
    load_s: float
    forecasts: list[tuple[int, Forecast]]
    """For square pictures of STATS_SIDES, with the model's default steps."""
    outcomes: int
    """Forecasts at submit that could be compared with what came."""
    median_error: float | None
    """Of |forecast - truth| / truth."""
    share_inside_p90: float | None
    tasks_last_hour: int
    busy_share: float
    """Part of the last hour for which the GPU worked."""
