"""The documents of the client name what there is, and their example runs."""

import re
import subprocess
import sys
from pathlib import Path

from command_line import at, png
from conftest import ROOT, ServerProcess, clean_environment
from far_ends import command


def test_the_clients_readme_and_help_name_every_option_and_exit_code() -> None:
    shown = command("--help").stdout.decode()
    readme = (ROOT / "client" / "README.md").read_text()
    options = set(re.findall(r"--[a-z][a-z-]+", shown)) - {"--help", "--output"}
    assert len(options) > 25
    for option in options:
        assert f"`{option}" in readme, option
    for code in ("0", "1", "2", "3", "4", "130"):
        assert re.search(rf"^  {code} ", shown, re.MULTILINE)
        assert f"| {code} |" in readme
    for variable in ("MFLUX_SERVER_URL", "MFLUX_SERVER_KEY"):
        assert variable in shown
        assert variable in readme


def test_the_example_of_the_clients_readme_runs(server: ServerProcess, tmp_path: Path) -> None:
    readme = (ROOT / "client" / "README.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.DOTALL))
    (tmp_path / "mflux_client.py").write_text((ROOT / "client" / "mflux_client.py").read_text())
    (tmp_path / "photo.jpg").write_bytes(png())
    (tmp_path / "example.py").write_text(code)
    subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=clean_environment() | at(server.url),
        check=True,
        timeout=120,
    )
    assert (tmp_path / "lighthouse.jpg").exists()
