"""python3 -m client "a lighthouse" -o out.png"""

import sys

try:
    from client.command import main
except ModuleNotFoundError as missing:
    if missing.name != "requests":
        raise
    sys.exit("The client needs requests: pip install requests (and tqdm, for the progress bar).")

if __name__ == "__main__":
    sys.exit(main())
