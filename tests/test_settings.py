"""How options are read."""

from dataclasses import fields

import pytest

from settings import Settings, is_switch, negative_flag_of

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
