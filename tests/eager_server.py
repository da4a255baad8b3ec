"""server.py with pictures of the tiny models, which take a second, paused like those of minutes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import server
import supervision
from scheduler import policy

if __name__ == "__main__":
    policy.LEAST_LEFT_S = policy.PAYS = 0.0
    supervision.end_process(server.main(sys.argv[1:]))
