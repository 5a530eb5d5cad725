"""The sockets: who may reach them, and what is in the way."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexserve.errors import AddressInUse, FlexServeError, ServerNotFound, StorageFailure, Usage
from flexserve.server.client import ServerClient
from flexserve.server.listen import (
    MAX_SOCKET_PATH_BYTES,
    AdminSocket,
    default_admin_path,
    is_loopback,
    listen_tcp,
    url,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A private directory with a short path."""
    private = tmp_path / "p"
    private.mkdir(mode=0o700)
    return private


@pytest.fixture
def admin(directory: Path) -> Iterator[AdminSocket]:
    socket = AdminSocket(directory / "admin.sock")
    yield socket
    socket.close()


def test_the_admin_socket_is_for_its_user_only(tmp_path: Path) -> None:
    admin = AdminSocket(tmp_path / "new" / "admin.sock")
    assert stat.S_IMODE(admin.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(admin.path.parent.stat().st_mode) == 0o700
    admin.close()
    assert not admin.path.exists()
    admin.close()


def test_a_second_server_is_told_and_harms_nothing(admin: AdminSocket) -> None:
    with pytest.raises(AddressInUse, match="another FlexServe server") as caught:
        AdminSocket(admin.path)
    assert "--admin-socket" in caught.value.hint
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(admin.path))


def test_a_socket_left_by_a_crash_is_replaced(directory: Path) -> None:
    path = directory / "admin.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with pytest.raises(ServerNotFound):
        ServerClient(path).ps()
    admin = AdminSocket(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    admin.close()


def test_a_file_in_the_way_is_not_removed(directory: Path) -> None:
    path = directory / "admin.sock"
    path.write_text("precious")
    with pytest.raises(StorageFailure, match="a file is there already"):
        AdminSocket(path)
    assert path.read_text() == "precious"


def test_a_path_too_long_for_a_socket_is_refused(directory: Path) -> None:
    with pytest.raises(Usage, match=str(MAX_SOCKET_PATH_BYTES)):
        AdminSocket(directory / ("s" * MAX_SOCKET_PATH_BYTES))


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o711, 0o777])
def test_a_directory_open_to_others_is_refused_by_server_and_client(directory: Path, mode: int) -> None:
    path = directory / "admin.sock"
    admin = AdminSocket(path)
    directory.chmod(mode)
    with pytest.raises(StorageFailure, match="open to other users") as caught:
        ServerClient(path)
    assert "`mkdir -m 700 DIR`" in caught.value.hint
    assert "--admin-socket DIR/admin.sock" in caught.value.hint
    assert "chmod" not in caught.value.hint, "it may be /tmp"
    admin.close()
    with pytest.raises(StorageFailure, match="open to other users"):
        AdminSocket(path)


def test_an_open_directory_is_named_in_full(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.chmod(0o755)
    monkeypatch.chdir(directory)
    with pytest.raises(StorageFailure) as caught:
        AdminSocket(Path("admin.sock"))
    assert caught.value.message == f"{directory} is open to other users"


def test_a_directory_of_somebody_else_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(StorageFailure, match="another user"):
        AdminSocket(directory / "admin.sock")


def test_a_link_to_a_directory_is_refused(directory: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(directory)
    with pytest.raises(StorageFailure, match="not a directory"):
        AdminSocket(link / "admin.sock")


def test_a_missing_directory_above_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageFailure, match="cannot create"):
        AdminSocket(tmp_path / "absent" / "p" / "admin.sock")


def test_the_default_path_follows_the_session_or_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_admin_path() == Path("/run/user/7/flexserve/admin.sock")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_admin_path() == Path(f"/tmp/flexserve-{os.getuid()}/admin.sock")


def test_no_server_is_said_so(directory: Path) -> None:
    with pytest.raises(ServerNotFound) as caught:
        ServerClient(directory / "admin.sock")
    assert "flexserve serve" in caught.value.hint


def test_a_port_in_use_is_a_clear_error_with_a_way_out() -> None:
    with listen_tcp("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(AddressInUse, match=f"port {port} on 127.0.0.1 is in use") as caught:
            listen_tcp("127.0.0.1", port)
        assert "--port" in caught.value.hint


@pytest.mark.parametrize("host", ["192.0.2.1", "a" * 70, "\udce4"])
def test_a_host_that_is_not_ours_is_a_clear_error(host: str) -> None:
    with pytest.raises(FlexServeError) as caught:
        listen_tcp(host, 0)
    assert caught.value.exit_code == 2
    assert caught.value.hint


@pytest.mark.parametrize(("host", "loopback"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_loopback_is_known_from_the_address(host: str, loopback: bool) -> None:
    with listen_tcp(host, 0) as sock:
        assert is_loopback(sock) == loopback
        assert url(sock).startswith("http://")
