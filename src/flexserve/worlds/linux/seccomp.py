"""seccomp filters: which system calls a process may still make, written as classic BPF by hand.

Knows the kernel's filter interface (Documentation/userspace-api/seccomp_filter.rst) and the system call numbers
of x86-64 and aarch64; which process gets which rules is syscalls.py's. libseccomp would need a shared library
that small machines do not have, for a program of two hundred fixed instructions.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ...errors import EngineFailure

KILL = 0x80000000  # SECCOMP_RET_KILL_PROCESS
ALLOW = 0x7FFF0000
_ERRNO = 0x00050000


def refuse(number: int) -> int:
    """The action that makes a call fail with this error number."""
    return _ERRNO | number


EPERM = refuse(errno.EPERM)
EACCES = refuse(errno.EACCES)
ENOSYS = refuse(errno.ENOSYS)

_LOAD_WORD, _JUMP_EQUAL, _JUMP_ABOVE, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16  # struct seccomp_data
LOW, WHOLE = (1 << 32) - 1, (1 << 64) - 1  # of an argument
_X32 = 0x40000000  # x86-64's second table of the same calls
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER = 1
_TSYNC = 1
# Before Linux 5.16 a filter switched speculative store bypass off, which costs compute several per cent. It guards
# against foreign code in the same process: there is none, and chat templates run in processes of their own.
_SPEC_ALLOW = 4
INSTALL = (_SET_MODE_FILTER, _TSYNC | _SPEC_ALLOW)  # the arguments `install` passes
MAX_INSTRUCTIONS = 4096

_INSTRUCTION = struct.Struct("<HBBI")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Machine:
    """How a processor architecture names itself to a filter, and its column in NUMBERS."""

    audit_arch: int
    column: int


MACHINES = {"x86_64": Machine(0xC000003E, 0), "aarch64": Machine(0xC00000B7, 1)}

# name: (x86-64, aarch64); None where the architecture does not have the call.
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "accept": (43, 202), "accept4": (288, 242), "add_key": (248, 217), "arch_prctl": (158, None),
    "bind": (49, 200), "bpf": (321, 280), "brk": (12, 214), "cachestat": (451, 451), "capset": (126, 91),
    "chdir": (80, 49), "chmod": (90, None), "chown": (92, None), "chroot": (161, 51), "clock_getres": (229, 114),
    "clock_gettime": (228, 113), "clock_nanosleep": (230, 115), "clone": (56, 220), "clone3": (435, 435),
    "close": (3, 57), "close_range": (436, 436), "connect": (42, 203), "creat": (85, None),
    "delete_module": (176, 106), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_pwait": (281, 22), "epoll_wait": (232, None),
    "eventfd2": (290, 19), "execve": (59, 221), "execveat": (322, 281), "exit": (60, 93),
    "exit_group": (231, 94), "fadvise64": (221, 223), "fallocate": (285, 47), "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "fchownat": (260, 54), "fcntl": (72, 25), "fdatasync": (75, 83),
    "finit_module": (313, 273), "fsconfig": (431, 431), "fsmount": (432, 432), "fsopen": (430, 430),
    "fstat": (5, 80), "fsync": (74, 82), "ftruncate": (77, 46), "futex": (202, 98),
    "futex_wait": (455, 455), "futex_waitv": (449, 449), "futex_wake": (454, 454), "getcpu": (309, 168),
    "getegid": (108, 177), "geteuid": (107, 175), "getgid": (104, 176), "getpeername": (52, 205),
    "getpid": (39, 172), "getppid": (110, 173), "getpriority": (140, 141), "getrandom": (318, 278),
    "getrusage": (98, 165), "getsockname": (51, 204), "getsockopt": (55, 209), "gettid": (186, 178),
    "gettimeofday": (96, 169), "getuid": (102, 174), "init_module": (175, 105), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "io_uring_setup": (425, 425), "ioctl": (16, 29), "ioperm": (173, None),
    "iopl": (172, None), "kexec_file_load": (320, 294), "kexec_load": (246, 104), "keyctl": (250, 219),
    "kill": (62, 129), "lchown": (94, None), "link": (86, None), "linkat": (265, 37), "listen": (50, 201),
    "lseek": (8, 62), "madvise": (28, 233), "membarrier": (324, 283), "memfd_secret": (447, 447),
    "mincore": (27, 232), "mkdir": (83, None), "mkdirat": (258, 34), "mknod": (133, None),
    "mknodat": (259, 33), "mlock": (149, 228), "mlock2": (325, 284), "mlockall": (151, 230),
    "mmap": (9, 222), "mount": (165, 40), "mount_setattr": (442, 442), "move_mount": (429, 429),
    "mprotect": (10, 226), "mremap": (25, 216), "munlock": (150, 229), "munmap": (11, 215),
    "name_to_handle_at": (303, 264), "nanosleep": (35, 101), "newfstatat": (262, 79), "open": (2, None),
    "open_by_handle_at": (304, 265), "open_tree": (428, 428), "openat": (257, 56), "openat2": (437, 437),
    "perf_event_open": (298, 241), "pidfd_getfd": (438, 438), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pipe2": (293, 59), "pivot_root": (155, 41), "pkey_mprotect": (329, 288),
    "poll": (7, None), "ppoll": (271, 73), "prctl": (157, 167), "pread64": (17, 67), "preadv": (295, 69),
    "preadv2": (327, 286), "prlimit64": (302, 261), "process_madvise": (440, 440),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pselect6": (270, 72),
    "ptrace": (101, 117), "pwrite64": (18, 68), "pwritev": (296, 70), "pwritev2": (328, 287), "read": (0, 63),
    "readahead": (187, 213), "readv": (19, 65), "reboot": (169, 142), "recvfrom": (45, 207),
    "recvmsg": (47, 212), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "request_key": (249, 218), "restart_syscall": (219, 128), "rmdir": (84, None), "rseq": (334, 293),
    "rt_sigaction": (13, 134), "rt_sigpending": (127, 136), "rt_sigprocmask": (14, 135),
    "rt_sigqueueinfo": (129, 138), "rt_sigreturn": (15, 139), "rt_sigtimedwait": (128, 137),
    "rt_tgsigqueueinfo": (297, 240), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "sched_getaffinity": (204, 123), "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120), "sched_setaffinity": (203, 122), "sched_yield": (24, 124),
    "seccomp": (317, 277),
    "select": (23, None), "sendmsg": (46, 211), "sendto": (44, 206), "set_robust_list": (273, 99),
    "set_tid_address": (218, 96), "setdomainname": (171, 162), "setgid": (106, 144), "setgroups": (116, 159),
    "sethostname": (170, 161), "setitimer": (38, 103), "setns": (308, 268), "setpriority": (141, 140),
    "setregid": (114, 143), "setresgid": (119, 149), "setresuid": (117, 147), "setreuid": (113, 145),
    "setuid": (105, 146), "shutdown": (48, 210), "sigaltstack": (131, 132), "socket": (41, 198),
    "socketpair": (53, 199), "swapoff": (168, 225), "swapon": (167, 224), "symlink": (88, None),
    "symlinkat": (266, 36), "sync_file_range": (277, 84), "sysinfo": (99, 179), "tgkill": (234, 131),
    "tkill": (200, 130), "time": (201, None), "truncate": (76, 45), "umount2": (166, 39), "uname": (63, 160),
    "unlink": (87, None), "unlinkat": (263, 35), "unshare": (272, 97), "userfaultfd": (323, 282),
    "vfork": (58, None), "wait4": (61, 260), "waitid": (247, 95), "write": (1, 64), "writev": (20, 66),
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """A condition on an argument: `argument & mask` is one of `values`.

    A filter sees 32 bits at a time. Most arguments are ints to the kernel, which ignores what is above; where it is
    not so, as for a pointer, the mask is `WHOLE`, and there is one value.
    """

    argument: int
    mask: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """What happens to a call: `action` when every check holds, `otherwise` when one does not."""

    name: str
    action: int = ALLOW
    checks: tuple[Check, ...] = ()
    otherwise: int = EPERM


def rules(names: Iterable[str], action: int) -> tuple[Rule, ...]:
    """One rule without checks for each name."""
    return tuple(Rule(name, action) for name in names)


def program(parts: Iterable[Rule], default: int, machine: str | None = None) -> bytes:
    """The filter's instructions. A call that no rule names gets `default`; of another architecture, KILL.

    Raises `EngineFailure` for a machine whose numbers are not known here.
    """
    name = machine or platform.machine()
    if name not in MACHINES:
        raise EngineFailure(f"no seccomp filter is written for {name} processors")
    known = MACHINES[name]
    out = [
        (_LOAD_WORD, 0, 0, _ARCH_AT),
        (_JUMP_EQUAL, 1, 0, known.audit_arch),
        (_RETURN, 0, 0, KILL),
        (_LOAD_WORD, 0, 0, _NUMBER_AT),
        (_JUMP_ABOVE, 0, 1, _X32),
        (_RETURN, 0, 0, KILL),
    ]
    named = set()
    for rule in parts:
        assert rule.name not in named, f"two rules for {rule.name}"
        named.add(rule.name)
        number = NUMBERS[rule.name][known.column]
        if number is not None:
            block = _block(rule)
            out += [(_JUMP_EQUAL, 0, len(block), number), *block]
    out.append((_RETURN, 0, 0, default))
    assert len(out) <= MAX_INSTRUCTIONS
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in out)


def _block(rule: Rule) -> list[tuple[int, int, int, int]]:
    out = []
    for check in rule.checks:
        for offset, mask, values in _halves(check):
            out += [(_LOAD_WORD, 0, 0, _ARGUMENTS_AT + 8 * check.argument + offset), (_AND, 0, 0, mask)]
            last = len(values)
            out += [(_JUMP_EQUAL, last - at, 0, value) for at, value in enumerate(values)]
            out.append((_RETURN, 0, 0, rule.otherwise))
    return [*out, (_RETURN, 0, 0, rule.action)]


def _halves(check: Check) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Where a half of the argument is, its mask and its values: the lower one first, on little-endian machines."""
    yield 0, check.mask & LOW, tuple(value & LOW for value in check.values)
    if check.mask > LOW:
        (value,) = check.values  # with more, the halves of two could be mixed
        yield 4, check.mask >> 32, (value >> 32,)
    else:
        assert all(value <= LOW for value in check.values)


class _Program(ctypes.Structure):  # struct sock_fprog
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _seccomp(operation: int, flags: int, argument: int) -> int:
    number = NUMBERS["seccomp"][MACHINES[platform.machine()].column]
    return int(_libc.syscall(number, operation, flags, ctypes.c_void_p(argument)))


def install(instructions: bytes) -> None:
    """Filter every thread of this process, now and later, and whatever it forks; there is no way back.

    Raises `EngineFailure` when the kernel refuses: then nothing is filtered.
    """
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # or only root could install one
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    fprog = _Program(len(instructions) // _INSTRUCTION.size, ctypes.addressof(buffer))
    status = _seccomp(*INSTALL, ctypes.addressof(fprog))
    if status != 0:  # negative: an error; positive: a thread that could not follow
        reason = os.strerror(ctypes.get_errno()) if status < 0 else f"thread {status} cannot follow"
        raise EngineFailure(f"cannot harden the secure world: seccomp: {reason}")
