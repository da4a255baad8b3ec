"""Counters of a run, and their table."""

import json
import platform
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from malformed import Answer

MUST_BE_ZERO = ("500s", "unresponsive", "lost", "drawn twice", "tracebacks", "violations")
PAGE = Path(__file__).parent.parent.parent / "docs" / "chaos.md"
SEVERAL_MACHINES = "## Several machines\n"
"""Heading of the second part of the page; make chaos writes the first one."""


@dataclass
class Report:
    """Any thread may count."""

    must_be_zero: tuple[str, ...] = MUST_BE_ZERO
    counts: Counter[str] = field(default_factory=Counter)
    by_status: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, number: int = 1) -> None:
        with self._lock:
            self.counts[name] += number

    def violation(self, name: str, detail: str) -> None:
        """Counts something that must not happen."""
        with self._lock:
            self.counts[name] += 1
            if len(self.details) < 100:
                self.details.append(f"{name}: {detail[-600:]}")

    def check(self, right: bool, detail: str) -> None:
        if not right:
            self.violation("violations", detail)

    def survived(self, fault: str, right: bool) -> None:
        """A fault of the machine, and whether all went on as it must."""
        self.add("faults survived" if right else "faults not survived")
        self.check(right, fault)

    def attempt(self, name: str, part: Callable[[], None]) -> None:
        """Do a part; what it raises is a violation, and the next part goes on."""
        try:
            part()
        except Exception as error:
            traceback.print_exc()
            self.violation("violations", f"{name}: {type(error).__name__}: {error}")

    def answered(self, what: str, answer: Answer) -> None:
        """An answer to a malformed request."""
        with self._lock:
            self.by_status[answer.status or "none"] += 1
        if answer.status == "500" and not _task_failed(answer.body):
            self.violation("500s", f"{what!r} -> {answer.body[:300]!r}")

    @property
    def failed(self) -> bool:
        return bool(self.details) or any(self.counts[name] for name in self.must_be_zero)

    def table(self) -> str:
        """Markdown."""
        names = [name for name in self.counts if name not in self.must_be_zero]
        rows = [f"| {name} | {self.counts[name]:,} |" for name in names]
        if self.by_status:
            statuses = ", ".join(f"{name}: {n:,}" for name, n in sorted(self.by_status.items()))
            rows.append(f"| malformed requests by status | {statuses} |")
        rows += [f"| {name} (must be 0) | {self.counts[name]:,} |" for name in self.must_be_zero]
        return "\n".join(["| what | number |", "|---|---|", *rows])

    def show(self) -> None:
        print("\n" + self.table())
        for detail in self.details:
            print("VIOLATION", detail, file=sys.stderr)

    def part(self, script: str, usage: str, note: str = "") -> str:
        """Markdown: a part of the page.

        Args:
            script: docstring of the script that has run.
            usage: how it is run.
            note: what is added to date and machine.
        """
        place = f"2 cores, {platform.machine()}, {platform.system()}"
        lines = [
            script.strip().partition("\n\n")[2].replace("\n", " "),
            "",
            usage,
            "",
            f"Last run: {date.today().isoformat()}, {place}{note}.",
            "",
            self.table(),
            "",
            *(f"- Found: {detail.splitlines()[0][:150]}" for detail in self.details),
        ]
        return "\n".join(lines)


def write_part(text: str, *, several_machines: bool) -> None:
    """Write one of the two parts of docs/chaos.md, and keep the other one."""
    one, heading, several = PAGE.read_text().partition(SEVERAL_MACHINES)
    if several_machines:
        heading, several = SEVERAL_MACHINES, f"\n{text}\n"
    else:
        one = f"{text}\n\n" if heading else text
    PAGE.write_text(one.rstrip() + "\n\n" * bool(heading) + (heading + several).rstrip() + "\n")


def _task_failed(body: bytes) -> bool:
    """A call that waits for its picture answers 500 if the picture cannot be made."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    code = error.get("code") if isinstance(error, dict) else error
    return code == "task_failed"
