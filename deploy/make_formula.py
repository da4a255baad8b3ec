"""Writes deploy/mflux-server.rb, the Homebrew formula, from the pins of requirements.txt.

    .venv/bin/python deploy/make_formula.py

It needs a connection: pip looks up the wheel of each pin for Apple Silicon at its package index and
reports the hash that the index has for it (of the source where there is no wheel); nothing is
installed. Without a connection, the names
and versions in the formula can still be compared with the pins: a test does that.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FORMULA = ROOT / "deploy" / "mflux-server.rb"
PYTHON = "3.12"
OLDEST_MACOS = "macosx_14_0_arm64"
MAC: Mapping[str, str] = {
    "sys_platform": "darwin",
    "platform_system": "Darwin",
    "platform_machine": "arm64",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.0",
    "extra": "",
}
TEXT = """\
# Written by deploy/make_formula.py.
class MfluxServer < Formula
  desc "REST server that queues image generation with mflux and forecasts its end"
  homepage "https://github.com/filipstrand/mflux"
  license "Apache-2.0"
  # Where the repository is: its URL, or file:// and the folder of a checkout.
  head ENV.fetch("HOMEBREW_MFLUX_SERVER", "file:///usr/local/src/mflux-server"), using: :git

  depends_on arch: :arm64
  depends_on macos: :sonoma
  depends_on "python@{python}"

  PINS = <<~PINS.freeze
{pins}
  PINS

  def install
    system "python{python}", "-m", "venv", libexec
    (buildpath/"pins.txt").write PINS
    pip = [libexec/"bin/python", "-m", "pip", "install", "--no-deps"]
    system(*pip, "--require-hashes", "-r", "pins.txt")
    system(*pip, ".")
    %w[server client worker].each {{ |name| bin.install_symlink libexec/"bin/mflux-#{{name}}" }}
  end

  service do
    run [opt_bin/"mflux-server"]
    keep_alive true
    log_path var/"log/mflux-server.log"
    error_log_path var/"log/mflux-server.log"
  end

  test do
    assert_match "mflux-server", shell_output("#{{bin}}/mflux-server --version")
  end
end
"""


def pins_for_macs(requirements: str) -> list[str]:
    """NAME==VERSION of all pins that a Mac needs."""
    lines = (line.partition("#")[0].strip() for line in requirements.splitlines())
    pins = [Requirement(line) for line in lines if line]
    return [
        f"{pin.name}{pin.specifier}"
        for pin in pins
        if pin.marker is None or pin.marker.evaluate(dict(MAC))
    ]


def pins_of(formula: str) -> list[str]:
    """NAME==VERSION of all pins in a formula."""
    return re.findall(r"^ +(\S+==\S+) --hash=sha256:[0-9a-f]{64}$", formula, re.MULTILINE)


def hashes(pins: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of the wheel of each pin, by name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        platform = ["--platform", OLDEST_MACOS, "--python-version", PYTHON]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps",
             "--ignore-installed", "--ignore-requires-python", "--implementation", "cp", *platform,
             "--target", folder, "--report", str(report), *pins],
            check=True,
        )  # fmt: skip
        found = json.loads(report.read_text())["install"]
    return {
        one["metadata"]["name"].lower().replace("_", "-"): (
            one["download_info"]["archive_info"]["hashes"]["sha256"]
        )
        for one in found
    }


def main() -> None:
    pins = pins_for_macs((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    by_name = hashes(pins)
    lines = [
        f"    {pin} --hash=sha256:{by_name[pin.partition('==')[0].lower().replace('_', '-')]}"
        for pin in pins
    ]
    FORMULA.write_text(TEXT.format(python=PYTHON, pins="\n".join(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
