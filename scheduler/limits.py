"""Limits of the queue: those that the operator sets, and constant ones."""

from dataclasses import dataclass

MAX_INTERRUPTIONS = 2
ENDED_TOO_OFTEN = (
    "ended_too_often",
    f"The server ended {MAX_INTERRUPTIONS} times while this task ran, so it is not tried again. "
    "The usual cause is too little memory: ask for a smaller picture, a smaller model or fewer "
    "bits (quantize).",
)
ANONYMOUS_PIN_S = 90 * 24 * 3600.0
"""Seconds for which a client without a key pins a task: ids cost nothing."""


@dataclass(frozen=True)
class QueueLimits:
    max_queue: int = 1000
    """Tasks that may wait."""
    max_wait_s: float = 0.0
    """Longest forecast wait with which a task is accepted; 0: no limit."""
    keep_s: float = 24 * 3600.0
    """Seconds for which finished tasks are kept."""
    keep_bytes: int = 5_000_000_000
    """Of the stored images."""
    max_kept_pictures: int = 200
    """Images that one client may pin."""
    input_bytes: int = 2_000_000_000
    """Of the input images of all tasks that wait or run."""
    refetch_s: float = 300.0
    """Seconds for which an image that was fetched and marked for deletion can be fetched again."""
    max_delay_s: float = 0.0
    """Seconds by which a task may be delayed in favour of others whose model is loaded."""
    max_overtaken_s: float = 3600.0
    """GPU seconds of urgent tasks that may overtake a normal one; then it counts as urgent, too."""
    preempt: bool = False
    """Whether a waiting task may pause the running one (policy.py)."""
    models_in_memory: int = 1
    local_worker: bool = True
    """Whether the server's own machine draws."""


@dataclass(frozen=True)
class ClientLimits:
    """What one client may have waiting at a time; None: no limit of its own."""

    max_waiting: int | None = None
    """Tasks."""
    max_wait_seconds: float | None = None
    """Forecast GPU seconds of these tasks. A single task may take more."""


NO_LIMITS = ClientLimits()
