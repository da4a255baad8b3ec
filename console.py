"""The commands of the installed package: mflux-server and mflux-worker.

The modules import each other by their plain names, as they do in a checkout, where Python finds
them beside the script. So a command becomes that script, in the same process.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn

FOLDER = Path(__file__).parent


def serve() -> NoReturn:
    _become("server.py")


def work() -> NoReturn:
    _become("remote_worker.py")


def _become(script: str) -> NoReturn:
    os.execv(sys.executable, [sys.executable, str(FOLDER / script), *sys.argv[1:]])
