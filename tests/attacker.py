"""What the attackers of docs/threat-model.md do, for tests: look into processes, dump them, search files.

Knows Linux's calls and no FlexServe. Root is stronger than the attacker most tests mean, another program of
the same user: `as_same_user` gives root's powers away first, so that a test means the same for every user.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long
_PTRACE_ATTACH, _PTRACE_DETACH = 16, 17
_PR_CAPBSET_DROP = 24
_WALL = 0x40000000
_CHUNK = 8 << 20
_PAGE = 4096


def as_same_user(work: Callable[[], T]) -> T:
    """Do `work` in a thread without any capability; what it starts has none either, also after an exec.

    A thread, not a process: to the kernel's Yama it is still an ancestor of what the tests start.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _drop_capabilities()
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _drop_capabilities() -> None:
    """Of this thread only: the raw system calls do not reach the others, as glibc's setuid would."""
    capability = 0
    while _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:  # EPERM for an ordinary user: it has none
        capability += 1
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if _libc.capset(header, nothing) != 0:
        raise OSError(ctypes.get_errno(), "capset")


# Memory


def memory_has(pid: int, needle: bytes) -> bool:
    """Whether the bytes are in the memory of a process. Raises `PermissionError` where the kernel refuses."""
    return any(needle in piece for piece in _memory(pid, len(needle)))


def memory_which(pid: int, needles: Iterable[bytes]) -> set[bytes]:
    """Which of these are in the memory of a process: one pass. Errors as `memory_has`."""
    missing = set(needles)
    found = set()
    for piece in _memory(pid, max(map(len, missing))):
        found |= {needle for needle in missing if needle in piece}
    return found


def _memory(pid: int, overlap: int) -> Iterator[bytes]:
    """All readable memory, in pieces that overlap."""
    with Path(f"/proc/{pid}/maps").open() as file:
        maps = file.read().splitlines()
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for line in maps:
            found = re.match(r"([0-9a-f]+)-([0-9a-f]+) r.*", line)
            if found is None or line.endswith(("[vvar]", "[vvar_vclock]", "[vsyscall]")):
                continue
            start, end = (int(x, 16) for x in found.groups())
            for at in range(start, end, _CHUNK):
                yield from _read(fd, max(start, at - overlap), min(end, at + _CHUNK))
    finally:
        os.close(fd)


def _read(fd: int, start: int, end: int) -> Iterator[bytes]:
    """A stretch of memory, in several pieces where pages are missing (an arena's cannot be read)."""
    at, piece = start, bytearray()
    while at < end:
        try:
            data = os.pread(fd, end - at, at)
        except OSError:  # this page is missing
            yield bytes(piece)
            piece.clear()
            at = (at // _PAGE + 1) * _PAGE
            continue
        if not data:
            break
        piece += data
        at += len(data)
    yield bytes(piece)


@contextmanager
def traced(pid: int) -> Iterator[None]:
    """Attached as a debugger is. Raises `PermissionError`."""
    if _libc.ptrace(_PTRACE_ATTACH, pid, None, None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))  # EPERM makes it a PermissionError
    os.waitpid(pid, _WALL)
    try:
        yield
    finally:
        _libc.ptrace(_PTRACE_DETACH, pid, None, None)


def read_as_debugger(pid: int, needle: bytes) -> bool:
    """`memory_has`, attached."""
    with traced(pid):
        return memory_has(pid, needle)


def process_vm_read(pid: int) -> int:
    """Read 16 bytes with process_vm_readv(2), at an address that is not there. Returns the error number:
    EFAULT where only the address was wrong, EPERM where the process is out of reach."""
    buffer = ctypes.create_string_buffer(16)
    here = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 16)
    there = (ctypes.c_size_t * 2)(_PAGE, 16)
    _libc.process_vm_readv(pid, here, 1, there, 1, 0)
    return ctypes.get_errno()


def gcore(pid: int, out: Path) -> Path | None:
    """What gdb's gcore dumps of a process; None when it dumps nothing. For tests marked `needs_gcore`."""
    run = subprocess.run(
        ["gcore", "-o", str(out), str(pid)], capture_output=True, timeout=300, check=False, cwd=out.parent
    )
    core = out.with_name(f"{out.name}.{pid}")
    assert core.exists() == (run.returncode == 0), run
    return core if core.exists() else None


def _yama() -> int:
    """How far this machine restricts tracing by itself; 0: not at all (Documentation/admin-guide/LSM/Yama.rst)."""
    try:
        return int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except OSError:
        return 0


needs_tracing = pytest.mark.skipif(
    _yama() >= 2,
    reason="this machine (Yama) lets nobody trace, hardened or not: a control would prove nothing",
)
needs_gcore = pytest.mark.skipif(
    shutil.which("gcore") is None or _yama() >= 1,
    reason="gcore is not installed (Debian: apt-get install gdb), or Yama lets it trace nothing",
)


# Files


def file_has(path: Path, needle: bytes) -> bool:
    """Whether a file contains the bytes, however large it is."""
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(needle) >= 0


def files_with(directory: Path, needles: Iterable[bytes]) -> list[Path]:
    """The files below `directory` that contain one of these."""
    wanted = list(needles)
    files = (p for p in directory.rglob("*") if p.is_file() and not p.is_symlink())
    return [path for path in files if any(file_has(path, needle) for needle in wanted)]


# Processes


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


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


# A process that was taken over


@dataclass(frozen=True)
class Injected:
    """What came of a system call that another process was made to do: its result, or the signal that ended it."""

    result: int | None = None
    signal: int | None = None


_REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)


class _Registers(ctypes.Structure):  # struct user_regs_struct of x86-64
    _fields_ = tuple((name, ctypes.c_ulonglong) for name in _REGISTERS)


_PTRACE_GETREGS, _PTRACE_SETREGS, _PTRACE_SINGLESTEP = 12, 13, 9
_PTRACE_SETOPTIONS, _PTRACE_GETEVENTMSG = 0x4200, 0x4201
_PTRACE_O_TRACEEXIT, _PTRACE_EVENT_EXIT = 0x40, 6
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")


def inject(pid: int, number: int, arguments: Iterable[int]) -> Injected:
    """Have the main thread of a process make a system call, as code that took it over would: root's debugger puts it
    there, while the process waits in another call, which it then takes up again. x86-64 only."""
    with traced(pid):
        before = _Registers()
        _trace(_PTRACE_GETREGS, pid, ctypes.addressof(before))
        call = _Registers.from_buffer_copy(before)
        call.rip = before.rip - 2  # the `syscall` instruction it waits in
        call.rax, call.orig_rax = number, ctypes.c_ulonglong(-1).value
        for name, value in zip(_ARGUMENTS, [*arguments, 0, 0, 0, 0, 0, 0], strict=False):
            setattr(call, name, value)
        _trace(_PTRACE_SETOPTIONS, pid, _PTRACE_O_TRACEEXIT)  # stop before anybody hears of its end
        _trace(_PTRACE_SETREGS, pid, ctypes.addressof(call))
        _trace(_PTRACE_SINGLESTEP, pid, 0)
        _, status = os.waitpid(pid, _WALL)
        if status >> 16 == _PTRACE_EVENT_EXIT:
            ending = ctypes.c_ulong()
            _trace(_PTRACE_GETEVENTMSG, pid, ctypes.addressof(ending))
            return Injected(signal=ending.value & 0x7F)
        after = _Registers()
        _trace(_PTRACE_GETREGS, pid, ctypes.addressof(after))
        got = ctypes.c_longlong(after.rax).value
        _trace(_PTRACE_SETREGS, pid, ctypes.addressof(before))
        return Injected(result=got)


def _trace(request: int, pid: int, data: int) -> None:
    if _libc.ptrace(request, pid, None, data) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def _effective_capabilities() -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("CapEff"))
    return int(line.split()[1], 16)


_CAP_SYS_PTRACE = 19
needs_injection = pytest.mark.skipif(
    platform.machine() != "x86_64" or not _effective_capabilities() >> _CAP_SYS_PTRACE & 1 or _yama() >= 3,
    reason="taking over a hardened process takes root's debugger, and this one knows x86-64 only",
)
