"""`make chaos`: faults of clients and of the machine, against a real server with the tiny model.

Streams that are aborted, malformed requests, kill -9 in the middle of work, SIGSTOP, full and
missing disks, a locked database. All traffic stays on 127.0.0.1. Ends with a table, and with exit
code 1 if anything was lost, drawn twice, unresponsive, or answered with an internal error.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from faults import run_faults
from kills import kill_again_and_again
from lives import raise_the_limit_of_open_files
from report import Report, write_part
from storms import abort_streams, send_malformed

SEED = 20240917
PARTS = ("streams", "malformed", "kills", "faults")
USAGE = (
    "`make chaos` runs it (minutes; the full disks only as root on Linux), "
    "`make chaos ARGS=--quick` a smoke run, `make chaos ARGS=--write` writes this page. "
    "Everything random has a seed."
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run, less than a minute")
    parser.add_argument("--seed", type=int, default=SEED, help="of everything random")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone")
    parser.add_argument("--write", action="store_true", help="write the table to docs/chaos.md")
    options = parser.parse_args(argv)
    quick, seed, report = options.quick, options.seed, Report()
    idle = min(100 if quick else 300, raise_the_limit_of_open_files() // 4)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        parts = {
            "streams": lambda: abort_streams(report, folder, 200 if quick else 5_000, idle, seed),
            "malformed": lambda: send_malformed(report, folder, 300 if quick else 5_000, seed),
            "kills": lambda: kill_again_and_again(report, folder, 2 if quick else 25, seed),
            "faults": lambda: run_faults(
                report, folder, pause_s=2 if quick else 20, lock_s=2 if quick else 10
            ),
        }
        for part in options.only or PARTS:
            print(f"{part} ...", flush=True)
            report.attempt(part, parts[part])
    report.add("seconds", round(time.monotonic() - began))
    report.show()
    if options.write:
        part = report.part(__doc__ or "", USAGE)
        write_part(f"# Chaos\n\n{part}", several_machines=False)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
