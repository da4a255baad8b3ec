"""Durable submits: QueueManager.submit() over a TaskStore on disk, next to one in memory.

How to read it: `disk` is the server as it is (synchronous=FULL: one fsync a submit). With NORMAL
SQLite flushes at checkpoints only (a power cut may lose the last tasks), with OFF never; `memory`
is the same SQL without files. So disk minus OFF is what waiting for the disk costs, OFF minus
memory what files cost, and memory is the work of the code itself. The last line is a bare append
and fsync of 4 KB in the same folder.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from threading import Thread

from common import (
    Results,
    describe_fsyncs,
    fsyncs,
    make_params,
    make_scheduler,
    median,
    percentile,
    set_synchronous,
    temporary_folder,
)

from queue_manager import QueueManager
from storage.task_store import TaskStore

THREADS = (1, 8)


def main() -> None:
    results = Results(__file__, __doc__)
    rounds, seconds = (1, 0.2) if results.quick else (7, 0.8)
    with temporary_folder() as folder:
        stores = {
            "disk": TaskStore(folder / "full"),
            "disk, synchronous=NORMAL": TaskStore(folder / "normal"),
            "disk, synchronous=OFF": TaskStore(folder / "off"),
            "memory": TaskStore(None),
        }
        set_synchronous(stores["disk, synchronous=NORMAL"], "NORMAL")
        set_synchronous(stores["disk, synchronous=OFF"], "OFF")
        queues = {name: QueueManager(make_scheduler(store)) for name, store in stores.items()}
        rates: dict[tuple[str, int], list[float]] = defaultdict(list)
        waits: dict[tuple[str, int], list[float]] = defaultdict(list)
        syncs: list[float] = []
        for _ in range(rounds):
            syncs += fsyncs(folder, 50)
            for threads in THREADS:
                for name, queue in queues.items():
                    took = submit_for(queue, threads, seconds)
                    rates[name, threads].append(len(took) / seconds)
                    waits[name, threads].append(percentile(took, 99))
        for store in stores.values():
            store.close()
    rate = {key: median(values) for key, values in rates.items()}
    results.table(
        "Submits per second",
        ("store", "threads", "submits/s", "of memory", "ms each", "p99 ms of a caller"),
        [
            (
                name,
                threads,
                rate[name, threads],
                f"{rate[name, threads] / rate['memory', threads]:.2f}",
                1e3 / rate[name, threads],
                1e3 * median(waits[name, threads]),
            )
            for threads in THREADS
            for name in queues
        ],
    )
    waiting_ms = 1e3 / rate["disk", 1] - 1e3 / rate["disk, synchronous=OFF", 1]
    results.note(
        f"Waiting for the disk costs {waiting_ms:.2f} ms of the {1e3 / rate['disk', 1]:.2f} ms of "
        f"a durable submit (1 thread). {describe_fsyncs(syncs)}"
    )
    results.save()


def submit_for(queue: QueueManager, threads: int, seconds: float) -> list[float]:
    """Seconds that each submit took, of so many threads that submit for so long."""
    took: list[float] = []
    until = time.perf_counter() + seconds

    def submit() -> None:
        params = make_params()
        while (start := time.perf_counter()) < until:
            queue.submit(params)
            took.append(time.perf_counter() - start)

    run_threads(submit, threads)
    return took


def run_threads(work: Callable[[], None], count: int) -> None:
    threads = [Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
