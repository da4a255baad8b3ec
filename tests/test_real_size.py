"""The model of real size and its benchmark, on a tiny scale, so that they go on working."""

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment, params_for

from generator import MfluxGenerator
from models.mflux_registry import find_model
from models.model_catalog import LoadSpec
from task import Stage


def run(script: str, *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bits", "options"),
    [
        ("noise-anima", None, ()),
        ("noise-anima", None, ("--float32",)),
        ("noise-anima", 4, ("--bits", "4")),
        ("noise-flux2", 4, ("--bits", "4", "--model", "flux2-klein-4b")),
    ],
)
def test_the_written_checkpoint_is_one_that_mflux_loads_and_draws(
    name: str, bits: int | None, options: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    run("real_model.py", str(folder), "--small", *options)
    model = find_model(name)
    assert model
    spec = LoadSpec(replace(model, path=str(folder)), model.pipelines[0], bits)
    generator = MfluxGenerator(tmp_path)

    def draw() -> tuple[int | None, tuple[int, int]]:
        loaded_bits = generator.load(spec)
        stage = Stage(spec, params_for(steps=1, width=64, height=64))
        size = generator.generate(stage, tmp_path, lambda *_: None).picture.size
        generator.unload()
        return loaded_bits, size

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(draw).result() == (bits, (64, 64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "lines"),
    [
        (
            "real_size.py",
            ("the model was loaded", "| 128 x 128 |", "GET /queue while", "Stopped in a step"),
        ),
        ("real_limits.py", ("128 x 128 |", " drawn, previews: ", " refused: 1.3 GB ")),
        ("real_countdown.py", ("below a third", "| 64 x 64 |")),
        ("real_pair.py", ("Loading the second one", "| noise-flux2 |   64 x 64 |         2 |")),
        ("real_loras.py", ("Loading takes", "| one, in place of two |")),
    ],
)
def test_the_benchmarks_measure_the_server(script: str, lines: Sequence[str]) -> None:
    out = run(script, "--quick")
    for line in lines:
        assert line in out
