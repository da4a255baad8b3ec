"""The log: one line for each event, as text or JSON, on the standard error output.

What mflux and other libraries print goes into it, too, so that each line has a time.
"""

import io
import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
"""Attributes that each record has; others are fields of the event."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
LONGEST_LINE = 10_000
"""Characters of what a library prints without an end of line."""

printed = logging.getLogger("mflux-server.printed")


def configure(level: str, form: str, *, prompts: bool) -> None:
    """Set up the log of this process.

    Args:
        level: lowest level that is logged.
        form: text or json.
        prompts: whether prompts may be logged.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    logging.getLogger("mflux-server.prompts").setLevel(logging.INFO if prompts else logging.ERROR)
    # mflux logs prompts at the level info.
    logging.getLogger("mflux").setLevel(logging.NOTSET if prompts else logging.WARNING)


def capture_prints() -> None:
    """From now on, what is printed becomes lines of the log."""
    sys.stdout = PrintedLines()
    sys.stderr = PrintedLines()


class TextFormatter(logging.Formatter):
    """A line with time, level, logger and message. Control characters of the message, which may
    quote a client, are escaped: they make no line of their own and do nothing to a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = CONTROL.sub(lambda found: repr(found[0])[1:-1], record.message)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """An object on one line: time, level, logger, message, the fields of the event, and perhaps an
    exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class PrintedLines(io.TextIOBase):
    """A text stream whose lines are logged. A carriage return, with which
    progress bars draw over a line, ends one, too."""

    def __init__(self) -> None:
        self._rest = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, rest = re.split(r"[\r\n]+", self._rest + text)
        if len(rest) > LONGEST_LINE:
            lines, rest = [*lines, rest], ""
        self._rest = rest
        for line in lines:
            if line.strip():
                printed.info("%s", line.rstrip())
        return len(text)

    def flush(self) -> None:
        """No-op: a line is logged when it is complete."""
