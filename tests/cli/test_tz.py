"""`flexserve tz`, without a machine."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from flexserve.worlds.trustzone import linux
from flexserve.worlds.trustzone.machine import Ended

from .conftest import Shell


class ShellMachine:
    """Says what this host's shell says to the script, then ends as the real one does. `dies`: before that."""

    def __init__(self, script: str, *, dies: bool = False) -> None:
        script = script.replace("/bin/busybox sh", "sh")
        self._lines = ["linux ready"]
        if not dies:
            ran = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
            self._lines += ran.stdout.splitlines()

    def __enter__(self) -> ShellMachine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def line(self, _timeout_s: float) -> str:
        if not self._lines:
            raise Ended("the machine has ended")
        return self._lines.pop(0)


Machines = Callable[[bool], None]


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    def make(dies: bool) -> None:
        monkeypatch.setattr(linux, "find", lambda: None)
        monkeypatch.setattr(linux, "boot", lambda _debian, script: ShellMachine(script, dies=dies))

    return make


@pytest.mark.parametrize(
    ("commands", "said"),
    [
        ("echo one; echo two", "linux ready\none\ntwo\n"),
        ("printf 'no end'", "linux ready\nno end\n"),
        ("echo; exit 0", "linux ready\n\n"),
        ("", "linux ready\n"),
    ],
)
def test_boot_prints_what_the_machine_does_and_nothing_of_ours(
    shell: Shell, machines: Machines, commands: str, said: str
) -> None:
    machines(False)
    assert shell.ok("tz boot --run", commands) == said


@pytest.mark.parametrize(
    ("commands", "what"),
    [
        ("nofile", "ended with code 127"),
        ("echo it\\'s; exit 3", "ended with code 3"),
        ("if", "ended with code 2"),
    ],
)
def test_boot_fails_where_its_commands_do(shell: Shell, machines: Machines, commands: str, what: str) -> None:
    machines(False)
    assert f"error: the commands {what}: {commands} (error)" in shell.fails(1, "tz boot --run", commands)


def test_a_machine_that_ends_before_its_commands_do_is_a_failure(shell: Shell, machines: Machines) -> None:
    machines(True)
    assert "the commands did not end" in shell.fails(1, "tz boot --run", "reboot -f")
    assert shell.ok("tz boot") == "linux ready\n"
