"""The version of the server and of the package that pyproject.toml describes."""

import subprocess
from functools import cache
from pathlib import Path

VERSION = "2.0.0.dev0"
FOLDER = Path(__file__).parent


@cache
def commit() -> str:
    """The short name of the commit of a checkout; empty: it is none, or git is missing."""
    if not (FOLDER / ".git").exists():
        return ""
    command = ["git", "-C", str(FOLDER), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def described() -> str:
    return f"{VERSION} ({commit()})" if commit() else VERSION
