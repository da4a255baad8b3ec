"""`make cluster-chaos`: faults of the machines of a cluster, with a real Redis and real workers.

A head that draws itself and five workers; their generator sleeps and signs its pictures, so that a
picture in the wrong task is seen. Faults come at random, several at a time: kill -9 of a worker, of
the head, of Redis; Redis wiped; SIGSTOP of a worker for longer than its lease; drain and resume;
connections that stall, are cut, or of which one end has gone; dropped packets; a clock that is an
hour wrong. Clients submit, cancel and fetch all the while. Ends with a table, and with exit code 1
if a task was lost, a picture changed after it was seen, or belonged to another task.
"""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cluster_clients import Clients
from cluster_faults import BrokenCluster
from lives import until
from report import MUST_BE_ZERO, Report, write_part

SEED = 20240917
USAGE = (
    "`make cluster-chaos` runs it, `make cluster-chaos ARGS=--quick` a smoke run; with "
    "`--write` it writes this part. Packets are dropped in a network namespace, which needs "
    "root on Linux; delay and loss are those of a proxy."
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make cluster-chaos", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, about a minute")
    parser.add_argument("--seed", type=int, default=SEED, help="of everything random")
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--tasks", type=int, default=2_000)
    parser.add_argument("--write", action="store_true", help="write the table to docs/chaos.md")
    parser.add_argument("--logs", type=Path, help="folder for the logs of all processes")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _leave)
    faults, tasks = (8, 60) if options.quick else (options.faults, options.tasks)
    report, began = Report((*MUST_BE_ZERO, "wrong pictures")), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cluster-chaos-") as name:
        cluster = BrokenCluster(report, Path(name), options.seed)
        clients = Clients(report, cluster.head, options.seed, tasks)
        try:
            report.attempt("cluster", lambda: _run(report, cluster, clients, faults))
        finally:
            cluster.close()
            if options.logs:
                cluster.write_logs(options.logs)
        clients.check_records()
    report.add("seconds", round(time.monotonic() - began))
    report.show()
    if options.write:
        part = report.part(__doc__ or "", USAGE, f", seed {options.seed}")
        write_part(part, several_machines=True)
    return int(report.failed)


def _run(report: Report, cluster: BrokenCluster, clients: Clients, faults: int) -> None:
    report.check(until(cluster.all_there, 120), "not all workers have registered")
    cluster.draws_without_the_broker(lambda: clients.submit(10_000 + len(clients.stories)).task_id)
    clients.start()
    cluster.rage(faults, lambda: False, (0.5, 2.5))
    report.check(until(lambda: not clients.alive, 600), "the clients have not ended")
    report.check(until(cluster.all_there, 120), "not all workers have come back")

    def is_empty() -> bool:
        return int(cluster.head.ask("GET", "/queue").json()["length"]) == 0

    report.check(until(is_empty, 120), "the queue was not worked off")
    clients.check()


def _leave(number: int, frame: object) -> None:
    sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
