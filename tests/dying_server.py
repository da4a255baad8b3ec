"""server.py with threads that can be made to raise. Each line of standard input is a prefix:
threads whose names start with it raise. An empty line logs the names of all threads."""

import ctypes
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import server
import supervision


class Fault(BaseException):
    """Nothing in the server catches it."""


def read_orders() -> None:
    for line in sys.stdin:
        threads = {t.name: t.ident for t in threading.enumerate() if t.name != "orders"}
        if not line.strip():
            print("threads:", *threads, file=sys.stderr)
            continue
        for name, ident in threads.items():
            if name.startswith(line.strip()):
                # Raised when the thread runs its next line of Python.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(ident or 0), ctypes.py_object(Fault)
                )
        print("struck:", line.strip(), file=sys.stderr)


if __name__ == "__main__":
    threading.Thread(target=read_orders, name="orders", daemon=True).start()
    supervision.end_process(server.main(sys.argv[1:]))
