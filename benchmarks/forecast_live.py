"""Accuracy of the forecasts of a real server: 60 mixed tasks on the tiny model.

A client submits over HTTP, five tasks at a time, and notes for each what /generate said and when
/status said that it was done. Steps of the tiny model take milliseconds, so the noise of a shared
machine is large beside them; the replay in forecast_error.py shows what the model itself can do.
"""

import random
import time
from statistics import fmean, median

from common import Results, temporary_folder
from memory import TinyServer

SIDES = (512, 768, 1024)
STEPS = (4, 10, 30, 60)
AT_A_TIME = 5
WARM = 10
"""Number of tasks that are only learned."""


def main() -> None:
    results = Results(__file__, __doc__)
    tasks = 15 if results.quick else 60 + WARM
    dice = random.Random(1)
    said: list[tuple[float, float, float]] = []  # forecast, p90, truth
    running: dict[str, tuple[float, float, float]] = {}  # id: forecast, p90, submitted at
    with temporary_folder() as folder:
        server = TinyServer(folder)
        submitted = 0
        while len(said) < tasks:
            while len(running) < AT_A_TIME and submitted < tasks:
                body = {
                    "prompt": "a lighthouse",
                    "width": dice.choice(SIDES),
                    "height": dice.choice(SIDES),
                    "steps": dice.choice(STEPS),
                }
                at = time.monotonic()
                answer = server.ask("/generate", body)
                forecast = (answer["expected_time_seconds"], answer["wait_p90_s"], at)
                running[answer["task_id"]] = forecast
                submitted += 1
            for task_id, (forecast_s, p90_s, at) in list(running.items()):
                if server.ask(f"/status?task_id={task_id}")["status"] == "done":
                    said.append((forecast_s, p90_s, time.monotonic() - at))
                    del running[task_id]
            time.sleep(0.005)
        stats = server.ask("/stats")
        server.kill()
    warm = said[WARM:]
    errors = [abs(forecast / truth - 1) for forecast, _, truth in warm]
    results.table(
        f"{len(warm)} tasks after {WARM}",
        ["", "median error %", "mean error %", "inside p90 %"],
        [
            [
                "the client",
                100 * median(errors),
                100 * fmean(errors),
                100 * fmean(truth <= p90 for _, p90, truth in warm),
            ],
            ["/stats", 100 * stats["median_error"], "", 100 * stats["share_inside_p90"]],
        ],
    )
    results.save()


if __name__ == "__main__":
    main()
