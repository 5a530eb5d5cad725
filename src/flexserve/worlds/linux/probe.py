"""A program of the same user that tries to look into secure processes: `python -I -m flexserve.worlds.linux.probe`.

It starts two secure processes, the real one and a twin without hardening, and tries on both what debuggers, dumpers
and curious programs do, as the user each of them is and without a capability. What fails on the real one and works
on the twin was stopped by the hardening. As their parent it is the strongest attacker of its kind: Yama lets only
ancestors trace. Knows Linux's calls; what the results mean is doctor.py's. Prints one `Probe` as JSON.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from ...errors import EngineFailure, FlexServeError
from ...sealed.keyfile import write_key
from ...sealed.keys import DeviceKey
from . import users
from .channel import Configure, Failed, Measures, Ready
from .process import SecureProcess
from .seccomp import MACHINES, NUMBERS

T = TypeVar("T")

TIMEOUT_S = 60.0
FILES = ("mem", "maps", "environ", "auxv")  # of /proc/PID

_PTRACE_ATTACH, _PTRACE_DETACH = 16, 17
_WALL = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long
_libc.process_vm_readv.restype = ctypes.c_ssize_t


@dataclass(frozen=True)
class Look:
    """What could be seen of one secure process and its children."""

    processes: int  # that were looked at
    users: tuple[int, ...]  # they are
    capabilities: bool  # whether one has any
    reached: tuple[str, ...]  # the ways in that worked: names of FILES, "process_vm_readv", "ptrace"
    no_new_privs: bool  # all of them
    seccomp: bool  # all of them, by filters of their own
    core_limit_bytes: int | None  # None: no limit
    locked_bytes: int  # address space, of the first of them
    resident_bytes: int
    environment: tuple[str, ...] | None  # names of variables; None: not to be seen
    inherited_descriptor_closed: bool
    dumped_core: bool | None  # when it crashed; None: not tried


@dataclass(frozen=True)
class Probe:
    """Both looks, and what the real process says about Flex-Mem."""

    user: int  # who started them
    flexmem: str
    measures: Measures  # what the real one says of itself
    secure: Look
    twin: Look


def probe() -> Probe:
    """Run this module in a process of its own. Raises `EngineFailure`."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-m", __name__], capture_output=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise EngineFailure(f"looking at the secure process took longer than {TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"])[-1]
        raise EngineFailure(f"the secure process could not be looked at: {last}")
    return msgspec.json.decode(done.stdout, type=Probe)


def as_program_of(user: int, work: Callable[[], T]) -> T:
    """Do `work` in a thread that is this user, without a capability; what it starts has none either.

    A thread, not a process: to the kernel's Yama it is still an ancestor of what this process started.
    """
    results: list[T | BaseException] = []

    def run() -> None:
        try:
            users.drop_bounding_set()
            if users.may_change_user():  # the raw calls, which do not reach the other threads as libc's would
                for name, arguments in (
                    ("setgroups", (0, None)),
                    ("setresgid", (user,) * 3),
                    ("setresuid", (user,) * 3),
                ):
                    number = NUMBERS[name][MACHINES[platform.machine()].column]
                    if _libc.syscall(number, *arguments) != 0:
                        raise OSError(ctypes.get_errno(), name)
            users.drop_capabilities()
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result


class _Started:
    """A configured secure process, with a key made for this and a descriptor it should not keep."""

    def __init__(self, directory: Path, *, hardened: bool) -> None:
        self._leaked, write = os.pipe2(os.O_CLOEXEC)
        self.process = SecureProcess(hardened, (write,))
        os.close(write)
        self.pid = self.process.popen.pid
        self.process.channel.send(
            Configure(
                device_key=str(directory / "probe.key"),
                passphrase_file=None,
                vendor_pub=None,
                trust_dir=str(directory),
                threads=1,
                context_tokens=None,
                on_demand=True,
                hardened=hardened,
            )
        )
        answer = self.process.channel.receive()
        if isinstance(answer, Failed):
            raise answer.error()
        if not isinstance(answer, Ready):
            raise EngineFailure(f"the secure process did not start ({self.process.end()})")
        self.flexmem, self.measures = answer.flexmem, answer.measures

    def look(self, *, crash: bool) -> Look:
        """Try everything, then end it: by a crash, when asked to."""
        tree = family(self.pid)
        status = [users.status(pid) for pid in tree]
        who = {int(uid) for s in status for uid in s["Uid"].split()}
        closed = bool(select.select([self._leaked], [], [], 0)[0])  # readable: at its end, nobody writes
        reached = as_program_of(
            min(who), lambda: tuple(name for name, way in _ways_in().items() if any(way(pid) for pid in tree))
        )
        return Look(
            processes=len(tree),
            users=tuple(sorted(who)),
            capabilities=any(int(s[name], 16) for s in status for name in ("CapEff", "CapPrm", "CapInh")),
            reached=reached,
            no_new_privs=all(s.get("NoNewPrivs") == "1" for s in status),
            seccomp=_filtered(status),
            core_limit_bytes=_core_limit(self.pid),
            locked_bytes=_bytes(status[0], "VmLck"),
            resident_bytes=_bytes(status[0], "VmRSS"),
            environment=as_program_of(min(who), lambda: _environment(self.pid)),
            inherited_descriptor_closed=closed,
            dumped_core=_crash(self.pid) if crash else None,
        )

    def end(self) -> None:
        self.process.end()
        os.close(self._leaked)


def children(pid: int) -> list[int]:
    """The direct children of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue  # it ended meanwhile
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


def family(pid: int) -> list[int]:
    """A process and all that come from it."""
    return [pid, *(below for child in children(pid) for below in family(child))]


def _ways_in() -> dict[str, Callable[[int], bool]]:
    def opens(name: str) -> Callable[[int], bool]:
        def way(pid: int) -> bool:
            try:
                with Path(f"/proc/{pid}/{name}").open("rb", buffering=0) as file:
                    return name == "mem" or bool(file.read(64))
            except OSError:
                return False

        return way

    return {**{name: opens(name) for name in FILES}, "process_vm_readv": _vm_read, "ptrace": _attach}


def _vm_read(pid: int) -> bool:
    """Read at an address where nothing is: EFAULT says that only the address was wrong."""
    buffer = ctypes.create_string_buffer(16)
    here = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), len(buffer))
    there = (ctypes.c_size_t * 2)(0, len(buffer))
    count = _libc.process_vm_readv(pid, here, 1, there, 1, 0)
    return bool(count >= 0 or ctypes.get_errno() == errno.EFAULT)


def _attach(pid: int) -> bool:
    if _libc.ptrace(_PTRACE_ATTACH, pid, None, None) != 0:
        return False
    os.waitpid(pid, _WALL)
    _libc.ptrace(_PTRACE_DETACH, pid, None, None)
    return True


def _filtered(status: list[dict[str, str]]) -> bool:
    """Whether each of them has a filter of its own, and the first both of its filters.

    A unit of systemd's puts filters on whatever it starts, this process too: only those on top of them count.
    """
    before = int(users.status("self").get("Seccomp_filters", "0"))
    added = [int(s.get("Seccomp_filters", "2")) - before for s in status]  # no such line before Linux 5.9
    return all(s.get("Seccomp") == "2" for s in status) and added[0] >= 2 and min(added) >= 1


def _bytes(status: dict[str, str], field: str) -> int:
    return int(status.get(field, "0 kB").split()[0]) * 1024


def _core_limit(pid: int) -> int | None:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("Max core file size"))
    soft = line.split()[4]
    return None if soft == "unlimited" else int(soft)


def _environment(pid: int) -> tuple[str, ...] | None:
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    return tuple(
        sorted(entry.split(b"=", 1)[0].decode("utf-8", "replace") for entry in data.split(b"\0") if entry)
    )


def _crash(pid: int) -> bool:
    """Abort a child; whether the kernel wrote a core, or gave one to a crash reporter."""
    os.kill(pid, signal.SIGABRT)
    result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert result is not None
    return result.si_code == os.CLD_DUMPED


def look_at_both() -> Probe:
    """Start both processes and look. Raises `EngineFailure` and what a start raises."""
    # Nothing but the process itself may be what keeps it from leaving a core.
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        os.chdir(directory)  # where a core would go
        write_key(directory / "probe.key", DeviceKey.generate())
        looks = []
        user = os.geteuid()
        for hardened in (True, False):
            if hardened:
                started = _Started(directory, hardened=True)
            else:  # with root's capabilities nobody could look into it, hardened or not
                started = as_program_of(user, lambda: _Started(directory, hardened=False))
            try:
                looks.append((started, started.look(crash=hardened)))
            finally:
                started.end()
        os.chdir("/")
    (real, secure), (_, twin) = looks
    return Probe(user, real.flexmem, real.measures, secure, twin)


def main() -> None:
    """Print what was seen."""
    try:
        result = look_at_both()
    except (FlexServeError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    sys.stdout.buffer.write(msgspec.json.encode(result))


if __name__ == "__main__":
    main()
