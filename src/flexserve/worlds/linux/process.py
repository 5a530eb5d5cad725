"""One life of the secure process, as the normal side sees it: how it is started, and how it ended.

Knows how to start a process and nothing of messages; starter.py does the same for a gateway that may not.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .channel import Channel, ToNormal

if TYPE_CHECKING:
    from .starter import Started, Starter


def launch(hardened: bool, leaked: tuple[int, ...] = ()) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a secure process: it, and our end of its channel. `leaked`: descriptors it inherits by mistake."""
    ours, theirs = socket.socketpair()
    # -S: site is loaded by launch.py. -B: it writes no file, compiled modules neither.
    file = Path(__file__).with_name("launch.py")
    arguments = [sys.executable, "-I", "-S", "-B", str(file), str(theirs.fileno())]
    environment = {"GGML_NO_BACKTRACE": "1"}  # or an abort would start a debugger
    if "CREDENTIALS_DIRECTORY" in os.environ:
        environment["CREDENTIALS_DIRECTORY"] = os.environ["CREDENTIALS_DIRECTORY"]
    if not hardened:
        arguments.append("--insecure-no-hardening")
    with theirs:
        popen = subprocess.Popen(
            arguments,
            pass_fds=(theirs.fileno(), *leaked),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if hardened else None,  # a crash report may quote what it crashed on
        )
    return popen, ours


class SecureProcess:
    """One life of the secure process."""

    popen: subprocess.Popen[bytes] | Started

    def __init__(
        self, hardened: bool, leaked: tuple[int, ...] = (), *, starter: Starter | None = None
    ) -> None:
        """`leaked`: for doctor and tests. A `starter` starts it as it was told, and configures it.

        Raises `OSError`.
        """
        if starter is None:
            self.popen, ours = launch(hardened, leaked)
        else:
            self.popen, ours = starter.start()
        self.channel = Channel(ours, ToNormal)

    def end(self) -> str:
        """Make sure it is gone; how it ended."""
        self.channel.shut()
        try:
            status = self.popen.wait(5)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            status = self.popen.wait()
        self.channel.close()
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit status {status}"
