"""Streams and long polls that are aborted, idle connections, and malformed requests."""

import random
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from lives import Life, Watch, pause, until
from malformed import Generator, send
from report import Report

ROUND = 100
"""Streams that are opened together and aborted together."""
RESET = struct.pack("ii", 1, 0)


def connect(life: Life) -> socket.socket:
    return socket.create_connection(("127.0.0.1", life.port), timeout=60)


def abort(line: socket.socket) -> None:
    """Close with a reset, as a client does that crashes."""
    with suppress(OSError):
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    line.close()


def abort_streams(report: Report, folder: Path, streams: int, idle: int, seed: int) -> None:
    """Rounds of event streams and long polls that are aborted beside idle connections, while tasks
    are drawn, so that there is news for them."""
    chance = random.Random(seed)
    life = Life(report, folder / "streams", "--max-queue", "2000")
    life.start()
    resting = [connect(life) for _ in range(idle)]
    report.add("idle connections held", len(resting))
    over = threading.Event()
    feeder = threading.Thread(target=_feed, args=(life, over))
    feeder.start()
    try:
        with Watch(life, "streams are aborted") as watch:
            for start in range(0, streams, ROUND):
                _one_round(report, life, chance, min(ROUND, streams - start))
    finally:
        over.set()
        feeder.join()
    report.add("slowest /status beside streams, ms", round(watch.slowest_s * 1000))
    for line in resting:
        abort(line)
    life.answers("after the streams")
    drained = until(lambda: life.get("/queue").json()["length"] == 0)
    report.check(drained, "the queue was not worked off after the streams")
    life.close()


def _feed(life: Life, over: threading.Event) -> None:
    body = {"prompt": "x", "width": 64, "height": 64, "steps": 2}
    while not over.is_set():
        life.ask("POST", "/generate", json=body)
        over.wait(0.1)


def _one_round(report: Report, life: Life, chance: random.Random, number: int) -> None:
    body = {"prompt": "x", "width": 64, "height": 64, "steps": 5}
    task_id = life.ask("POST", "/generate", json=body).json()["task_id"]
    targets = {
        f"/status?task_id={task_id}&wait=60&since=99999999999999": "long polls aborted",
        "/events": "event streams aborted",
        f"/events?task_id={task_id}": "event streams aborted",
    }
    lines = []
    for _ in range(number):
        target = chance.choice(list(targets))
        line = connect(life)
        line.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        lines.append(line)
        report.add(targets[target])
    pause(chance.uniform(0, 0.3))
    for line in lines:
        if chance.random() < 0.3:
            with suppress(OSError):
                line.shutdown(socket.SHUT_WR)
        abort(line) if chance.random() < 0.5 else line.close()


def send_malformed(report: Report, folder: Path, requests: int, seed: int) -> None:
    """Sends malformed requests from several clients. Accepted tasks are generated."""
    life = Life(report, folder / "malformed", "--max-queue", "50", "--sync-max-wait-s", "60")
    life.start()
    made = Generator(seed)
    wanted = [made.next() for _ in range(requests)]

    def one(number: int) -> None:
        answer = send(life.port, wanted[number])
        what = f"{wanted[number].kind} {number}: {wanted[number].data[:200]!r}"
        report.answered(what, answer)
        report.add("malformed requests")
        if wanted[number].whole and answer.status in ("", "timeout"):
            report.violation(
                "unresponsive", f"{what} -> {answer.status or 'closed without an answer'}"
            )

    with Watch(life, "malformed requests") as watch, ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(requests)))
    report.add("slowest /status beside malformed requests, ms", round(watch.slowest_s * 1000))
    drained = until(lambda: life.get("/queue").json()["length"] == 0)
    report.check(drained, "the queue was not worked off after the malformed requests")
    body = {"prompt": "x", "width": 64, "height": 64, "steps": 1}
    task_id = life.ask("POST", "/generate", json=body).json()["task_id"]
    answer = life.ask("GET", "/image", params={"task_id": task_id, "wait": "60"})
    report.check(answer.status_code == 200, f"no picture after the malformed requests: {answer}")
    life.close()
