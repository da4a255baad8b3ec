"""python3 -m client "a lighthouse" -o out.png"""

import sys

from client.command import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except ModuleNotFoundError as missing:
        if missing.name != "requests":
            raise
        sys.exit(
            "The client needs requests: pip install requests (and tqdm, for the progress bar)."
        )
