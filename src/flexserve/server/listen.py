"""The sockets a server listens on: one TCP address, one admin socket. No HTTP and no event loop here.

The admin socket is `admin.sock` (0600) in a directory of this user that nobody else may enter (0700):
`$XDG_RUNTIME_DIR/flexserve` where that is set, else `/tmp/flexserve-UID`. A lock file beside it says whether
its server is alive, so that a socket left by a crash is replaced and one in use never is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import stat
from pathlib import Path
from typing import IO

from ..errors import AddressInUse, StorageFailure, Usage

MAX_SOCKET_PATH_BYTES = 107  # sun_path of unix(7), without its final zero
BACKLOG = 128


def listen_tcp(host: str, port: int) -> socket.socket:
    """A bound socket that does not accept yet. Port 0: any free one. Raises `AddressInUse`, `Usage`."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise Usage(f"the host {host!r} has no address", hint="give an IP address of this machine") from None
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Two servers may bind one address as long as neither listens: find out now, not after loading models.
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"port {port} on {host} is in use",
                hint=f"choose another with --port, e.g. {port % 65535 + 1}",
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise Usage(
                f"{host} is not an address of this machine",
                hint="`ip address` names those it has; 0.0.0.0 is all of them, 127.0.0.1 this machine only",
            ) from None
        raise Usage(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return sock


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine can connect."""
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def url(sock: socket.socket) -> str:
    """`http://HOST:PORT` of a TCP socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def default_admin_path() -> Path:
    """Where servers listen and verbs look when neither an option nor the environment says otherwise."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    directory = Path(runtime, "flexserve") if runtime else Path("/tmp", f"flexserve-{os.getuid()}")  # noqa: S108
    return directory / "admin.sock"


def check_private(directory: Path) -> None:
    """Raises `StorageFailure` unless the directory is this user's alone: no symlink, no access for others."""
    try:
        info = directory.lstat()
    except OSError as error:
        raise StorageFailure(f"cannot use {directory}: {error.strerror}") from None
    if not stat.S_ISDIR(info.st_mode):
        raise StorageFailure(f"{directory} is not a directory", hint="give another path with --admin-socket")
    if info.st_uid != os.getuid():
        raise StorageFailure(
            f"{directory} belongs to another user", hint="give a path of your own with --admin-socket"
        )
    if info.st_mode & 0o077:
        # Not `chmod`: the directory may be /tmp, or another that others need.
        raise StorageFailure(
            f"{directory.absolute()} is open to other users",
            hint="make a directory of your own: `mkdir -m 700 DIR`, then `--admin-socket DIR/admin.sock`",
        )


class AdminSocket:
    """The bound admin socket of a running server."""

    def __init__(self, path: Path) -> None:
        """Raises `AddressInUse`, `StorageFailure`, `Usage`."""
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise Usage(
                f"the path of the admin socket is longer than {MAX_SOCKET_PATH_BYTES} bytes: {path}",
                hint="give a shorter one with --admin-socket",
            )
        self.path = path
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageFailure(f"cannot create {path.parent}: {error.strerror}") from None
        check_private(path.parent)
        self._lock = self._take_lock()
        try:
            self.socket = self._bind()
        except BaseException:
            self._lock.close()
            raise

    def _take_lock(self) -> IO[bytes]:
        name = self.path.with_name(self.path.name + ".lock")
        try:
            lock = os.fdopen(
                os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+b"
            )
        except OSError as error:
            raise StorageFailure(f"cannot open {name}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise AddressInUse(
                f"another FlexServe server uses the admin socket {self.path}",
                hint="stop it, or give this one its own with --admin-socket",
            ) from None
        return lock

    def _bind(self) -> socket.socket:
        try:
            if stat.S_ISSOCK(self.path.lstat().st_mode):
                self.path.unlink()  # we hold the lock: its server is gone
        except FileNotFoundError:
            pass
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        umask = os.umask(0o177)  # 0600 from the first moment
        try:
            sock.bind(str(self.path))
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            why = "a file is there already" if error.errno == errno.EADDRINUSE else error.strerror
            raise StorageFailure(
                f"cannot create the admin socket {self.path}: {why}",
                hint="give another path with --admin-socket",
            ) from None
        finally:
            os.umask(umask)
        return sock

    def close(self) -> None:
        """Stop listening and remove the socket. May be called twice."""
        self.socket.close()
        if not self._lock.closed:
            with contextlib.suppress(
                PermissionError
            ):  # made as root, closed as another: the next start removes it
                self.path.unlink(missing_ok=True)
            self._lock.close()
