"""Workers that are alive and make no progress: their GPU hangs, or their worker thread does.

A worker has stalled when nothing has come for STALL_FACTOR times as long as the present step, phase
or load is forecast to take, and for LEAST_S at least: first steps and loads of large models take
minutes, and nothing is known of a model that was never run.
"""

from cluster.remote_machine import RemoteMachine
from scheduler.scheduler import Scheduler

LEAST_S = 600.0
STALL_FACTOR = 20.0


def stalled_s(remote: RemoteMachine, scheduler: Scheduler, at: float) -> float | None:
    """For how many seconds a worker that has stalled has made no progress; None: it has not
    stalled, or has nothing to do (locked).

    Args:
        at: a reading of the monotonic clock.
    """
    machine, offered = remote.machine, remote.offered
    run = machine.last_on_gpu
    if remote.stalled or remote.lost or not (run or offered):
        return None
    since, expected_s = remote.progress_at, 0.0
    if run:
        since = max(since, run.claimed_at)
        expected_s = scheduler.forecaster.remaining.phase_s(run, run.step_started_at)
    elif offered:
        since = max(since, offered.at)
    if machine.loading is not None:
        expected_s = scheduler.estimates.load_s(machine.loading)
    return at - since if at - since > max(LEAST_S, STALL_FACTOR * expected_s) else None
