"""What a running secure process is and what it can do, asked of the kernel: by its /proc entries, and by having it
make the system calls of an attacker who took it over (a debugger of root's puts them there)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexserve.core import Finished, Request, Sampling
from flexserve.errors import EngineFailure, WorldCrashed
from flexserve.worlds.base import ModelSource
from flexserve.worlds.linux import LinuxWorld, hardening, landlock, seccomp, users
from flexserve.worlds.linux.probe import family
from flexserve.worlds.linux.process import SecureProcess
from flexserve.worlds.linux.seccomp import ALLOW, NUMBERS, program

from ..attacker import Injected, children, inject, needs_injection
from ..world_fixtures import Device, linux_world

HERE = platform.machine()
is_root = users.may_change_user()
O_RDONLY, O_WRONLY_CREAT = os.O_RDONLY, os.O_WRONLY | os.O_CREAT
AT_FDCWD = -100 & (1 << 64) - 1
PROT_ALL, PRIVATE_ANONYMOUS = 7, 0x22


@pytest.fixture(scope="module")
def world(device: Device, source: ModelSource) -> Iterator[LinuxWorld]:
    with linux_world(device) as started:
        started.register(source)
        answer(started)
        yield started


def answer(world: LinuxWorld) -> tuple[int, ...]:
    request = Request(
        id="r",
        model="m",
        token_ids=(1, 2, 3),
        max_tokens=8,
        ignore_eos=True,
        sampling=Sampling(temperature=0),
    )
    for _ in range(2):  # the first one may meet the end of a process that was killed
        with contextlib.suppress(WorldCrashed):
            *_, last = world.generate(request)
            assert isinstance(last, Finished)
            return last.token_ids
    raise AssertionError("it does not answer any more")


def number(name: str) -> int:
    found = NUMBERS[name][seccomp.MACHINES[HERE].column]
    assert found is not None
    return found


# What /proc says of the running process


def test_every_process_is_filtered_has_no_capability_and_gains_no_privilege(world: LinuxWorld) -> None:
    assert world.pid is not None
    processes = family(world.pid)
    assert len(processes) == 3
    for pid in processes:
        status = users.status(pid)
        assert status["Seccomp"] == "2"
        assert status["NoNewPrivs"] == "1"
        assert {status[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {"0" * 16}
        for task in Path(f"/proc/{pid}/task").iterdir():
            lines = (task / "status").read_text()
            assert "Seccomp:\t2\n" in lines, "llama.cpp's threads too"
            assert "NoNewPrivs:\t1\n" in lines


@pytest.mark.skipif(not is_root, reason="only root can become another user")
def test_started_by_root_it_is_a_user_without_groups_that_nobody_else_is(world: LinuxWorld) -> None:
    assert world.pid is not None
    (uid,) = {x for pid in family(world.pid) for x in users.status(pid)["Uid"].split()}
    assert int(uid) in users.DYNAMIC_USERS
    for pid in family(world.pid):
        assert set(users.status(pid)["Gid"].split()) == {uid}
        assert users.status(pid)["Groups"] == ""
        assert users.status(pid)["CapBnd"] == "0" * 16


@pytest.mark.skipif(not is_root, reason="only root sees the descriptors of a hardened process")
def test_it_holds_no_file_but_the_sealed_model(world: LinuxWorld, source: ModelSource) -> None:
    targets = {str(p.readlink()) for p in Path(f"/proc/{world.pid}/fd").iterdir()}
    kinds = {re.sub(r":\[\d+\]", "", target) for target in targets}
    assert kinds <= {"/dev/null", "socket", "pipe", str(source.sealed), "anon_inode:[userfaultfd]"}


def test_control_without_hardening_none_of_it_holds(device: Device) -> None:
    with linux_world(device, hardened=False) as twin:
        assert twin.pid is not None
        status = users.status(twin.pid)
        assert status["Seccomp"] == "0"
        assert status["NoNewPrivs"] == "0"
        if is_root:
            assert status["Uid"].split()[0] == "0"
            assert int(status["CapEff"], 16) != 0


# What a hijacked process can do


ATTACKS: dict[str, tuple[int, ...]] = {
    "socket": (2, 1, 0),
    "connect": (0, 0, 0),
    "execve": (0, 0, 0),
    "ptrace": (0, 0, 0, 0),
    "process_vm_readv": (1, 0, 0, 0, 0, 0),
    "bpf": (0, 0, 0),
    "kexec_load": (0, 0, 0, 0),
    "setresuid": (0, 0, 0),
    "unshare": (0x10000000,),
    "bind": (0, 0, 0),
    "openat": (AT_FDCWD, 0, O_WRONLY_CREAT, 0o600),
    "unlinkat": (AT_FDCWD, 0, 0),
    "socketpair": (1, 2, 0, 0),  # datagrams, which may be sent to any address
    "mount": (0, 0, 0, 0, 0),
}
REFUSALS: list[tuple[str, tuple[int, ...], int]] = [
    ("openat", (AT_FDCWD, 0, O_RDONLY, 0), errno.EACCES),
    ("mmap", (0, 4096, PROT_ALL, PRIVATE_ANONYMOUS, (1 << 64) - 1, 0), errno.EPERM),
    ("kill", (1, 0), errno.EPERM),
    ("tgkill", (1, 1, 0), errno.EPERM),
    ("prctl", (4, 1, 0, 0, 0), errno.EPERM),  # PR_SET_DUMPABLE: be visible again
    ("clone", (17, 0, 0, 0, 0), errno.EPERM),  # a fork
    ("clone3", (0, 0), errno.ENOSYS),
    ("io_uring_setup", (1, 0), errno.EPERM),
    ("seccomp", (1, 5, 0), errno.EPERM),
    ("ioctl", (0, 0x5412, 0), errno.EPERM),  # TIOCSTI: type into a terminal
    ("prlimit64", (0, 4, 1, 0), errno.EPERM),
    ("prlimit64", (0, 4, 1 << 32, 0), errno.EPERM),  # a pointer whose lower half is zero
    ("fcntl", (0, 8, 1), errno.EPERM),  # F_SETOWN: have the kernel signal somebody
]


@needs_injection
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_a_hijacked_secure_process_dies_of_an_attack(world: LinuxWorld, name: str) -> None:
    before, pid = answer(world), world.pid
    assert pid is not None
    assert inject(pid, number(name), ATTACKS[name]) == Injected(signal=signal.SIGSYS)
    assert answer(world) == before, "another was started"
    assert world.pid != pid


@needs_injection
def test_what_is_no_attack_yet_is_refused(world: LinuxWorld) -> None:
    assert world.pid is not None
    for name, arguments, reason in REFUSALS:
        assert inject(world.pid, number(name), arguments) == Injected(result=-reason), name
    assert answer(world)


@needs_injection
def test_a_hijacked_zygote_dies_too_and_is_replaced(world: LinuxWorld) -> None:
    assert world.pid is not None
    (nursery,) = children(world.pid)
    (zygote,) = children(nursery)
    assert inject(zygote, number("socket"), (2, 1, 0)) == Injected(signal=signal.SIGSYS)
    deadline = threading.Event()
    for _ in range(1500):  # 30 s
        if children(nursery) not in ([], [zygote]):
            break
        deadline.wait(0.02)
    assert children(nursery) != [zygote]


@needs_injection
def test_control_without_hardening_the_same_calls_work(device: Device) -> None:
    with linux_world(device, hardened=False) as twin:
        assert twin.pid is not None
        got = inject(twin.pid, number("socket"), (2, 1, 0)).result
        assert got is not None and got >= 0
        assert inject(twin.pid, number("prctl"), (4, 1, 0, 0, 0)) == Injected(result=0)
        assert inject(twin.pid, number("mmap"), REFUSALS[1][1]).result not in (-errno.EPERM, None)


# The start


def test_a_secure_process_that_is_traced_from_the_start_refuses(device: Device) -> None:
    code = (
        "import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0)\n"  # PTRACE_TRACEME
        "from flexserve.worlds.linux.hardening import harden\nharden()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "traces the secure process" in done.stderr


def test_a_secure_process_is_hidden_before_it_loads_anything_of_ours() -> None:
    launch = Path(hardening.__file__).with_name("launch.py").read_text()
    assert launch.index("prctl(4, 0") < launch.index("import site") < launch.index("flexserve.worlds")


def failure_of(work: Callable[[], object]) -> str:
    """The message `work` fails with, in a process of its own: even what fails takes privileges away for good."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except EngineFailure as error:
            os.write(write, error.message.encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as file:
        return file.read()


def test_hardening_that_the_kernel_refuses_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "INSTALL", (1, 1 << 20))  # flags no kernel knows
    failure = failure_of(lambda: seccomp.install(program([], ALLOW)))
    assert failure == "cannot harden the secure world: seccomp: Invalid argument"


def test_a_gateway_leaves_no_core_behind_a_pipe_either() -> None:
    code = (
        "import resource as r\nfrom flexserve.worlds.linux.hardening import harden_gateway\n"
        "harden_gateway()\nprint(r.getrlimit(r.RLIMIT_CORE)[0], open('/proc/self/status').read())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out.split()[0]) <= 1, "1 is what core(5) says refuses a pipe as well"
    assert "NoNewPrivs:\t1" in out


def test_a_process_that_ends_at_once_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert SecureProcess(True).end() == "exit status 1"


# Landlock


def test_landlock_handles_what_each_version_of_the_kernel_can() -> None:
    assert [len(landlock.ruleset(version)) for version in (1, 3, 4, 5, 6, 7)] == [8, 8, 16, 16, 24, 24]
    known = [int.from_bytes(landlock.ruleset(version)[:8], "little") for version in range(1, 8)]
    assert known == sorted(known)
    assert known[0] == 0x1FFF
    assert known[-1] == 0xFFFF


@pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock, or it is off")
def test_landlock_alone_keeps_files_closed_and_signals_in() -> None:
    parent = os.getpid()

    def restricted(work: Callable[[], object]) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                landlock.restrict(landlock.version())
                work()
            except OSError as error:
                os._exit(error.errno or 255)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert restricted(lambda: None) == 0
    assert restricted(lambda: os.open("/etc/passwd", os.O_RDONLY)) == errno.EACCES
    if landlock.version() >= 6:
        assert restricted(lambda: os.kill(parent, 0)) == errno.EPERM


def test_a_kernel_without_landlock_is_version_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "_CREATE_RULESET", 100_000)  # ENOSYS
    assert landlock.version() == 0
    failure = failure_of(lambda: landlock.restrict(1))
    assert failure == "cannot harden the secure world: Landlock: Function not implemented"


# Swap


needs_swap = pytest.mark.skipif(
    not is_root, reason="only root can switch on a swap file and push pages into it"
)


@pytest.mark.slow
@needs_swap
def test_locked_memory_stays_where_other_memory_is_swapped(tmp_path: Path) -> None:
    swap = tmp_path / "swap"
    with swap.open("wb") as file:
        file.write(bytes(64 << 20))
    swap.chmod(0o600)
    subprocess.run(["mkswap", str(swap)], check=True, capture_output=True)
    on = subprocess.run(["swapon", str(swap)], capture_output=True, text=True, check=False)
    if on.returncode:
        pytest.skip(f"this machine allows no swap file: {on.stderr.strip()}")
    try:
        swapped = {locked: _swapped_bytes(locked) for locked in (False, True)}
    finally:
        subprocess.run(["swapoff", str(swap)], check=True)
    assert swapped[False] > 4 << 20, "the control"
    assert swapped[True] == 0


def _swapped_bytes(locked: bool) -> int:
    """How much of 16 MiB is in swap after the kernel was asked to put it there."""
    code = (
        "import ctypes, mmap, random\n"
        f"if {locked}: assert ctypes.CDLL(None).mlockall(7) == 0\n"  # as hardening._lock_memory does
        "m = mmap.mmap(-1, 16 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\nm[:] = random.randbytes(16 << 20)\n"
        "try: m.madvise(21)\nexcept OSError: pass\n"  # MADV_PAGEOUT; EINVAL for locked pages
        "print([l.split()[1] for l in open('/proc/self/status') if l.startswith('VmSwap')][0])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return int(out) * 1024


def test_memory_is_locked_where_the_limit_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        flags = 0

        def mlockall(self, flags: int) -> int:
            self.flags = flags
            return 0

    libc = Libc()
    monkeypatch.setattr(hardening, "_libc", libc)
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    assert hardening._lock_memory()
    assert libc.flags == 7, "all there is, all that comes, and no page before it is used"

    def refuses(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuses)
    assert not hardening._lock_memory()
    assert ctypes.sizeof(ctypes.c_void_p) == 8
