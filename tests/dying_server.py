"""server.py with threads that can be made to raise. Each line of its standard input is an order:
its number, and the start of the names of the threads that have to die. An order may be repeated. An
empty line writes the names of all threads to the log."""

import ctypes
import logging
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import server
import supervision


class Fault(BaseException):
    """Nothing in the server catches it."""


def runs_its_loop(ident: int) -> bool:
    """Whether its supervisor is not starting it again: an error raised there ends the thread."""
    frame, called = sys._current_frames().get(ident), None
    while frame and frame.f_code is not supervision.SupervisedThread.run.__code__:
        frame, called = frame.f_back, frame
    return bool(frame and called and called.f_code.co_filename != logging.__file__)


def read_orders() -> None:
    restarts: dict[tuple[str, str], int] = {}
    """Of each thread, when the first order of this number came: no order ends a thread twice."""
    for line in sys.stdin:
        threads = [thread for thread in threading.enumerate() if thread.name != "orders"]
        if not line.strip():
            print("threads:", *(thread.name for thread in threads), file=sys.stderr)
            continue
        number, name = line.split()
        for thread in threads:
            if not isinstance(thread, supervision.SupervisedThread):
                continue
            before = restarts.setdefault((number, thread.name), thread.restarts)
            ident = thread.ident or 0
            if thread.name.startswith(name) and thread.restarts == before and runs_its_loop(ident):
                # Raised when the thread runs its next line of Python.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(ident), ctypes.py_object(Fault)
                )


if __name__ == "__main__":
    threading.Thread(target=read_orders, name="orders", daemon=True).start()
    supervision.end_process(server.main(sys.argv[1:]))
