"""A server that is started as root: the gateway is one user, the secure process another, and root only starts it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexserve.errors import Usage
from flexserve.worlds.linux import users
from flexserve.worlds.linux.users import DYNAMIC_USERS, closed_to, free_user, gateway_account, may_change_user

from ..attacker import children
from ..sealed_fixtures import SMALL
from ..served import Served, when_ready
from ..world_fixtures import Device, make_device

ROOT = Path(__file__).parents[2]
SYSTEM = "/usr/bin/python3"


def open_python() -> str | None:
    """A Python of this version that every user can run: the one that runs the tests may lie in a home directory."""
    for candidate in (sys.executable, SYSTEM):
        if shutil.which(candidate) is None or closed_to([Path(candidate)], 12345) is not None:
            continue
        version = subprocess.run([candidate, "-VV"], capture_output=True, text=True, check=True).stdout
        if version.split()[1].split(".")[:2] == [str(x) for x in sys.version_info[:2]]:
            return candidate
    return None


PYTHON = open_python()
SITES = [p for p in sys.path if p.endswith("site-packages")]
needs_root = pytest.mark.skipif(not may_change_user(), reason="only root can become another user")
needs_python = pytest.mark.skipif(
    PYTHON is None or closed_to([ROOT], 12345) is not None,
    reason="other users can run no Python of this version here, or not read this directory",
)


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    """In a directory that other users may enter, with files they may not all read."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield make_device(Path(name) / "d")


@pytest.fixture(scope="module")
def server(device: Device) -> Iterator[Served]:
    assert PYTHON is not None
    source, _ = device.add_kit("m", SMALL)
    d = device.directory
    d.chmod(0o700)  # what the gateway needs afterwards, it keeps open
    environment = {"HOME": str(d), "PATH": "/usr/bin:/bin", "XDG_STATE_HOME": str(d / "state")}
    installation = d.parent / "venv"
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", str(installation)], check=True)
    (site,) = installation.glob("lib/*/site-packages")
    (site / "flexserve.pth").write_text("\n".join([*SITES, str(ROOT / "src")]) + "\n")
    words = [
        "serve", "--model", f"m={source.sealed},{source.licence}", "--device-key", str(device.key_path),
        "--vendor-pub", str(device.vendor_path), "--port", "0", "--admin-socket", str(d / "a.sock"),
        "--threads", "1", "--no-calibrate",
    ]  # fmt: skip
    (d / "work").mkdir()
    with (d / "work" / "stderr.txt").open("w") as stderr:
        process = subprocess.Popen(
            [
                str(installation / "bin" / "python"),
                "-B",
                "-c",
                "from flexserve.cli import main; main()",
                *words,
            ],
            cwd="/",
            env=environment,
            preexec_fn=with_the_units_capabilities,  # noqa: PLW1509 (system calls only)
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    with when_ready(process, d) as server:
        yield server


def unit() -> dict[str, str]:
    """The settings of packaging/flexserve.service."""
    lines = (ROOT / "packaging" / "flexserve.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))


CAPABILITIES = {"CAP_CHOWN": 0, "CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SETPCAP": 8}


def with_the_units_capabilities() -> None:
    """Be root as far as the unit lets it."""
    kept = {CAPABILITIES[name] for name in unit()["CapabilityBoundingSet"].split()}
    users.drop_bounding_set(kept)
    users.drop_capabilities(kept)


def test_the_unit_keeps_secrets_out_of_swap_and_cores_and_needs_no_other_power() -> None:
    settings = unit()
    assert settings["MemorySwapMax"] == "0"
    assert settings["LimitMEMLOCK"] == "infinity"
    assert settings["LimitCORE"] == "0"
    assert settings["NoNewPrivileges"] == "yes"
    assert set(settings["CapabilityBoundingSet"].split()) == set(CAPABILITIES)
    for name in ("userfaultfd", "memfd_secret", "seccomp", "landlock_restrict_self"):
        assert name in settings["SystemCallFilter"].split(), "or a measure would be refused"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_unit() -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", str(ROOT / "packaging" / "flexserve.service")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    complaints = [x for x in done.stderr.splitlines() if "flexserve" in x and "is not executable" not in x]
    assert complaints == []


def ids(pid: int, field: str) -> set[int]:
    return {int(x) for x in users.status(pid)[field].split()}


def as_user(uid: int, work: Callable[[], None]) -> bool:
    """Whether `work` succeeds in a process of that user without a privilege."""
    pid = os.fork()
    if pid == 0:
        try:
            users.become(uid, uid)
            work()
        except PermissionError:
            os._exit(1)
        except BaseException:
            os._exit(2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 1)
    return code == 0


@needs_root
@needs_python
def test_gateway_and_secure_process_are_two_users_and_neither_is_root(server: Served) -> None:
    for pid in (server.process.pid, server.secure_pid):
        assert ids(pid, "Uid").isdisjoint({0})
        assert ids(pid, "Gid").isdisjoint({0})
        assert ids(pid, "Groups") == set()
        assert users.status(pid)["CapEff"] == users.status(pid)["CapPrm"] == "0" * 16
        assert users.status(pid)["NoNewPrivs"] == "1"
    assert ids(server.process.pid, "Uid").isdisjoint(ids(server.secure_pid, "Uid"))


@needs_root
@needs_python
def test_neither_of_them_can_read_the_device_key(server: Served, device: Device) -> None:
    who = [ids(pid, "Uid") for pid in (server.process.pid, server.secure_pid)]
    device.directory.chmod(0o755)
    try:
        for (uid,) in who:
            assert not as_user(uid, lambda: device.key_path.open("rb").close())
            assert as_user(uid, lambda: device.vendor_path.open("rb").close()), "the control"
    finally:
        device.directory.chmod(0o700)


@needs_root
@needs_python
def test_root_starts_a_dead_secure_process_again_with_what_it_was_told(server: Served) -> None:
    before = server.complete("hello").json()["choices"]
    for _ in range(2):
        pid = server.secure_pid
        os.kill(pid, signal.SIGKILL)
        assert server.complete("hello").status_code in (200, 503)
        assert server.complete("hello").json()["choices"] == before
        assert server.secure_pid != pid
        assert ids(server.secure_pid, "Uid").isdisjoint({0})


@needs_root
@needs_python
def test_it_stops_with_everything_it_started(server: Served) -> None:
    pids = [server.secure_pid, *children(server.process.pid)]
    assert len(pids) == 2, "the secure process is a child of the one that starts it"
    server.stop()
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()


def test_a_free_user_number_belongs_to_nobody() -> None:
    uid = free_user()
    assert uid in DYNAMIC_USERS
    assert all(
        uid not in ids(int(p.name), "Uid") for p in Path("/proc").iterdir() if p.name == str(os.getpid())
    )


def test_a_gateway_user_is_one_that_exists_and_not_root() -> None:
    with pytest.raises(Usage, match="no user 'nobody-has-this-name'"):
        gateway_account("nobody-has-this-name")
    with pytest.raises(Usage, match="is root"):
        gateway_account("root")
    assert gateway_account("nobody").uid == 65534


def test_a_directory_that_is_closed_to_others_is_named(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        inside = Path(name) / "a" / "b"
        inside.mkdir(parents=True)
        for path in (Path(name), inside.parent, inside):
            path.chmod(0o755)
        assert closed_to([inside], 12345) is None
        inside.parent.chmod(0o750)
        assert closed_to([inside], 12345) == inside.parent
        inside.parent.chmod(0o711)
        assert closed_to([inside], 12345) is None
        inside.chmod(0o711)
        assert closed_to([inside], 12345) == inside, "a package is listed, too"
