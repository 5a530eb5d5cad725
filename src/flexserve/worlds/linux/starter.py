"""Starts secure processes for a gateway that is root no longer.

A root process of a few lines, so that the gateway need not be one: only root may give the secure process a user of
its own, and only it may read the device's key. What the gateway can ask is "start" and "kill", without arguments: which
key, which trust and which hardening is told once, before the gateway meets its first client.

Knows no key, reads no file and decodes nothing that comes from the gateway after that.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading

import msgspec

from . import users
from .channel import Channel, Configure, ToNormal
from .process import launch

START, KILL, WAIT = b"s", b"k", b"w"
_ANSWER = struct.Struct("<i")
_MAX_CONFIGURE = 1 << 16
# What it needs to end a process of another user, and that to become one and to lock its memory: CAP_KILL, SETGID,
# SETUID, SETPCAP, SYS_RESOURCE.
_KEPT = (5, 6, 7, 8, 24)


class Starter:
    """The gateway's side. Thread-safe."""

    def __init__(self, configure: Configure) -> None:
        """Start it, as root still."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._popen = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-B",
                    "-c",
                    f"from {__name__} import main; main()",
                    str(theirs.fileno()),
                ],
                pass_fds=(theirs.fileno(),),
                env={k: v for k in ("CREDENTIALS_DIRECTORY",) if (v := os.environ.get(k))},
                stdin=subprocess.DEVNULL,
            )
        self._socket = ours
        self._lock = threading.Lock()
        ours.send(msgspec.msgpack.encode(configure))

    def start(self) -> tuple[Started, socket.socket]:
        """A fresh secure process that was told its configuration, and our end of its channel. Raises `OSError`."""
        with self._lock:
            self._socket.send(START)
            data, descriptors, _, _ = socket.recv_fds(self._socket, _ANSWER.size, 1)
        if not descriptors:
            raise ConnectionError("the process that starts secure processes has ended")
        return Started(self, _ANSWER.unpack(data)[0]), socket.socket(fileno=descriptors[0])

    def ask(self, what: bytes) -> int:
        """Raises `OSError` when it is gone."""
        with self._lock:
            self._socket.send(what)
            data = self._socket.recv(_ANSWER.size)
        if len(data) != _ANSWER.size:
            raise ConnectionError("the process that starts secure processes has ended")
        return int(_ANSWER.unpack(data)[0])

    def close(self) -> None:
        """End it; the secure process ends with its channel."""
        self._socket.close()
        self._popen.wait()


class Started:
    """A secure process that is somebody else's child: what `subprocess.Popen` offers of it."""

    def __init__(self, starter: Starter, pid: int) -> None:
        self._starter = starter
        self.pid = pid

    def kill(self) -> None:
        """End it. Nothing happens when it, or a later one, has taken its place."""
        with contextlib.suppress(OSError):
            self._starter.ask(KILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; with a timeout, at most some seconds, after which it is ended. The status is
        negative for a signal, as `Popen.wait`'s."""
        try:
            return self._starter.ask(WAIT)
        except OSError:
            return -signal.SIGKILL


def main() -> None:
    """Serve one gateway until it ends."""
    control = socket.socket(fileno=int(sys.argv[1]))
    configure = msgspec.msgpack.decode(control.recv(_MAX_CONFIGURE), type=Configure)
    _keep_little()
    process: subprocess.Popen[bytes] | None = None
    while what := control.recv(16):
        if what == START:
            _end(process)
            process, ours = launch(configure.hardened)
            with ours:
                Channel(ours, ToNormal).send(configure)
                socket.send_fds(control, [_ANSWER.pack(process.pid)], [ours.fileno()])
        elif process is not None:
            control.send(_ANSWER.pack(_end(process, patience_s=5.0 if what == WAIT else 0.0)))
        else:
            break
    _end(process)


def _end(process: subprocess.Popen[bytes] | None, patience_s: float = 0.0) -> int:
    if process is None:
        return 0
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _keep_little() -> None:
    """Be root for one purpose, and until the gateway ends: signals to the whole group are for the gateway."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    users.drop_bounding_set(_KEPT)
    users.drop_capabilities(_KEPT)
