"""server.py with pictures of the tiny models, which take a second, paused like those of minutes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import server
import supervision
from scheduler import policy


def main(arguments: list[str]) -> int:
    policy.LEAST_LEFT_S = policy.PAYS = 0.0
    return server.main(arguments)


if __name__ == "__main__":
    supervision.end_process(main(sys.argv[1:]))
