"""`flexserve doctor`: the verb around worlds/linux/doctor.py, which tests/worlds/test_doctor.py is about."""

from __future__ import annotations

import click
import pytest

from flexserve.cli.doctor import NARROWEST, report_text

from ..schemas import schema, validate
from .conftest import Shell


def test_it_reports_every_line_and_succeeds_where_all_holds(shell: Shell) -> None:
    shell.ok("keys device -o device.key")
    result = shell.json("doctor --json --device-key device.key")
    validate("doctor", result)
    lines = {line["id"]: line for line in result["lines"]}
    assert list(lines) == schema("doctor")["properties"]["lines"]["items"]["properties"]["id"]["enum"]
    assert result["holds"], result
    for measured in (
        "secure_process",
        "memory",
        "ptrace",
        "core",
        "no_new_privs",
        "descriptors",
        "device_key",
    ):
        assert lines[measured]["state"] == "ok", lines[measured]
    text = click.unstyle(report_text(result, 80))
    assert "all that this version promises holds here" in text
    for name in lines:
        assert f" {name} " in text


def test_a_broken_promise_is_exit_code_1(shell: Shell) -> None:
    shell.ok("keys device -o device.key")
    (shell.directory / "device.key").chmod(0o644)
    text = shell("doctor --device-key device.key")
    assert text.exit_code == 1
    assert "a promise does not hold here" in text.stdout
    assert "to do: chmod 600" in text.stdout


@pytest.mark.parametrize("width", [40, 80, 110])
def test_the_text_fits_the_terminal_and_is_coloured_there(width: int) -> None:
    lines = [
        {"id": i, "state": state, "found": "found " * 20, "stops": "somebody " * 20, "advice": "act " * 40}
        for i, state in (("ptrace", "ok"), ("swap", "weak"), ("core", "broken"), ("secure_process", "unused"))
    ]
    report = {"version": "1", "world": "linux", "mode": "service", "holds": False, "lines": lines}
    text = report_text(report, width)
    assert "\x1b[31m\x1b[1mbroken" in text
    for line in click.unstyle(text).splitlines():
        assert len(line) <= max(width, NARROWEST), line
