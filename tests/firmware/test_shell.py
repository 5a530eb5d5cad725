"""`flexserve tz shell` as a person uses it: a terminal, a prompt, Control-C for the machine, `exit`."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from flexserve.worlds.trustzone import attacks, firmware

from .test_attacks import MISSING, NO_LINUX

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"missing {', '.join(MISSING)}: {firmware.INSTALL}"),
    pytest.mark.skipif(bool(NO_LINUX), reason=NO_LINUX),
]
PROMPT = r"/tmp # "


class Terminal:
    """A terminal on which the verb runs."""

    def __init__(self) -> None:
        self._at, end = pty.openpty()
        start = "import sys; from flexserve.cli import main; sys.argv[1:] = ['tz', 'shell']; main()"
        command = [sys.executable, "-c", start]
        self._process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, start_new_session=True)
        os.close(end)

    def type(self, text: str) -> None:
        os.write(self._at, text.encode())

    def until(self, pattern: str) -> str:
        """What is printed up to `pattern`."""
        seen, end = "", time.monotonic() + attacks.BOOT_S
        while not re.search(pattern, seen):
            assert time.monotonic() < end, f"no {pattern!r} in {seen!r}"
            if select.select([self._at], [], [], 1)[0]:
                seen += os.read(self._at, 4096).decode(errors="replace")
        return seen

    def exit_code(self) -> int:
        """After the end; what is still printed is dropped."""
        with suppress(OSError):  # the terminal's other end is closed
            while os.read(self._at, 4096):
                pass
        os.close(self._at)
        return self._process.wait()


def test_a_person_gets_a_root_shell_gives_memory_and_leaves() -> None:
    terminal = Terminal()
    terminal.until(PROMPT)
    terminal.type("id -u; tty\r")
    assert "/dev/ttyAMA0" in terminal.until("ttyAMA0")
    terminal.type("echo begun; sleep 1000\r")
    terminal.until(r"begun\r")
    terminal.type("\x03")  # the machine's, not the emulator's
    terminal.until(PROMPT)
    terminal.type("manager\r")
    terminal.until("manager ready")
    terminal.type("give 512\r")
    terminal.until("gave 512 pages")
    terminal.type("\x03")
    assert "took 512 pages" in terminal.until(r"ending: took \d+ pages")
    terminal.type("exit\r")
    assert terminal.exit_code() == 0
