"""Which system calls the filters allow, on both architectures: every number is asked, and arguments at their edges.

A small interpreter (bpf.py) runs the filters, so aarch64's are tested on any machine; that it decides as a kernel does
is shown on this machine's, and in test_filters_aarch64.py on an arm64 one.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import platform
import re
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexserve.errors import EngineFailure
from flexserve.flexmem import uffd
from flexserve.worlds.linux import seccomp, syscalls
from flexserve.worlds.linux.seccomp import (
    ALLOW,
    EACCES,
    ENOSYS,
    EPERM,
    INSTALL,
    KILL,
    LOW,
    MACHINES,
    NUMBERS,
    WHOLE,
    Check,
    Rule,
    program,
    refuse,
)

from .bpf import Filter
from .kernel_tables import kernel_table

PID = 4711
NAMES = ("early", "secure", "zygote", "template")
CONFINED = NAMES[1:]
ASKED = range(1024)  # the kernel has less than 500 so far
SINCE_ALL_ALIKE = 424  # from here on a system call has one number on every architecture
I386, ARM, RISCV64 = 0x40000003, 0x40000028, 0xC00000F3

on_both = pytest.mark.parametrize("machine", sorted(MACHINES))
each_filter = pytest.mark.parametrize("name", NAMES)


@functools.cache
def made(name: str, machine: str) -> Filter:
    """One of the four, as it is on that machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "machine", lambda: machine)
        make = getattr(syscalls, name)
        return Filter.of(make(PID) if name in ("secure", "template") else make())


def number(call: str, machine: str) -> int | None:
    return NUMBERS[call][MACHINES[machine].column]


def decide(name: str, machine: str, call: str, *arguments: int) -> int | None:
    """None where the machine has no such call."""
    asked = number(call, machine)
    if asked is None:
        return None
    return made(name, machine).decide(MACHINES[machine].audit_arch, asked, arguments)


# Numbers


@on_both
def test_every_number_is_the_kernels(machine: str) -> None:
    table, column = kernel_table(machine), MACHINES[machine].column
    newest = max(table.values())
    for name, both in NUMBERS.items():
        known = both[column]
        if known is None:
            assert name not in table, f"{machine} has {name}"
        elif known > newest:  # than these headers
            assert both[0] == both[1] and known >= SINCE_ALL_ALIKE, name
        else:
            assert table.get(name) == known, name


def names(text: str) -> list[str]:
    return text.split()


# What is refused for good, by hand: not read from the rules that refuse it.
ALWAYS_DEADLY = names(
    """
    execve execveat ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd bpf
    perf_event_open mount umount2 move_mount open_tree fsopen fsmount fsconfig mount_setattr pivot_root
    chroot setns unshare open_by_handle_at name_to_handle_at add_key request_key keyctl init_module
    finit_module delete_module kexec_load kexec_file_load swapon swapoff reboot iopl ioperm sethostname
    setdomainname bind listen accept accept4
    """
)
DEADLY_THEN = names(
    """
    socket connect creat rename renameat renameat2 link linkat symlink symlinkat mkdir mkdirat rmdir unlink
    unlinkat mknod mknodat truncate chmod fchmodat fchmodat2 chown lchown fchownat setuid setgid setreuid
    setregid setresuid setresgid setgroups capset vfork
    """
)
# Refused, and more than a name to us: each is a way around the rest.
NEVER_ALLOWED = names(
    """
    openat openat2 io_uring_setup io_uring_enter io_uring_register clone3 memfd_create personality shmat
    shmget rt_sigqueueinfo rt_tgsigqueueinfo tkill pidfd_send_signal pidfd_open setns inotify_init1
    fanotify_init chdir fchdir getdents64 statx readlinkat faccessat faccessat2 setxattr fsetxattr umask
    sysfs vmsplice splice tee sendfile copy_file_range remap_file_pages modify_ldt acct quotactl syslog
    settimeofday adjtimex clock_settime timer_create mq_open semget msgget landlock_create_ruleset
    lookup_dcookie migrate_pages move_pages kcmp setrlimit
    """
)
ARGUMENTS = [(0,) * 6, (1,) * 6, (WHOLE,) * 6, (LOW,) * 6, (1 << 32,) * 6, (PID,) * 6, INSTALL]


@on_both
@each_filter
def test_what_only_an_attack_does_ends_the_process_whatever_its_arguments(name: str, machine: str) -> None:
    for call in [*ALWAYS_DEADLY, *(DEADLY_THEN if name in CONFINED else ())]:
        actions = {decide(name, machine, call, *arguments) for arguments in ARGUMENTS}
        assert actions == ({KILL} if number(call, machine) is not None else {None}), call


@on_both
@pytest.mark.parametrize("name", CONFINED)
def test_every_other_way_out_is_refused_whatever_its_arguments(name: str, machine: str) -> None:
    table, asked = kernel_table(machine), 0
    for call in NEVER_ALLOWED:
        if call in table:
            arch = MACHINES[machine].audit_arch
            actions = {made(name, machine).decide(arch, table[call], some) for some in ARGUMENTS}
            assert actions <= {KILL, EPERM, EACCES, ENOSYS}, call
            asked += 1
    assert asked >= 50


def allowed(name: str, machine: str) -> set[int]:
    """The numbers that some arguments make it allow."""
    tried = [
        *ARGUMENTS,
        (syscalls._PR_SET_NAME,),
        (1, 1),
        (0, syscalls._TCGETS),
        (0, 0, 0, 0x1000),
        (0x10000,),
    ]
    found, arch = made(name, machine), MACHINES[machine].audit_arch
    return {n for n in ASKED if any(found.decide(arch, n, arguments) == ALLOW for arguments in tried)}


PLAIN = {
    "secure": (*syscalls._MEMORY_AND_TIME, *syscalls._DESCRIPTORS, *syscalls._ENGINE, "clone", "socketpair", "tgkill"),
    "zygote": (*syscalls._MEMORY_AND_TIME, *syscalls._DESCRIPTORS, "clone", "socketpair", "tgkill", "kill", "wait4",
               "setitimer", "seccomp"),
    "template": (*syscalls._MEMORY_AND_TIME, *syscalls._DESCRIPTORS, "tgkill"),
}  # fmt: skip
WITH_CHECKS = ("mmap", "mprotect", "pkey_mprotect", "newfstatat", "fcntl", "prctl", "prlimit64", "ioctl")


@on_both
@pytest.mark.parametrize("name", CONFINED)
def test_of_all_numbers_exactly_those_of_the_allowed_names_are_allowed(name: str, machine: str) -> None:
    asked = (number(call, machine) for call in (*PLAIN[name], *WITH_CHECKS))
    wanted = {n for n in asked if n is not None}
    assert allowed(name, machine) == wanted
    by_number = {value: key for key, value in kernel_table(machine).items()}
    newer = {n for n in wanted if n > max(by_number)}
    assert {by_number[n] for n in wanted - newer} <= {*PLAIN[name], *WITH_CHECKS}, "by the kernel's names"


@on_both
@each_filter
def test_a_number_that_no_rule_names_gets_the_default(name: str, machine: str) -> None:
    named = {known[MACHINES[machine].column] for known in NUMBERS.values()}
    default = ALLOW if name == "early" else EPERM
    for n in ASKED:
        if n not in named:
            assert made(name, machine).decide(MACHINES[machine].audit_arch, n) == default, n


@on_both
@each_filter
def test_x32_numbers_and_no_number_at_all_end_the_process(name: str, machine: str) -> None:
    arch = MACHINES[machine].audit_arch
    for n in (*(n | 0x40000000 for n in ASKED), 0x7FFFFFFF, 0x80000000, LOW):
        assert made(name, machine).decide(arch, n) == KILL
    assert made(name, machine).decide(arch, 0x3FFFFFFF) != KILL, "the last below them is merely unknown"


@on_both
@each_filter
def test_calls_of_another_architecture_end_the_process(name: str, machine: str) -> None:
    own = MACHINES[machine].audit_arch
    others = {I386, ARM, RISCV64, 0, LOW, *(known.audit_arch for known in MACHINES.values())} - {own}
    for arch in others | {own ^ (1 << bit) for bit in range(32)}:
        assert {made(name, machine).decide(arch, n) for n in range(0, 500, 7)} == {KILL}


# Arguments


def edges(*values: int) -> st.SearchStrategy[int]:
    """64-bit arguments: any, and those where only a half is, or is not, one of these values."""
    near = {
        v
        for value in values
        for v in (value, value | 1 << 32, value << 32 & WHOLE, value ^ 1, ~value & WHOLE)
    }
    return st.one_of(st.sampled_from(sorted(near)), st.integers(0, WHOLE), st.integers(0, LOW))


INTERESTING = (
    0, 1, 2, 4, 5, 7, 8, 10, 1030, 0x1000, 0x10000, 0x10000000, 0x541B, 0x5412, 0xC028AA03, 0xC028AA08, PID, 15,
    0x53564D41, os.O_WRONLY, os.O_RDWR | os.O_CREAT, os.O_TRUNC, 0x80002, 0x80005,
)  # fmt: skip
SIX = st.tuples(*[edges(*INTERESTING)] * 6)


def low(value: int) -> int:
    """What the kernel makes of an int."""
    return value & LOW


def expected_everywhere(a: tuple[int, ...]) -> dict[str, int]:
    """What secure processes and those of templates may do, said again by hand."""
    executable = EPERM if a[2] & 4 else ALLOW
    return {
        "mmap": executable,
        "mprotect": executable,
        "pkey_mprotect": executable,
        "open": KILL if a[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) else EACCES,
        "openat": KILL if a[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) else EACCES,
        "openat2": ENOSYS,
        "clone3": ENOSYS,
        "newfstatat": ALLOW if a[3] & 0x1000 else EACCES,
        "prctl": ALLOW if low(a[0]) in (15, 0x53564D41) else EPERM,
        "fcntl": ALLOW if low(a[1]) in (0, 1, 2, 3, 4, 1030) else EPERM,
        "kill": EPERM,
        "seccomp": EPERM,
    }


def expected(name: str, a: tuple[int, ...]) -> dict[str, int]:
    pairs = ALLOW if low(a[0]) == 1 and a[1] & 0xF in (1, 5) else KILL
    terminals = {0x5401, 0x5421, 0x5451, 0x541B}
    own_signals = {"tgkill": ALLOW if low(a[0]) == PID else EPERM}
    limits = {"prlimit64": ALLOW if low(a[0]) == 0 and a[2] == 0 else EPERM}  # a pointer has 64 bits
    added: dict[str, dict[str, int]] = {
        "secure": {
            "clone": ALLOW if a[0] & 0x10000 else EPERM,
            "socketpair": pairs,
            "ioctl": ALLOW if low(a[1]) in terminals | set(syscalls._UFFDIO) else EPERM,
            **own_signals,
            **limits,
        },
        "zygote": {
            "clone": KILL if a[0] & 0x7E020000 else ALLOW,
            "socketpair": pairs,
            "ioctl": ALLOW if low(a[1]) in terminals else EPERM,
            "kill": ALLOW,
            "tgkill": ALLOW,
            "prlimit64": ALLOW if low(a[0]) == 0 else EPERM,
            "seccomp": ALLOW if (low(a[0]), low(a[1])) == INSTALL else EPERM,
        },
        "template": {
            "clone": EPERM,
            "socketpair": EPERM,
            "ioctl": ALLOW if low(a[1]) in terminals else EPERM,
            **own_signals,
            **limits,
        },
    }
    return expected_everywhere(a) | added[name]


@pytest.mark.parametrize("name", CONFINED)
@given(arguments=SIX)
def test_arguments_decide_as_the_kernel_would_read_them_in_both_halves(
    name: str, arguments: tuple[int, ...]
) -> None:
    for call, action in expected(name, arguments).items():
        for machine in MACHINES:
            if number(call, machine) is not None:
                assert decide(name, machine, call, *arguments) == action, (call, machine)


@given(arguments=SIX, call=st.sampled_from(sorted(NUMBERS)), name=st.sampled_from(NAMES))
def test_both_architectures_decide_alike(arguments: tuple[int, ...], call: str, name: str) -> None:
    assert len({decide(name, machine, call, *arguments) for machine in MACHINES} - {None}) == 1


@pytest.mark.parametrize("name", ["secure", "template"])
def test_a_limit_behind_a_pointer_whose_lower_half_is_zero_is_not_set(name: str) -> None:
    for machine in MACHINES:
        assert decide(name, machine, "prlimit64", 0, 4, 0, 0x7000_0000) == ALLOW
        assert decide(name, machine, "prlimit64", 0, 4, 0x7F00_0000_0000, 0) == EPERM


def test_the_requests_of_userfaultfd_are_those_that_flexmem_makes() -> None:
    used = {value for name, value in vars(uffd).items() if name.startswith("_UFFDIO_")}
    assert used == set(syscalls._UFFDIO)


# A kernel's decisions


def run_filtered(instructions: bytes, work: Callable[[], object]) -> int:
    """What a process ends with that does `work` behind a filter: 0, minus its signal, or its errno."""
    pid = os.fork()
    if pid == 0:
        try:
            seccomp.install(instructions)
            work()
        except OSError as error:
            os._exit(error.errno or 255)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_rule_allows_refuses_or_kills_by_name_and_by_argument() -> None:
    odd = Rule("lseek", ALLOW, (Check(1, 1, (0,)),), refuse(errno.EXDEV))
    behind = program([Rule("getppid", KILL), Rule("sched_yield", EPERM), odd], ALLOW)
    fd = os.open(os.devnull, os.O_RDONLY)
    assert run_filtered(behind, os.getpid) == 0
    assert run_filtered(behind, os.getppid) == -signal.SIGSYS
    assert run_filtered(behind, os.sched_yield) == errno.EPERM
    assert run_filtered(behind, lambda: os.lseek(fd, 4, 0)) == 0
    assert run_filtered(behind, lambda: os.lseek(fd, 5, 0)) == errno.EXDEV
    os.close(fd)


def test_a_call_that_no_rule_names_gets_the_default() -> None:
    assert run_filtered(program([Rule("exit_group")], KILL), os.getpid) == -signal.SIGSYS


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="x86-64 has a second gate and a second table of calls"
)
def test_this_kernel_ends_a_process_that_uses_the_32_bit_gate_or_x32_numbers() -> None:
    gate = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    gate.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid of i386); int 0x80; ret
    by_gate = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(gate)))
    guarded = program([], ALLOW)
    libc = ctypes.CDLL(None)
    assert run_filtered(guarded, lambda: libc.syscall(0x40000000 | 39)) == -signal.SIGSYS
    pid = os.fork()
    if pid == 0:  # the control: a kernel without 32-bit programs ends it with another signal
        os._exit(int(by_gate() != os.getpid()))
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        assert run_filtered(guarded, by_gate) == -signal.SIGSYS


def test_an_unknown_machine_is_an_error_that_names_it() -> None:
    with pytest.raises(EngineFailure, match="no seccomp filter is written for vax processors"):
        program([], ALLOW, "vax")


def kernel_decides(instructions: bytes, call: int, asked: Iterable[tuple[int, ...]]) -> list[int]:
    """The error number, or 0, of each call, made behind the filter in a process of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            seccomp.install(instructions)
            for arguments in asked:
                ctypes.set_errno(0)
                libc.syscall(call, *map(ctypes.c_ulong, arguments))
                os.write(write, bytes([ctypes.get_errno()]))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        answers = list(file.read())
    os.waitpid(pid, 0)
    return answers


@settings(max_examples=25)  # each is a process
@given(
    asked=st.lists(SIX, min_size=1, max_size=100), value=st.sampled_from([0, 1 << 32, 0xFFFF_FFFF_0000_0001])
)
def test_the_interpreter_decides_as_this_kernel_does(asked: list[tuple[int, ...]], value: int) -> None:
    checks = (Check(0, LOW, (0, 1, PID)), Check(1, 0x1004, (0, 4)), Check(5, WHOLE, (value,)))
    made_here = program([Rule("getpid", ALLOW, checks, refuse(errno.EXDEV))], ALLOW)
    arch, call = MACHINES[platform.machine()].audit_arch, number("getpid", platform.machine())
    assert call is not None
    told = [Filter.of(made_here).decide(arch, call, arguments) for arguments in asked]
    actions = {0: ALLOW, errno.EXDEV: refuse(errno.EXDEV)}
    assert [actions[one] for one in kernel_decides(made_here, call, asked)] == told


# What the documents say


def test_the_threat_model_counts_the_calls_that_are_left() -> None:
    text = (Path(__file__).parents[2] / "docs" / "threat-model.md").read_text()
    (said,) = re.findall(r"allow list \(`syscalls\.py`\)[^.]*?: (\d+) system calls", " ".join(text.split()))
    assert int(said) == len(allowed("secure", "x86_64"))
