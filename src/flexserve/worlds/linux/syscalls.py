"""Which system calls the processes of the secure world need, measured with strace over the tests.

    before a secret    EARLY: what no part of the secure world ever does ends it
    secure process     SECURE: no file is opened, no program started, no connection made, no memory made executable
    template zygote    ZYGOTE: forks, and talks over its socket
    its children       TEMPLATE: compute, read the request, write the answer

In all but EARLY the default is EPERM. What only an attacker would do kills the process: KILLED.
"""

from __future__ import annotations

import os

from .seccomp import ALLOW, EACCES, ENOSYS, EPERM, INSTALL, KILL, LOW, WHOLE, Check, Rule, program, rules

# Never needed, from the first instruction on.
_NEVER = (
    "execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "pidfd_getfd",
    "bpf", "perf_event_open", "kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module",
    "mount", "umount2", "move_mount", "open_tree", "fsopen", "fsmount", "fsconfig", "mount_setattr",
    "pivot_root", "chroot", "setns", "unshare", "open_by_handle_at", "name_to_handle_at", "add_key",
    "request_key", "keyctl", "swapon", "swapoff", "reboot", "iopl", "ioperm", "sethostname", "setdomainname",
    "bind", "listen", "accept", "accept4",
)  # fmt: skip

# Not needed any more once a process is ready.
KILLED = (
    *_NEVER, "socket", "connect", "creat", "rename", "renameat", "renameat2", "link", "linkat", "symlink",
    "symlinkat", "mkdir", "mkdirat", "rmdir", "unlink", "unlinkat", "mknod", "mknodat", "truncate", "chmod",
    "fchmodat", "fchmodat2", "chown", "lchown", "fchownat", "setuid", "setgid", "setreuid", "setregid",
    "setresuid", "setresgid", "setgroups", "capset", "vfork",
)  # fmt: skip

_MEMORY_AND_TIME = (
    "brk", "munmap", "mremap", "madvise", "futex", "futex_wait", "futex_wake", "futex_waitv", "getrandom",
    "clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "time", "sched_yield",
    "getpid", "gettid", "getppid", "getuid", "geteuid", "getgid", "getegid", "getcpu", "getrusage", "sysinfo",
    "uname", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigpending", "sigaltstack", "rseq",
    "restart_syscall", "exit", "exit_group", "set_robust_list", "set_tid_address", "membarrier",
    "sched_getaffinity",
)  # fmt: skip
_DESCRIPTORS = (
    "read", "readv", "write", "writev", "recvfrom", "recvmsg", "sendto", "sendmsg", "poll", "ppoll", "select",
    "pselect6", "close", "close_range", "shutdown", "getsockname", "getpeername", "getsockopt", "fstat", "lseek",
    "pread64",
)  # fmt: skip
# On descriptors it was given, and threads of its own.
_ENGINE = (
    "preadv", "preadv2", "pwrite64", "pwritev", "pwritev2", "readahead", "fadvise64", "cachestat", "ftruncate",
    "fallocate", "fsync", "fdatasync", "sync_file_range", "dup", "dup2", "dup3", "pipe2", "eventfd2", "epoll_create1",
    "epoll_ctl", "epoll_wait", "epoll_pwait", "mincore", "mlock", "mlock2", "munlock", "userfaultfd",
    "memfd_secret", "sched_setaffinity", "sched_getparam", "sched_getscheduler", "sched_get_priority_max",
    "sched_get_priority_min", "getpriority", "setpriority", "wait4", "waitid", "rt_sigtimedwait",
)  # fmt: skip

_PROT_EXEC = 4
_AF_UNIX = 1
_SOCK_TYPE, _SOCK_STREAM, _SOCK_SEQPACKET = 0xF, 1, 5
_CLONE_THREAD = 0x10000
_CLONE_NEW = 0x7E020000  # mount, cgroup, UTS, IPC, user, PID and network namespaces
# F_DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC. Not SETOWN and SETSIG: the kernel would signal others for it.
_FCNTL = (0, 1, 2, 3, 4, 1030)
_PR_SET_NAME, _PR_SET_VMA = 15, 0x53564D41
_TCGETS, _FIONBIO, _FIOCLEX, _FIONREAD = 0x5401, 0x5421, 0x5451, 0x541B
# API, REGISTER, WAKE, COPY, ZEROPAGE, MOVE (flexmem/uffd.py)
_UFFDIO = (0xC018AA3F, 0xC020AA00, 0x8010AA02, 0xC028AA03, 0xC020AA04, 0xC028AA05)
_AT_EMPTY_PATH = 0x1000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_NO_EXECUTABLE_MEMORY = (
    Rule("mmap", checks=(Check(2, _PROT_EXEC, (0,)),)),
    Rule("mprotect", checks=(Check(2, _PROT_EXEC, (0,)),)),
    Rule("pkey_mprotect", checks=(Check(2, _PROT_EXEC, (0,)),)),
)
_NO_FILES = (
    # Opening to write is an attack; to read may be a library that looks whether there is something.
    Rule("open", EACCES, (Check(1, _WRITING, (0,)),), KILL),
    Rule("openat", EACCES, (Check(2, _WRITING, (0,)),), KILL),
    Rule("openat2", ENOSYS),  # its flags are in memory, where a filter cannot look
    Rule("newfstatat", checks=(Check(3, _AT_EMPTY_PATH, (_AT_EMPTY_PATH,)),), otherwise=EACCES),
)
_CLONE3 = Rule("clone3", ENOSYS)  # as above; libc then uses clone
_OWN_NAMES = Rule("prctl", checks=(Check(0, LOW, (_PR_SET_NAME, _PR_SET_VMA)),))
# No datagrams: each may be sent to another address, the journal's for example.
_SOCKETPAIR = Rule(
    "socketpair",
    checks=(Check(0, LOW, (_AF_UNIX,)), Check(1, _SOCK_TYPE, (_SOCK_STREAM, _SOCK_SEQPACKET))),
    otherwise=KILL,
)
_OWN_LIMITS = Rule("prlimit64", checks=(Check(0, LOW, (0,)),))  # or of other processes of this user
_LIMITS_READ = Rule("prlimit64", checks=(*_OWN_LIMITS.checks, Check(2, WHOLE, (0,))))  # a pointer to new ones
_OWN_DESCRIPTORS = Rule("fcntl", checks=(Check(1, LOW, _FCNTL),))


def _ioctl(*requests: int) -> Rule:
    return Rule("ioctl", checks=(Check(1, LOW, requests),))


def _signals_to(pid: int) -> Rule:
    """`abort` and `raise` only: of this very process."""
    return Rule("tgkill", checks=(Check(0, LOW, (pid,)),))


def early() -> bytes:
    """For a process that still loads its libraries and reads its keys."""
    return program((*rules(_NEVER, KILL), Rule("socket", EACCES), Rule("io_uring_setup", EPERM)), ALLOW)


def secure(pid: int) -> bytes:
    """For the secure process `pid` once it knows its keys."""
    return program(
        (
            *rules((*_MEMORY_AND_TIME, *_DESCRIPTORS, *_ENGINE), ALLOW),
            *rules(KILLED, KILL),
            *_NO_EXECUTABLE_MEMORY,
            *_NO_FILES,
            _OWN_DESCRIPTORS,
            _CLONE3,
            _OWN_NAMES,
            _SOCKETPAIR,
            _LIMITS_READ,
            _signals_to(pid),
            Rule("clone", checks=(Check(0, _CLONE_THREAD, (_CLONE_THREAD,)),)),
            _ioctl(*_UFFDIO, _TCGETS, _FIONBIO, _FIOCLEX, _FIONREAD),
        ),
        EPERM,
    )


def zygote() -> bytes:
    """For the process that forks template processes."""
    return program(
        (
            *rules((*_MEMORY_AND_TIME, *_DESCRIPTORS), ALLOW),
            *rules(("kill", "tgkill", "wait4", "setitimer"), ALLOW),
            *rules(KILLED, KILL),
            Rule("clone", checks=(Check(0, _CLONE_NEW, (0,)),), otherwise=KILL),
            _OWN_LIMITS,
            *_NO_EXECUTABLE_MEMORY,
            *_NO_FILES,
            _OWN_DESCRIPTORS,
            _CLONE3,
            _OWN_NAMES,
            _SOCKETPAIR,
            _ioctl(_TCGETS, _FIONBIO, _FIOCLEX, _FIONREAD),
            # Its children add a filter of their own, which only takes away.
            Rule("seccomp", checks=tuple(Check(at, LOW, (value,)) for at, value in enumerate(INSTALL))),
        ),
        EPERM,
    )


def template(pid: int) -> bytes:
    """For the process `pid` that runs one template."""
    return program(
        (
            *rules((*_MEMORY_AND_TIME, *_DESCRIPTORS), ALLOW),
            *rules(KILLED, KILL),
            *_NO_EXECUTABLE_MEMORY,
            *_NO_FILES,
            _OWN_DESCRIPTORS,
            _CLONE3,
            _OWN_NAMES,
            _LIMITS_READ,
            _signals_to(pid),
            _ioctl(_TCGETS, _FIONBIO, _FIOCLEX, _FIONREAD),
        ),
        EPERM,
    )
