"""The countdown of a picture while it is drawn, with a model of real size (real_model.py).

How to read it: `below a third` is the share of the time, from the first second on, in which the
countdown showed less than a third of what was really left. `off` is how far it was from the truth
from the second step on, as a share of the truth, or of a fiftieth of the whole where less is left:
median, and the share of the time in which it was more than 15 %. `moves` is the longest time in
which the countdown did not change while the picture was drawn. Nothing is learned before the first
picture. Other programs on the machine change the truth: `slowest step` is against the median one.

REAL_SIZE_FOLDER names the checkpoint, which is written if it is missing. `--quick` uses a tiny
model.
"""

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from common import Results, median, temporary_folder
from memory import TinyServer
from real_limits import wait_until_loaded
from real_model import MODEL, write_model
from real_size import FOLDER

from models.mlx_setup import prepare_mlx

POLL_S = 0.25
SIDES = {"float32": (128, 128, 96), "q4": (64, 64)}
"""By the end of the folder's name. On a CPU, 4 bits are many times slower than 32."""
STEPS = 3
CLOSE, LEAST_SHARE = 0.15, 0.02
FIRST_S = 1.0


class Look(NamedTuple):
    """What one answer of /status said."""

    at_s: float
    left_s: float
    phase: str
    step: int


def main() -> None:
    results = Results(__file__, __doc__)
    gpu = prepare_mlx()
    kind = "q4" if FOLDER.name.endswith("q4") else "float32"
    sides, steps = ((64, 64), 2) if results.quick else (SIDES[kind], STEPS)
    model = ["--model", "noise-anima"]
    if not results.quick:
        write_model(FOLDER, float32=not gpu)
        model = ["--models", f"real={FOLDER}@{MODEL}"]
    with temporary_folder() as folder:
        server = TinyServer(folder / "data", model)
        try:
            wait_until_loaded(server)
            rows = [row_of(server, side, steps) for side in sides]
        finally:
            server.kill()
    header = (
        "size",
        "forecast s",
        "actual s",
        "slowest step",
        "below a third",
        "off",
        "more than 15 %",
    )
    results.table(f"{steps} steps", (*header, "still s"), rows)
    results.save()


def row_of(server: TinyServer, side: int, steps: int) -> tuple[object, ...]:
    """Draws a picture and looks at its countdown."""
    body = {
        "prompt": f"a lake {time.perf_counter()}",
        "width": side,
        "height": side,
        "steps": steps,
    }
    task = server.ask("/generate", body)
    start, looks = time.perf_counter(), list[Look]()
    while (status := server.ask(f"/status?task_id={task['task_id']}"))["status"] != "done":
        at_s, left_s = time.perf_counter() - start, float(status.get("wait_remaining") or 0.0)
        looks.append(Look(at_s, left_s, status.get("phase") or "", status.get("steps_done") or 0))
        time.sleep(POLL_S)
    whole_s = time.perf_counter() - start
    first = [look for look in looks if look.at_s >= FIRST_S] or looks
    low = [look.left_s < (whole_s - look.at_s) / 3 for look in first]
    later = [look for look in looks if look.step >= 1] or looks
    off = [
        abs(look.left_s - (whole_s - look.at_s)) / max(whole_s - look.at_s, LEAST_SHARE * whole_s)
        for look in later
    ]
    return (
        f"{side} x {side}",
        task["expected_time_seconds"],
        whole_s,
        slowest_step(looks),
        f"{100 * sum(low) / len(low):.0f} %",
        f"{100 * median(off):.0f} %",
        f"{100 * sum(one > CLOSE for one in off) / len(off):.0f} %",
        stillness_s(looks),
    )


def slowest_step(looks: Sequence[Look]) -> str:
    """Of its steps, the slowest against the median."""
    ends = [
        next((look.at_s for look in looks if look.step >= step), None)
        for step in range(max(look.step for look in looks) + 1)
    ]
    begun_s = next((look.at_s for look in looks if look.phase == "denoising"), 0.0)
    known = [begun_s, *(end for end in ends[1:] if end is not None)]
    steps_s = [after - before for before, after in pairwise(known)]
    return f"{max(steps_s) / max(median(steps_s), 0.01):.2f}" if steps_s else ""


def stillness_s(looks: Sequence[Look]) -> float:
    """The longest time without a change of the countdown."""
    longest_s, since = 0.0, looks[0]
    for look in looks:
        if look.left_s != since.left_s:
            since = look
        longest_s = max(longest_s, look.at_s - since.at_s)
    return longest_s


if __name__ == "__main__":
    main()
