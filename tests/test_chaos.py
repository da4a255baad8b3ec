"""The chaos itself in miniature, so that it works when it is needed."""

import subprocess
import sys

import pytest
from conftest import ROOT, clean_environment


@pytest.mark.slow
def test_the_chaos_finds_nothing_in_a_short_run_of_malformed_requests() -> None:
    command = [sys.executable, "tests/chaos/run_chaos.py", "--quick", "--only", "malformed"]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| malformed requests | 300 |" in done.stdout
