"""How options are read."""

from dataclasses import fields
from pathlib import Path

import pytest

from option_groups import GROUPS, LAST, grouped, metavar_of
from settings import Settings, is_switch, negative_flag_of
from version import VERSION

SWITCHES = [option.name for option in fields(Settings) if is_switch(option)]


def test_previews_are_on_unless_they_are_switched_off() -> None:
    assert Settings.read([], {}).previews is True
    for arguments in (["--previews", "off"], ["--previews=false"], ["--no-previews"]):
        assert Settings.read(arguments, {}).previews is False


def test_a_switch_is_on_or_off(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Settings.read(["--previews", "maybe"], {})
    assert "must be on or off, not 'maybe'" in capsys.readouterr().err


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_can_be_switched_off_by_its_name(name: str) -> None:
    on = {f"MFLUX_SERVER_{name.upper()}": "on"}
    assert getattr(Settings.read([], on), name) is True
    assert getattr(Settings.read([f"--{name.replace('_', '-')}"], {}), name) is True
    assert getattr(Settings.read([negative_flag_of(name)], on), name) is False


def test_other_options_have_no_such_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Settings.read(["--no-port"], {})
    assert "--no-port" in capsys.readouterr().err


def test_hosts_to_call_are_names_and_no_addresses(capsys: pytest.CaptureFixture[str]) -> None:
    assert Settings.read(["--callback-hosts", "a.example, ::1"], {}).callback_hosts == (
        "a.example",
        "::1",
    )
    with pytest.raises(SystemExit):
        Settings.read(["--callback-hosts", "http://a.example/"], {})
    assert "without http://" in capsys.readouterr().err


def message_of(
    capsys: pytest.CaptureFixture[str], arguments: list[str], environ: dict[str, str]
) -> str:
    """Of a start that is refused."""
    with pytest.raises(SystemExit) as ended:
        Settings.read(arguments, environ)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_misspelt_variable_is_refused_with_the_one_that_was_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = message_of(capsys, [], {"MFLUX_SERVER_MODLE": "schnell"})
    assert "no variable MFLUX_SERVER_MODLE; did you mean MFLUX_SERVER_MODEL?" in message
    of_others = {"MFLUX_SERVER_EXPAND_KEY": "k", "MFLUX_SERVER_URL": "http://x", "MFLUX": "x"}
    assert Settings.read([], of_others) == Settings()


def test_a_file_gives_options_which_the_environment_and_the_command_line_override(
    tmp_path: Path,
) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        'models = ["schnell", "noise-flux1"]\nport = 4031\nmax-steps = 7\nmax_count = 3\n'
        "previews = false\n"
    )
    environ = {"MFLUX_SERVER_PORT": "4032", "MFLUX_SERVER_MAX_STEPS": "8"}
    read = Settings.read(["--config", str(file), "--port", "4033"], environ)
    assert read.models == ("schnell", "noise-flux1")
    assert (read.port, read.max_steps, read.max_count) == (4033, 8, 3)
    assert read.previews is False
    from_variable = Settings.read([], {"MFLUX_SERVER_CONFIG": str(file)})
    assert (from_variable.port, from_variable.max_steps) == (4031, 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prot = 1", "there is no option 'prot'; did you mean port?"),
        ("port = 'x'", "server.toml: argument --port: must be a whole number"),
        ("[models]\na = 1", "models must be text"),
        ("port = ", "cannot be read"),
        ("config = 'x.toml'", "there is no option 'config'"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "server.toml").write_text(text)
    assert expected in message_of(capsys, ["--config", str(tmp_path / "server.toml")], {})


def test_a_file_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot be read" in message_of(capsys, ["--config", str(tmp_path / "none.toml")], {})


def test_the_help_has_groups_and_short_names_of_values(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        Settings.read(["--help"], {})
    shown = capsys.readouterr().out
    titles = [f"\n{title}:\n" for title in (*GROUPS, LAST)]
    assert len(titles) >= 7
    assert all(title in shown for title in titles)
    for expected in ("--port N", "--keep-s SECONDS", "--keep-bytes BYTES", "--config FILE"):
        assert expected in shown
    values = [metavar_of(option) for option in fields(Settings)]
    assert not [value for value in values if value and "_" in value]


def test_every_option_is_in_one_group_and_no_group_names_another_option_twice() -> None:
    members = [option.name for group in grouped(fields(Settings)).values() for option in group]
    assert sorted(members) == sorted(option.name for option in fields(Settings))
    names = " ".join(GROUPS.values()).split()
    assert len(names) == len(set(names))


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        Settings.read(["--version"], {})
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"mflux-server {VERSION}")
