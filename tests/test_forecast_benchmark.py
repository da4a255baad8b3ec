"""The replay of benchmarks/forecast_error.py: a few tasks of a few laws."""

import subprocess
import sys
from math import isfinite
from pathlib import Path
from statistics import median

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("law", ["g decoding x^2", "q repeated"])
def test_the_forecast_is_about_as_good_as_the_oracle(
    law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from forecast_error import WHILE, measure
    from forecast_laws import REPEATED, UNSEEN
    from forecast_replay import CONTENDERS

    (scenario,) = (s for s in (*UNSEEN, *REPEATED) if s.name == law)
    rows, figures = measure(scenario, 0.03, 80)
    assert len(rows) == len(WHILE) * 2 * len(CONTENDERS)
    assert isfinite(figures["median at submit / oracle's"])
    assert figures["median % after 3"] < 25
    assert figures["median % after 10"] < 10
    assert figures["running: mean %"] < 10


def test_with_two_machines_of_different_speed_it_is_about_as_good_as_the_oracle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from forecast_laws import KNOWN
    from forecast_machines import Farm

    done = Farm(KNOWN[2], 2, 1).run(60)
    ours, oracle = (median(abs(row[i] / row[0] - 1) for row in done[20:]) for i in (1, 3))
    assert ours < 1.5 * oracle + 0.02


@pytest.mark.slow
def test_quick_runs_and_keeps_no_result() -> None:
    result = BENCHMARKS / "results" / "forecast_error.md"
    before = result.read_bytes()
    command = [sys.executable, str(BENCHMARKS / "forecast_error.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "## What is promised" in done.stdout
    assert result.read_bytes() == before
