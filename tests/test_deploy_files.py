"""The Homebrew formula and the Dockerfile fit the pins and the options."""

import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

from option_parser import variable_of
from settings import Settings

sys.path.insert(0, str(ROOT / "deploy"))

from make_formula import FORMULA, PYTHON, TEXT, pins_for_macs, pins_of

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()


def test_the_formula_has_the_pins_that_a_mac_needs() -> None:
    formula = FORMULA.read_text()
    pins = pins_for_macs((ROOT / "requirements.txt").read_text())
    assert pins_of(formula) == pins, "make it again: .venv/bin/python deploy/make_formula.py"
    names = {pin.partition("==")[0] for pin in pins}
    assert {"mflux", "mlx-metal", "torch"} <= names
    assert "mlx-cpu" not in names
    assert len(names) == len(pins)


def test_the_rest_of_the_formula_is_as_its_script_writes_it() -> None:
    formula = FORMULA.read_text()
    pins = "\n".join(re.findall(r"^ +\S+==\S+ --hash=.*$", formula, re.MULTILINE))
    assert formula == TEXT.format(python=PYTHON, pins=pins)


@pytest.mark.skipif(not shutil.which("ruby"), reason="there is no Ruby here")
def test_the_formula_is_ruby() -> None:
    checked = subprocess.run(["ruby", "-c", str(FORMULA)], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_the_dockerfile_names_files_options_and_commands_that_exist() -> None:
    copied = re.findall(r"requirements\S*\.txt", DOCKERFILE)
    assert "requirements.txt" in copied
    for name in copied:
        assert (ROOT / name).is_file(), name
    variables = {variable_of(option.name) for option in fields(Settings)}
    named = set(re.findall(r"MFLUX_SERVER_\w+", DOCKERFILE))
    assert named
    assert named <= variables
    assert 'ENTRYPOINT ["mflux-server"]' in DOCKERFILE
    assert "mflux-server = " in (ROOT / "pyproject.toml").read_text()
    assert f"EXPOSE {Settings().port}" in DOCKERFILE


def test_the_container_runs_as_a_user_who_owns_its_volume() -> None:
    user = re.search(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    assert user
    assert int(user[1]) > 0
    assert f"useradd --uid {user[1]}" in DOCKERFILE
    assert DOCKERFILE.index("install -d -o mflux") < DOCKERFILE.index("VOLUME /data")


def test_what_the_container_does_not_need_stays_out_of_it() -> None:
    left_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", "tests"} <= set(left_out)
