"""The package: source archive and wheel, built and installed into a new environment.

Nothing is downloaded: the packages that it needs are those of the environment of the tests.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from zipfile import ZipFile

import pytest
import requests
from conftest import GIVE_UP_S, ROOT
from forking import clean_environment
from sources import PARTS, sources_of

from version import VERSION

BUILD = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "images")


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=GIVE_UP_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, as pip does it, so that this one is complete, too."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_COPIED, symlinks=True)
    run(sys.executable, "-c", BUILD, "build_sdist", folder, cwd=folder / "checkout")
    with tarfile.open(folder / f"mflux_server-{VERSION}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    source = folder / f"mflux_server-{VERSION}"
    run(sys.executable, "-c", BUILD, "build_wheel", folder, cwd=source)
    return folder / f"mflux_server-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder with the commands of an environment in which the wheel is installed."""
    new = wheel.parent / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", new, cwd=wheel.parent)
    pip = (sys.executable, "-m", "pip", "--python", new / "bin" / "python")
    run(*pip, "install", "-q", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    (found,) = new.glob("lib/python*/site-packages")
    (found / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return new / "bin"


@pytest.fixture
def served(installed: Path, tmp_path: Path) -> Iterator[str]:
    """The URL of a server that the installed command has started."""
    command = f"{installed / 'mflux-server'} --model tiny --port 0 --data-dir".split()
    process = subprocess.Popen(
        [*command, str(tmp_path / "data")],
        cwd=tmp_path,
        env=clean_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    guard = Timer(GIVE_UP_S, process.kill)
    guard.start()
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "serving tiny on " in line:
            yield line.split()[-1]
            break
    else:
        pytest.fail("".join(lines))
    process.terminate()
    process.communicate(timeout=GIVE_UP_S)
    guard.cancel()


def test_the_wheel_contains_every_module_and_the_page_under_one_package(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = [path for part in PARTS for path in sources_of(part)]
    files = [
        *sources,
        *ROOT.glob("client/*.py"),
        *(path for path in ROOT.glob("web/**/*") if path.is_file()),
        *(path for path in ROOT.glob("web/**/*") if path.is_file()),
        *ROOT.glob("templates/*/*"),
        ROOT / "models" / "painter" / "weights.safetensors",
    ]
    assert len(files) > 100
    own = {f"mflux_server/{path.relative_to(ROOT).as_posix()}" for path in files}
    assert names == own | {"mflux_server/client/py.typed"}


def test_the_package_needs_what_requirements_in_names(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        metadata = archive.read(f"mflux_server-{VERSION}.dist-info/METADATA").decode()
    needed = {
        line.partition(": ")[2] for line in metadata.splitlines() if line[:13] == "Requires-Dist"
    }
    base = {need.partition(";")[0].strip() for need in needed if "extra ==" not in need}
    lines = (ROOT / "requirements.in").read_text(encoding="utf-8").splitlines()
    assert base == {line.partition(";")[0].strip() for line in lines if line[:1] not in ("#", "")}
    assert 'celery; extra == "cluster"' in needed


@pytest.mark.slow
def test_the_installed_commands_serve_and_draw_a_picture(
    installed: Path, served: str, tmp_path: Path
) -> None:
    page = requests.get(served, timeout=60)
    assert page.status_code == 200
    script = re.search(r"web/\w+/app\.js", page.text)
    assert script
    assert requests.get(f"{served}/{script[0]}", timeout=60).status_code == 200
    assert "swagger-ui" in requests.get(f"{served}/swagger", timeout=60).text
    picture = tmp_path / "lighthouse.png"
    client = (installed / "mflux-client", "a lighthouse", "--url", served, "-o", picture)
    run(*client, "--width", 64, "--height", 64, "--steps", 2, cwd=tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "--pictures" in run(installed / "mflux-mcp", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_the_installed_worker_command_is_that_of_the_checkout(installed: Path) -> None:
    shown = run(installed / "mflux-worker", "--help", cwd=installed)
    own = run(sys.executable, ROOT / "remote_worker.py", "--help", cwd=ROOT)
    assert "--broker" in shown
    assert shown == own
