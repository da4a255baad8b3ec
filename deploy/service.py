"""Installs the server as a service of the user who runs this: a launchd agent on macOS, a systemd
user unit elsewhere. `make service` and `make service-remove` call it.

A service of the user, because on a Mac Metal works only in a session of the user.
"""

import os
import plistlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LABEL = "org.mflux-server"
UNIT = "mflux-server.service"
UNIT_TEXT = """\
[Unit]
Description=mflux-server: a queue for image generation with mflux
After=network-online.target

[Service]
Type=notify
ExecStart={command}
WorkingDirectory={root}
Environment=PYTHONUNBUFFERED=1
Restart=always
RestartSec=5
# 2 is a bad option: starting again would not help.
RestartPreventExitStatus=2
TimeoutStopSec=60
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
SystemCallArchitectures=native

[Install]
WantedBy=default.target
"""


def command(options: Sequence[str]) -> list[str]:
    """What the service runs."""
    return [sys.executable, str(ROOT / "server.py"), *options]


def unit(options: Sequence[str]) -> str:
    """The systemd unit. systemd replaces % and $ in commands, unless they are doubled."""
    words = [shlex.quote(word.replace("%", "%%").replace("$", "$$")) for word in command(options)]
    return UNIT_TEXT.format(command=" ".join(words), root=str(ROOT).replace("%", "%%"))


def agent(options: Sequence[str], home: Path) -> bytes:
    """The launchd agent: started at login, and again whenever it ends."""
    return plistlib.dumps(
        {
            "Label": LABEL,
            "ProgramArguments": command(options),
            "WorkingDirectory": str(ROOT),
            "EnvironmentVariables": {"PYTHONUNBUFFERED": "1"},
            "RunAtLoad": True,
            "KeepAlive": True,
            "ThrottleInterval": 10,
            "ExitTimeOut": 60,
            "Umask": 0o077,
            "LimitLoadToSessionType": "Aqua",
            "ProcessType": "Interactive",
            "StandardErrorPath": str(home / "Library" / "Logs" / "mflux-server.log"),
        }
    )


def install(options: Sequence[str], home: Path, system: str = sys.platform) -> list[list[str]]:
    """Writes the file of the service; returns the commands that start it."""
    path = file_of(home, system)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = agent(options, home) if system == "darwin" else unit(options).encode()
    path.write_bytes(content)
    path.chmod(0o600)  # options may contain keys
    if system == "darwin":
        domain = f"gui/{os.getuid()}"
        return [["launchctl", "bootstrap", domain, str(path)]]
    return [
        ["systemctl", "--user", "daemon-reload"],
        ["systemctl", "--user", "enable", UNIT],
        ["systemctl", "--user", "restart", UNIT],
    ]


def stop_commands(system: str = sys.platform) -> list[list[str]]:
    if system == "darwin":
        return [["launchctl", "bootout", f"gui/{os.getuid()}/{LABEL}"]]
    return [["systemctl", "--user", "disable", "--now", UNIT]]


def file_of(home: Path, system: str = sys.platform) -> Path:
    if system == "darwin":
        return home / "Library" / "LaunchAgents" / f"{LABEL}.plist"
    return home / ".config" / "systemd" / "user" / UNIT


def main(arguments: Sequence[str]) -> int:
    """install OPTIONS... or remove; returns the exit code."""
    home = Path.home()
    existed = file_of(home).exists()
    if arguments[:1] not in (["install"], ["remove"]):
        print("usage: deploy/service.py install [OPTIONS of the server] | remove")
        return 2
    if arguments[:1] == ["remove"]:
        for stop in stop_commands() if existed else []:
            subprocess.run(stop, check=False)
        file_of(home).unlink(missing_ok=True)
        print(f"Removed {file_of(home)}. Tasks and images stay in the data dir.")
        return 0
    if existed and sys.platform == "darwin":  # launchd reads the file when it is loaded
        for stop in stop_commands():
            subprocess.run(stop, check=False)
    for start in install(arguments[1:], home):
        if subprocess.run(start, check=False).returncode:
            print(f"{file_of(home)} is written, but this failed: {shlex.join(start)}")
            return 1
    print(f"Started {file_of(home)}. See docs/deploy.md for its log, upgrades and rollback.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
